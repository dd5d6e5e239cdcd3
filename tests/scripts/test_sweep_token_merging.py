import csv
import functools
import statistics
from pathlib import Path

import matplotlib.image
import pytest
import torch

from audio.dataset import Pack
from models import create_model, load_model, save_checkpoint
from scripts.sweep_token_merging import main
from scripts.sweeps import token_merging
from scripts.sweeps.results import draw_sweep, format_rows, format_rows_csv
from scripts.sweeps.token_merging import Point, Row, Spread, Sweep, make_batch, summarise_points
from tests.conftest import run_command
from training.labelled import open_labelled
from training.metrics import evaluate_scores

LABELS = [f"tone {index}" for index in range(7)]
RS = (0, 4, 12)


def run_sweep(**options):
    """Run the command with options as a command line has them."""
    texts = {name: ",".join(map(str, v)) if isinstance(v, list | tuple) else str(v) for name, v in options.items()}
    main([f"--{name}={text}" for name, text in texts.items()])


def sounds(pack):
    """All clips of the pack of tones, (28,S), and the class of each."""
    opened = Pack.open(pack)
    waves = torch.stack([torch.from_numpy(opened.read(row)) for row in range(len(opened))])
    return waves, torch.tensor([LABELS.index(label) for label in opened.table["labels"]])


def small(**arguments):
    """A transformer of five blocks with random weights."""
    arguments = {"labels": LABELS, "depth": 5, "target_length": 64} | arguments
    return create_model("ast_pico", **arguments).eval()


@pytest.fixture(scope="module")
def folder(tone_pack, tmp_path_factory):
    """Checkpoints R_SEED.pt whose last layer is fitted to half of the clips, two seeds, three r."""
    folder = tmp_path_factory.mktemp("checkpoints")
    waves, classes = sounds(tone_pack)
    with torch.random.fork_rng(), torch.no_grad():
        for seed in range(2):
            for r in RS:
                torch.manual_seed(seed)
                model = small(activation="softmax", token_merging=r)
                known = model.mlp_head[0](model.embed(waves[::2])[0])  # (14,D)
                known += 1.0 * known.std(0) * torch.randn(known.shape)  # so that it makes errors
                known = torch.cat([known, torch.ones(14, 1)], dim=1)
                fitted = torch.linalg.lstsq(known, torch.eye(7)[classes[::2]], driver="gelsd").solution.T  # (C,D+1)
                model.mlp_head[1].weight.copy_(fitted[:, :-1])
                model.mlp_head[1].bias.copy_(fitted[:, -1])
                save_checkpoint(folder / f"{r}_{seed}.pt", model)
        save_checkpoint(folder / "cnn.pt", create_model("mn01_as", labels=LABELS))
        save_checkpoint(folder / "sigmoid.pt", small())
    return folder


@functools.cache
def accuracy(path, r, pack):
    """Percent of the clips whose likeliest class is theirs."""
    waves, classes = sounds(pack)
    with torch.inference_mode():
        likeliest = load_model(path, token_merging=r).predict(waves).argmax(1)
    return 100 * sum(int(a) == int(b) for a, b in zip(likeliest, classes, strict=True)) / len(classes)


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def no_clock(monkeypatch):
    """Every setting is run once, and the n-th takes n + 1 seconds, and twice as long in a second round."""

    def turns(candidates, batch, rounds, steps, device):
        for step in candidates.values():
            step(batch)
        return {name: [1.0 + number, 2.0 + 2 * number] for number, name in enumerate(candidates)}

    monkeypatch.setattr(token_merging, "time_steps", turns)


@pytest.mark.usefixtures("no_clock")
def test_the_table_holds_accuracies_and_drops_as_computed_by_hand(folder, tone_pack, tmp_path, capsys):
    plain = [str(folder / f"0_{seed}.pt") for seed in range(2)]
    trained = [str(folder / f"{r}_{seed}.pt") for seed in range(2) for r in RS]
    groups = {"inference": tuple(plain), "trained": ",".join(trained)}
    run_sweep(test_data=str(tone_pack), r=RS[1:], output=tmp_path, batch_size=8, num_workers=0, **groups)
    rows = {(row["group"], float(row["r"])): row for row in read(tmp_path / "sweep.csv")}
    assert list(rows) == [(group, r) for group in groups for r in RS]
    seen = set()
    for number, (group, r) in enumerate(rows):
        paths = plain if group == "inference" else [str(folder / f"{r:g}_{seed}.pt") for seed in range(2)]
        values = [accuracy(path, int(r), tone_pack) for path in paths]
        drops = [value - accuracy(path, 0, tone_pack) for value, path in zip(values, plain, strict=True)]
        row = rows[group, r]
        assert float(row["accuracy"]) == pytest.approx(statistics.mean(values), abs=1e-3)
        assert float(row["accuracy_std"]) == pytest.approx(statistics.stdev(values), abs=1e-3)
        assert float(row["drop"]) == pytest.approx(statistics.mean(drops), abs=1e-3)
        assert float(row["drop_std"]) == pytest.approx(statistics.stdev(drops), abs=1e-3)
        seconds = 1 + number % 3  # both groups are one network: three settings are timed, and 8 clips at once
        assert float(row["lowest"]) == pytest.approx(8 / (2 * seconds), rel=1e-4)
        assert float(row["highest"]) == pytest.approx(8 / seconds, rel=1e-4)
        seen |= set(values)
    assert len(seen) > 3  # the clips are not all the same to these models
    each = read(tmp_path / "sweep_checkpoints.csv")
    assert [Path(row["checkpoint"]).name for row in each[6:]] == [Path(path).name for path in trained]
    out = capsys.readouterr().out
    assert [line.split()[1] for line in out.splitlines()[2:5]] == ["0", "4", "12"]
    assert "clips/s: the network alone on spectrograms, 8 clips at once" in out
    assert (tmp_path / "sweep.md").read_text() in out
    assert matplotlib.image.imread(tmp_path / "sweep.png").shape[2] == 4


@pytest.mark.usefixtures("no_clock")
def test_sigmoid_models_are_evaluated_by_map_and_other_models_without_merging(folder, tone_pack, tmp_path):
    groups = {"inference_of_one": str(folder / "sigmoid.pt"), "teacher": str(folder / "cnn.pt")}
    run_sweep(test_data=str(tone_pack), r=4, output=tmp_path, num_workers=0, **groups)
    data, (waves, _) = open_labelled(str(tone_pack), LABELS, None), sounds(tone_pack)
    rows = read(tmp_path / "sweep.csv")
    assert [(row["group"], row["r"]) for row in rows] == [*(("inference_of_one", r) for r in "04"), ("teacher", "0")]
    for row, path, merging in zip(rows, ("sigmoid", "sigmoid", "cnn"), ({}, {"token_merging": 4}, {}), strict=True):
        with torch.inference_mode():
            scores = load_model(folder / f"{path}.pt", **merging).predict(waves).numpy()
        assert float(row["mAP"]) == pytest.approx(100 * evaluate_scores(scores, data.multi_hot()).mAP, abs=1e-2)
        assert row["mAP_std"] == ""


def halves(pack, folder):
    """Two manifests with the first and the second half of a pack."""
    header, *rows = Path(pack).read_text().splitlines()
    shard = (Path(pack).parents[1] / "hdf5" / "tones_0.h5").resolve()
    column = header.split("\t").index("hdf5path")
    paths = []
    for name, part in (("one", rows[:14]), ("two", rows[14:])):
        cells = [[str(shard) if i == column else cell for i, cell in enumerate(row.split("\t"))] for row in part]
        paths.append(folder / f"{name}.tsv")
        paths[-1].write_text("\n".join([header, *map("\t".join, cells)]) + "\n")
    return paths


@pytest.mark.usefixtures("no_clock")
def test_packs_go_with_checkpoints_in_turn(folder, tone_pack, tmp_path):
    folds = halves(tone_pack, tmp_path)
    paths = [str(folder / f"0_{seed}.pt") for seed in range(2)]
    run_sweep(test_data=",".join(map(str, folds)), r="0,4", output=tmp_path, num_workers=0, inference=paths)
    got = {(row["r"], row["checkpoint"]): float(row["accuracy"]) for row in read(tmp_path / "sweep_checkpoints.csv")}
    assert got == {
        (r, path): pytest.approx(accuracy(path, int(r), fold), abs=1e-3)
        for r in "04"
        for path, fold in zip(paths, folds, strict=True)
    }


def points(*rs, group="trained"):
    return [Point(group, r, (int(r),), f"{number}.pt", "pack.tsv", "net") for number, r in enumerate(rs)]


def test_seeds_are_averaged_over_their_folds_before_they_spread():
    sweep = Sweep(points(0, 0, 0, 0, 5, 5, 5, 5))
    values = [90.0, 80.0, 92.0, 86.0, 88.0, 70.0, 92.0, 80.0]
    speeds = {("net", (0,)): [1.0], ("net", (5,)): [2.0]}
    plain, merged = summarise_points(sweep, values, speeds, n_packs=2)
    assert plain.value == Spread(87.0, pytest.approx(2**0.5 * 2))  # seeds of 85 and 89
    assert merged.value == Spread(82.5, pytest.approx(2**0.5 * 3.5))
    assert merged.drop == Spread(-4.5, pytest.approx(2**0.5 * 1.5))  # -6 and -3
    assert merged.clips_per_second == (2.0,)
    folds, _ = summarise_points(Sweep(points(0, 0, 5, 5)), values[:4], speeds, n_packs=2)
    assert folds.value == Spread(85.0, pytest.approx(50**0.5))  # one checkpoint a fold: the folds spread


def test_drops_without_a_partner():
    speeds = {("net", (0,)): [1.0], ("net", (5,)): [2.0]}
    _, uneven = summarise_points(Sweep(points(0, 5, 5)), [90.0, 80.0, 84.0], speeds, 1)
    assert uneven.drop == Spread(-8.0, None)
    (alone,) = summarise_points(Sweep(points(5)), [80.0], speeds, 1)
    assert alone.drop is None
    assert format_rows([alone], "mAP").splitlines()[2].split() == ["|", "5", "|", "80.0", "|", "|", "2.0", "|"]
    assert format_rows_csv([alone], "mAP").splitlines()[1] == "trained,5,1,80,,,,2,2,2"


def test_the_picture_shows_every_group_with_its_spread_and_every_network_once():
    rows = [
        Row(group, r, 3, Spread(90 - r, 1.0), Spread(-r, 0.5), (10.0 + r, 12.0 + r, 17.0 + r), network)
        for group, network in (("inference", "net"), ("trained", "net"), ("small", "other"))
        for r in (0.0, 10.0)
    ]
    left, right = draw_sweep(rows, "mAP").axes
    assert [line.get_label() for line in left.get_lines()] == [
        f"{g}, mean of 3" for g in ("inference", "trained", "small")
    ]
    assert list(left.get_lines()[0].get_ydata()) == [90.0, 80.0]
    band = left.collections[0].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == (79.0, 91.0)
    assert left.get_ylabel() == "mAP, %"
    speeds = {line.get_label(): list(line.get_ydata()) for line in right.get_lines() if len(line.get_xdata()) == 2}
    assert speeds["inference, trained"] == speeds["small"] == [12.0, 22.0]
    assert [text.get_text() for text in right.texts] == ["1.83x"] * 2


def test_the_clips_that_are_timed_are_those_in_the_middle(tone_pack):
    pack = Pack.open(tone_pack)
    pack.n_samples = pack.n_samples + torch.arange(28).flip(0).numpy()  # the last is the shortest
    assert torch.equal(
        make_batch(pack, 16000, 4), torch.stack([torch.from_numpy(pack.read(i)) for i in (15, 14, 13, 12)])
    )
    assert len(make_batch(pack, 16000, 40)) == 40


def test_the_command_as_a_user_types_it(folder, tone_pack, tmp_path):
    words = ("--inference", f"{folder / '0_0.pt'},{folder / '0_1.pt'}", "--cmkd", folder / "4_0.pt", "--r", "0,4")
    more = ("--test_data", tone_pack, "--output", tmp_path, "--rounds", "2", "--num_workers", "0")
    done = run_command("scripts/sweep_token_merging.py", *words, *more)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("|    r | inference: accuracy, % |")
    rows = read(tmp_path / "sweep.csv")
    assert [(row["group"], row["r"], row["checkpoints"]) for row in rows] == [
        *(("inference", r, "2") for r in "04"),
        ("cmkd", "4", "1"),
    ]
    assert all(0 < float(row["lowest"]) <= float(row["clips_per_second"]) <= float(row["highest"]) for row in rows)


def test_help_describes_what_is_evaluated_and_what_is_timed():
    done = run_command("scripts/sweep_token_merging.py", "--help")
    assert done.returncode == 0
    for part in ("--inference RUN,RUN", "--batch_size VALUE", "median of several passes", "for folds"):
        assert part in done.stdout


def run_failing(capsys, status=1, /, **options):
    """The sentence that the command ends with."""
    with pytest.raises(SystemExit) as stopped:
        run_sweep(**options)
    assert stopped.value.code == status
    return capsys.readouterr().err


def test_faults_of_the_command_are_reported_at_once(capsys):
    text = run_failing(capsys, 2, r="0,x", mode="fp8", rounds=0)
    for part in ("--test_data is missing", "--r is 'x'", "'fp8'", "at least 1"):
        assert part in text


def test_faults_of_checkpoints_and_packs_are_reported_before_the_work(folder, tone_pack, tmp_path, capsys):
    folds = ",".join(map(str, halves(tone_pack, tmp_path)))
    groups = {"inference": folder / "cnn.pt", "batchsize": 8, "trained": folder / "4_0.pt"}
    text = run_failing(capsys, test_data=folds, output=tmp_path / "out", **groups)
    assert "has 4 faults" in text
    assert "mn01_as, which has no tokens to merge" in text
    assert "--batchsize (did you mean 'batch_size'?): 8: no such file or folder" in text
    assert "--trained: 2 packs are assigned to the checkpoints of each r in turn" in text
    assert "found 1 at r = 4" in text
    assert "add --metric accuracy or --metric mAP" in text
    assert not (tmp_path / "out").exists()


def test_accuracy_requires_one_label_a_clip(folder, tone_pack, tmp_path, capsys):
    twice = tmp_path / "twice.tsv"
    twice.write_text(Path(halves(tone_pack, tmp_path)[0]).read_text().replace("tone 0\t", "tone 0;tone 1\t"))
    text = run_failing(capsys, test_data=str(twice), inference=folder / "0_0.pt")
    assert "2 of its 14 clips have no label, or several" in text
    assert "--metric mAP" in text
    assert "use accuracy, mAP or auto" in run_failing(
        capsys, test_data=str(tone_pack), metric="map", inference=folder / "0_0.pt"
    )
