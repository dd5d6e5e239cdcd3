"""What `auto` in a configuration becomes, and that it is chosen once."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from audio.dataset import Pack
from audio.io import to_int16
from audio.shard_writer import ShardWriter
from common.errors import Faults, UserError
from common.files import sha256, write_json
from models import create_model
from tests.conftest import run_command
from training import automatic, prepare
from training.automatic import Choice, DataFacts, choose, measure_pack, read_train_config
from training.band_limit import usable_limit
from training.budget import Timing, choose_epochs, time_run
from training.config import TrainConfig, read_minutes
from training.data import open_training
from training.loop import RunParts
from training.needs import plan_run
from training.prepare import prepare_run
from training.run_folder import recall_choices

ROOT = Path(__file__).resolve().parents[2]
OWN = sorted((ROOT / "trainconfig").glob("own_*.yaml"))


def write_pack(folder: Path, sounds: list[np.ndarray], labels: list[str], rate: int = 16000) -> Path:
    """Pack sounds in [-1, 1]; return the manifest."""
    (folder / "labels").mkdir(parents=True)
    shard, rows = folder / "hdf5" / "pack_0.h5", ["filename\tlabels\thdf5path"]
    with ShardWriter(shard, rate) as writer:
        for index, (sound, label) in enumerate(zip(sounds, labels, strict=True)):
            writer.append(f"{index}.wav", to_int16(sound.astype(np.float32)))
            rows.append(f"{index}.wav\t{label}\t{shard}")
    manifest = folder / "labels" / "pack.tsv"
    manifest.write_text("\n".join(rows) + "\n")
    return manifest


def noise(seconds: float, rate: int, seed: int) -> np.ndarray:
    return 0.1 * np.random.default_rng(seed).standard_normal(round(seconds * rate))


@pytest.mark.parametrize(("seconds", "equal"), [(16.0, False), (12.0, True), (20.0, True)])
def test_lengths_are_those_of_chunks_with_their_tails(tmp_path, seconds, equal):
    manifest = write_pack(tmp_path, [noise(seconds, 4000, i) for i in range(2)], ["a", "b"], 4000)
    assert measure_pack(Pack.open(manifest)).equal_lengths is equal


def test_a_pack_is_measured(tmp_path):
    sounds = [noise(seconds, 16000, 1) for seconds in (0.5, 1.0, 12.0)]
    facts = measure_pack(Pack.open(write_pack(tmp_path, sounds, ["a", "b;", "a"])))
    assert (facts.n_clips, facts.median_seconds, facts.longest_seconds) == (3, 1.0, 12.0)
    assert (facts.equal_lengths, facts.single_label, facts.sample_rate, facts.band_limit) == (False, True, 16000, 8000)
    several = Pack.open(write_pack(tmp_path / "several", sounds, ["a", "a;b", "a"]))
    assert measure_pack(several).single_label is False


def chosen(path: Path, facts: DataFacts, **changes) -> dict[str, Choice]:
    faults = Faults("the test")
    found = choose(yaml.safe_load(path.read_text()) | changes, facts, faults)
    faults.raise_if_any()
    return found


TEACHER = ROOT / "trainconfig" / "own_teacher.yaml"


def test_the_loss_follows_the_labels_and_a_teachers_activation():
    def loss(**facts):
        return chosen(TEACHER, DataFacts(**facts))["loss"].value

    assert loss(single_label=True) == "CrossEntropyLoss"
    assert loss(single_label=False) == "BCEWithLogitsLoss"
    assert loss(single_label=True, activation="sigmoid") == "BCEWithLogitsLoss"
    assert loss(single_label=None, activation="softmax") == "CrossEntropyLoss"


@pytest.mark.parametrize("seconds", [0.05, 0.3, 1.0, 5.0, 3600.0])
@pytest.mark.parametrize(
    ("rate", "limit"), [(8000, 4000), (16000, 4000), (16000, 8000), (48000, 24000), (96000, 48000)]
)
@pytest.mark.parametrize(
    "model", ["auto", "mn02_as", "audiotransformer_nano", "mobilenetv3", "dymn", "efficientnet_b0"]
)
def test_every_choice_builds_a_network_that_tags_clips_of_that_length(seconds, rate, limit, model):
    facts = DataFacts(100, seconds, seconds, sample_rate=rate, band_limit=limit, single_label=True)
    found = chosen(TEACHER, facts, model=model)
    name = found["model"].value if model == "auto" else model
    arguments = found["model_args"].value
    network = create_model(name, num_classes=3, **arguments).eval()
    if "f_max" in arguments:
        assert network.front_end.f_max <= limit
    n_samples = round(min(seconds, found["chunk_length"].value) * network.sample_rate)
    with torch.inference_mode():
        assert network.predict(torch.rand(2, max(n_samples, 1)) - 0.5).shape == (2, 3)
    if model == "auto":
        frames = network.front_end.n_frames(n_samples)
        assert frames <= 700
        assert frames >= 50 or seconds < 0.25
        TrainConfig.model_validate(yaml.safe_load(TEACHER.read_text()) | {k: c.value for k, c in found.items()}
                                   | {"epochs": 1, "valid_every": 1, "warmup_epochs": 1})  # fmt: skip


def test_what_the_user_gives_stands_beside_what_is_chosen():
    arguments = chosen(TEACHER, DataFacts(), model="resnet10", model_args={"auto": True, "n_mels": 40})["model_args"]
    assert arguments.value["n_mels"] == 40
    assert arguments.value["hop_size"] == 320
    assert "batch_size" not in chosen(TEACHER, DataFacts(), batch_size=7)
    faster = chosen(TEACHER, DataFacts(), model="resnet10", model_args={"auto": True, "sample_rate": 32000})
    assert (faster["model_args"].value["hop_size"], faster["model_args"].value["win_size"]) == (640, 800)


def test_what_starts_from_weights_keeps_their_front_end():
    path = ROOT / "trainconfig" / "own_finetune.yaml"
    facts = DataFacts(100, 0.4, 0.4, sample_rate=32000, band_limit=16000, single_label=True)
    ced, cnn = (chosen(path, facts, model=name) for name in ("audiotransformer_tiny", "mn04_as"))
    assert (ced["model_args"].value, ced["pretrained"].value) == ({"pooling": "logit"}, "ced_tiny")
    assert (cnn["model_args"].value, cnn["pretrained"].value) == ({}, "mn04_as")
    assert (ced["layer_decay"].value, cnn["layer_decay"].value) == (0.75, None)


def test_auto_is_refused_where_nothing_chooses_it():
    faults = Faults("the test")
    choose({"mixup": "auto", "model": "resnet10"}, DataFacts(), faults)
    assert "mixup is auto" in faults.sentences[0]


def test_published_configurations_hold_nothing_automatic():
    of_own_sounds = {*OWN, *(ROOT / "trainconfig").glob("*_own.yaml")}
    for path in {*(ROOT / "trainconfig").glob("*.yaml"), *(ROOT / "logitconfig").glob("*.yaml")} - of_own_sounds:
        assert not automatic.list_automatic_keys(yaml.safe_load(path.read_text())), path


@pytest.mark.parametrize(("text", "minutes"), [("10m", 10), ("2h", 120), ("90s", 1.5), (3, 3), ("0.5 hours", 30)])
def test_budgets_are_read(text, minutes):
    assert read_minutes(text) == pytest.approx(minutes)


@pytest.mark.parametrize("text", ["ten", "0m", "-3", "5d"])
def test_a_budget_that_is_none_is_a_sentence(tmp_path, text):
    faults = Faults("the test")
    read_train_config(TEACHER, {"budget": text}, faults)
    assert any("10m, 2h or 90s" in sentence for sentence in faults.sentences)


def opened(tone_pack, **changes):
    overrides = {"train_data": str(tone_pack), "eval_data": str(tone_pack), "valid_data": str(tone_pack)}
    overrides |= {"num_workers": 0, "device": "cpu", "baseline": False, "model_args.width": 4} | changes
    faults = Faults("the test")
    config = read_train_config(TEACHER, overrides, faults)
    plan = plan_run(config, faults)
    data = open_training(config, 1, faults, plan.needs)
    faults.raise_if_any()
    model = create_model(config.model, num_classes=7, labels=data.labels, **config.model_args)
    return config, data, model, plan.build(model), plan.needs


@pytest.mark.parametrize(("budget", "passes"), [("1s", None), ("30s", (2, 199)), ("100h", (200, 200))])
def test_the_budget_sets_the_epochs(tone_pack, budget, passes):
    config, data, *_ = opened(tone_pack, budget=budget)
    found = choose_epochs(config, len(data.items), Timing(0.2, 0.1))
    steps = found["epochs"].value * (found["epoch_length"].value if "epoch_length" in found else 2)
    assert steps * 0.2 <= config.budget * 60 or steps <= 10
    if passes:
        assert passes[0] <= found["epochs"].value <= passes[1]
    assert 1 <= found["warmup_epochs"].value <= max(1, found["epochs"].value // 10)


@pytest.mark.parametrize("budget", ["2s", "3s"])
def test_a_run_of_a_few_passes_is_cut_into_shorter_epochs_for_its_warm_up(tone_pack, budget):
    config, data, *_ = opened(tone_pack, budget=budget)  # 2 steps a pass, and 4 to 6 passes
    found = choose_epochs(config.model_copy(update={"batch_size": 14}), len(data.items), Timing(0.2, 0.01))
    n_steps = found["epochs"].value * found["epoch_length"].value
    assert 0.2 * n_steps <= 60 * config.budget or found["epoch_length"].value == 1
    assert found["warmup_epochs"].value <= found["epochs"].value / 10


def test_an_epoch_length_that_is_given_counts_in_the_budget(tone_pack):
    config, data, *_ = opened(tone_pack, budget="10s", epoch_length=30)
    found = choose_epochs(config, len(data.items), Timing(0.2, 0.01))
    assert "epoch_length" not in found
    assert found["epochs"].value == 1  # of 6 s


def test_steps_are_timed_on_copies(tone_pack):
    config, data, model, objective, needs = opened(tone_pack)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(5)
    timing = time_run(config, RunParts(data, model, objective, needs, torch.device("cpu"), 1))
    assert 0 < timing.step_seconds < 60
    assert 0 < timing.valid_seconds < 60
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(3))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def prepared(tone_pack, folder: Path, **changes):
    overrides = {"train_data": str(tone_pack), "eval_data": str(tone_pack), "valid_data": str(tone_pack)}
    overrides |= {"outputpath": str(folder), "num_workers": 0, "device": "cpu", "budget": "1m", "baseline": False}
    torch.manual_seed(1)
    overrides |= {"model_args.width": 4} | changes
    return prepare_run(str(TEACHER), {key: value for key, value in overrides.items() if value is not None}, 1)


def test_a_model_without_published_weights_is_trained_as_one_from_random_weights():
    facts = DataFacts(n_clips=300, median_seconds=0.5, longest_seconds=0.5, band_limit=4000.0)
    finetune = next(path for path in OWN if path.stem == "own_finetune")
    from_random = chosen(TEACHER, facts, model="resnet10")
    for key, choice in chosen(finetune, facts, model="resnet10").items():
        if key in ("model_args", "optimizer_args"):
            assert choice.value == from_random[key].value
    kept = chosen(finetune, facts, model="mn02_as")["model_args"].value
    assert kept == {"band_limit": usable_limit(4000)}  # the bands that its weights were trained with


def test_choices_are_made_once_and_taken_again_by_a_run_that_goes_on(tone_pack, tmp_path, monkeypatch):
    times = iter([0.05, 0.4, 0.7])
    monkeypatch.setattr("training.prepare.time_run", lambda *_: Timing(next(times), 0.1))
    first = prepared(tone_pack, tmp_path)
    written = yaml.safe_load((first.folder.path / "config.yaml").read_text())
    assert "auto" not in written.values()
    assert written["loss"] == "CrossEntropyLoss"
    assert written["model_args"]["f_max"] == usable_limit(4000)
    assert written["model_args"]["width"] == 4
    noted = json.loads((first.folder.path / "run.json").read_text())["automatic"]
    assert noted["epochs"]["value"] == written["epochs"]
    assert noted["epochs"]["reason"]
    first.folder._lock.close()  # as if the process had ended

    again = prepared(tone_pack, tmp_path)
    assert again.folder.path == first.folder.path
    assert again.run.config == first.run.config
    assert next(times) == 0.4  # it was not timed again
    again.folder._lock.close()

    other = prepared(tone_pack, tmp_path, budget="2m")  # asks for another run
    assert other.folder.path != first.folder.path


def test_choices_for_other_soft_targets_are_not_taken_again(tmp_path):
    train_data, store = tmp_path / "train.tsv", tmp_path / "store"
    store.mkdir()
    train_data.write_text("filename\n")
    (store / "meta.json").write_text('{"activation": "softmax"}')
    given = {"train_data": str(train_data), "logitspath": str(store), "loss": "auto"}
    identity = {"seed": 1, "train_data_sha256": sha256(train_data), "soft_targets_sha256": sha256(store / "meta.json")}
    list_automatic_keys = {"loss": {"value": "CrossEntropyLoss", "reason": "softmax"}}
    noted = {"identity": identity, "given": given, "automatic": list_automatic_keys}
    write_json(tmp_path / "runs" / "resnet10" / "2026" / "run.json", noted)
    assert recall_choices(tmp_path / "runs", given, 1, "auto") == {"loss": Choice("CrossEntropyLoss", "softmax")}
    (store / "meta.json").write_text('{"activation": "sigmoid"}')
    assert recall_choices(tmp_path / "runs", given, 1, "auto") is None


def test_a_folder_that_is_named_gives_its_choices(tone_pack, tmp_path, monkeypatch):
    times = iter([0.05])
    monkeypatch.setattr("training.prepare.time_run", lambda *_: Timing(next(times), 0.1))
    first = prepared(tone_pack, tmp_path)
    first.folder._lock.close()
    overrides = {"train_data": str(tone_pack), "eval_data": str(tone_pack), "valid_data": str(tone_pack)}
    overrides |= {"outputpath": str(tmp_path), "num_workers": 0, "device": "cpu", "budget": "1m", "baseline": False}
    torch.manual_seed(1)
    again = prepare_run(str(TEACHER), overrides | {"model_args.width": 4}, 1, resume=str(first.folder.path))
    assert again.run.config == first.run.config


def test_the_preset_needs_no_option_for_classes_called_by_numbers(tmp_path):
    sounds = [0.3 * np.sin(np.arange(8000) * (0.1 + 0.2 * (i % 3))) + noise(0.5, 16000, i) for i in range(12)]
    manifest = write_pack(tmp_path / "pack", sounds, [str(3 * (i % 3)) for i in range(12)])
    words = [word for key in ("train_data", "valid_data", "eval_data") for word in (f"--{key}", manifest)]
    words += ["--epochs", "1", "--num_workers", "0", "--outputpath", tmp_path / "runs", "--model_args.width", "4"]
    result = run_command("run.py", "train", TEACHER, *words)
    assert result.returncode == 0, result.stderr
    assert "used as class names" in result.stderr
    latest = tmp_path / "runs" / "own_teacher" / "latest"
    assert (latest / "class_labels_indices.csv").read_text().splitlines()[1:] == ['0,"","0"', '1,"","3"', '2,"","6"']
    assert (latest / "results.json").is_file()


def test_cross_entropy_with_several_labels_a_clip_is_refused_with_the_rows(tmp_path):
    manifest = write_pack(tmp_path / "pack", [noise(0.5, 16000, i) for i in range(4)], ["a", "a;b", "b", "b;a"])
    words = [word for key in ("train_data", "valid_data", "eval_data") for word in (f"--{key}", manifest)]
    result = run_command(
        "run.py", "train", TEACHER, *words, "--loss", "CrossEntropyLoss", "--outputpath", tmp_path / "r"
    )
    assert result.returncode == 1
    assert "2 of the 4 clips" in result.stderr
    assert "row 2 (1.wav: a;b), row 4 (3.wav: b;a)" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "r").exists()


def test_arguments_of_the_files_own_model_are_left_out_for_another(tmp_path, caplog):
    path = tmp_path / "c.yaml"
    settings = {
        "train_data": "a.tsv",
        "model": "audiotransformer_pico",
        "model_args": {"pooling": "logit", "n_mels": 40},
    }
    path.write_text(yaml.safe_dump(settings))
    caplog.set_level("INFO")
    faults = Faults("the test")
    config = read_train_config(path, {"model": "mn02_as", "model_args.width": 0.3}, faults)
    assert config.model_args == {"n_mels": 40, "width": 0.3}
    assert "audiotransformer_pico that mn02_as does not take are left out: pooling" in caplog.text
    unknown = read_train_config(path, {"model": "mn02_as", "model_args.poling": "x"}, faults)
    assert unknown.model_args["poling"] == "x"  # what is given there is told where the model is built


def test_prepared_configurations_carry_no_auto(tone_pack, tmp_path, monkeypatch):
    monkeypatch.setattr("training.prepare.time_run", lambda *_: Timing(0.1, 0.1))
    for key in ("epochs", "valid_every", "warmup_epochs"):
        changes = {"budget": None} if key == "epochs" else {}
        run = prepared(tone_pack, tmp_path / key, **{key: 3}, **changes).run
        assert getattr(run.config, key) == 3
    with pytest.raises(UserError, match="mixup is auto"):
        prepared(tone_pack, tmp_path / "mixup", mixup="auto")
    assert prepare.list_automatic_keys({"model_args": {"auto": True}, "loss": "auto", "epochs": 3}) == [
        "model_args",
        "loss",
    ]


def test_a_budget_and_a_number_of_epochs_are_too_much(tone_pack, tmp_path):
    with pytest.raises(UserError, match="budget chooses the number of epochs, but epochs is 3"):
        prepared(tone_pack, tmp_path, epochs=3)
