"""The command beside `training.baseline`: what it prints and writes, and its sentences for mistakes."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from probing.scores import bootstrap_interval
from scripts.baseline import _centre_interval, main
from tests.training.test_baseline import SINGLE, tones
from training.metrics import evaluate_scores

WORDS = ["low", "mid", "high", "top"]


@pytest.fixture
def lists(tmp_path):
    """Lists of packs with classes by name, in so much noise that not every clip is right."""

    def write(name, labels=SINGLE, noise=3.0):
        column = [";".join(WORDS[kind] for kind in np.atleast_1d(label)) for label in labels]
        return str(tones_list(tmp_path, labels, name, column, noise))

    return write


def tones_list(folder, labels, name, column, noise):
    # `tones` calls its own argument `labels`, the column of the list goes in afterwards
    data = tones(folder, labels, name, noise=noise)
    table = data.pack.table.assign(labels=column)
    table.to_csv(data.pack.manifest, sep="\t", index=False)
    return data.pack.manifest


def test_the_command_prints_the_variants_and_the_figure_and_writes_them(lists, tmp_path, capsys):
    train, test, output = lists("train"), lists("test"), tmp_path / "out" / "baseline.json"
    main(["--train_data", train, "--test_data", test, "--output", str(output)])
    printed = capsys.readouterr().out
    stored = json.loads(output.read_text())
    table = [line for line in printed.splitlines() if line.startswith(("log-mel", "MFCC"))]
    assert len(table) == len(stored["choices"]) == 8
    for line, choice in zip(table, stored["choices"], strict=True):
        assert f"{100 * choice['value']:.1f} %" in line
        chosen = {key: choice[key] for key in ("spectrum", "parts", "model")} == stored["variant"]
        assert line.endswith("chosen") == chosen
    low, high = stored["interval"]
    assert low <= stored["value"] <= high
    assert stored["metrics"]["top1"] == stored["value"]
    assert (
        f"test: accuracy {100 * stored['value']:.1f} %, 95 % interval {100 * low:.1f} % to {100 * high:.1f} %"
        in printed
    )
    assert "chance 25.0 %; 24 clips" in printed
    assert stored["sentence"] in printed
    assert stored["data"] == {"train": train, "test": test, "valid": None}

    main(["--train_data", train, "--test_data", test, "--valid_data", lists("valid"), "--output", str(output)])
    assert "24 validation clips" in capsys.readouterr().out
    assert json.loads(output.read_text())["clips_fitted"] == 48


def test_a_clip_may_have_several_labels(lists, capsys):
    several = [[0], [1, 2], [3], [0, 2], [1]] * 4
    main(["--train_data", lists("train", several), "--test_data", lists("test", several)])
    printed = capsys.readouterr().out
    assert "mAP in selection" in printed
    assert "test: mAP 0." in printed or "test: mAP 1." in printed


def test_clips_on_both_sides_are_warned_of(lists, caplog):
    train = lists("train")
    main(["--train_data", train, "--test_data", train])
    assert "24 clips are in train_data and in test_data: train_000.wav" in caplog.text


def test_the_interval_lies_around_the_figure_where_classes_have_few_clips():
    rng = np.random.default_rng(0)
    targets = np.stack([rng.permutation([1] * 3 + [0] * 797) for _ in range(200)], axis=1)
    scores = rng.standard_normal((800, 200)) + 2 * targets
    value = evaluate_scores(scores, targets).mAP
    low, high = bootstrap_interval(scores, targets, 0)
    assert value < low  # a clip that is drawn twice helps to rank its class
    result = SimpleNamespace(value=value, interval=(low, high))
    moved = _centre_interval(result)
    assert moved[0] < value < moved[1]
    assert moved[1] - moved[0] == pytest.approx(high - low)
    assert _centre_interval(SimpleNamespace(value=(low + high) / 2, interval=(low, high))) == (low, high)


@pytest.mark.parametrize(
    ("words", "sentences"),
    [
        ([], ["--train_data is missing", "--test_data is missing"]),
        (["--trian_data", "x.tsv"], ["unknown option --trian_data (did you mean 'train_data'?)"]),
        (["--seed=3"], ["unknown option --seed"]),
        (["x.tsv"], ["'x.tsv' belongs to no option"]),
        (
            ["--train_data", "no.tsv", "--test_data", "none.tsv"],
            ["no.tsv does not exist", "none.tsv does not exist", "wavlist_to_hdf5.py"],
        ),
    ],
    ids=str,
)
def test_mistakes_are_one_line_errors(words, sentences, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == (1 if "--test_data" in words else 2)  # 2: the command line itself
    output = capsys.readouterr().err
    assert "Traceback" not in output
    for sentence in sentences:
        assert sentence in output


def test_the_command_helps_and_runs_as_a_user_runs_it(command, lists, tmp_path):
    helped = command("scripts/baseline.py", "--help")
    assert helped.returncode == 0
    assert all(option in helped.stdout for option in ("--train_data", "--test_data", "--valid_data", "--output"))
    train, test = lists("train"), lists("test")
    output = tmp_path / "b.json"
    done = command("scripts/baseline.py", "--train_data", train, "--test_data", test, "--output", output)
    assert done.returncode == 0, done.stderr
    main(["--train_data", train, "--test_data", test, "--output", str(tmp_path / "again.json")])
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("b.json", "again.json"))
    for stored in (one, two):
        del stored["seconds"], stored["sentence"]
    assert one == two  # in another process, with other threads
