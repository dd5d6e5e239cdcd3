"""Mistakes around labels, lists, masks, presets and budgets: the command, and the sentence that must come."""

import sys
from pathlib import Path

import pytest

import save_logits
from common.commands import run_commands
from run import Runner
from scripts import baseline as baseline_command
from scripts import make_lists as lists_command
from tests.training.test_automatic import noise, write_pack

ROOT = Path(__file__).resolve().parent.parent
TEACHER = str(ROOT / "trainconfig" / "own_teacher.yaml")


@pytest.fixture(scope="module")
def packs(tmp_path_factory) -> dict[str, str]:
    """Manifests of clips of 0.4 s: one label each, several, numbers, one class alone, other classes, none."""
    folder = tmp_path_factory.mktemp("packs")
    labels = {
        "single": ["dog", "cat"] * 4,
        "several": ["dog", "dog;cat"] * 4,
        "alone": ["dog"] * 8,
        "other": ["dog", "Cat"] * 4,
        "empty": ["dog", ""] * 4,
    }
    sounds = [noise(0.4, 16000, i) for i in range(8)]
    manifests = {name: str(write_pack(folder / name, sounds, cells)) for name, cells in labels.items()}
    unlabelled = Path(manifests["single"]).with_name("unlabelled.tsv")
    rows = [line.split("\t") for line in Path(manifests["single"]).read_text().splitlines()]
    unlabelled.write_text("\n".join(f"{name}\t{shard}" for name, _, shard in rows) + "\n")
    unpacked = folder / "list.tsv"
    unpacked.write_text("filename\tlabels\na.wav\tdog\n")
    return manifests | {"unlabelled": str(unlabelled), "unpacked": str(unpacked)}


def train(packs: dict[str, str], outputpath: Path, data: str = "single", **changes) -> None:
    given = {"train_data": packs[data], "valid_data": packs["single"], "eval_data": packs["single"]}
    given |= {"outputpath": str(outputpath), "num_workers": 0, "epochs": 1} | changes
    given = {key: value for key, value in given.items() if value is not None}
    Runner(seed=1).train(given.pop("config", TEACHER), **given)


MISTAKES = {
    "a loss for one label a clip": (
        {"data": "several", "loss": "CrossEntropyLoss"},
        ["exactly one label a clip", "4 of the 8 clips", "row 2 (1.wav: dog;cat)", "BCEWithLogitsLoss"],
    ),
    "one class alone": ({"data": "alone", "valid_data": "null", "valid_fraction": 0.2}, ["every clip 'dog'"]),
    "a class spelt otherwise in another list": (
        {"eval_data": "other"},
        ["row 2 (1.wav): 'Cat' is no class (did you mean 'cat'?)"],
    ),
    "a clip without a label": ({"data": "empty"}, ["row 2 (1.wav): no label"]),
    "a list without labels": ({"data": "unlabelled"}, ["missing 'labels'"]),
    "a list that is not packed": ({"data": "unpacked"}, ["is not packed yet", "wavlist_to_hdf5.py"]),
    "a list that is not there": ({"valid_data": "nowhere.tsv"}, ["nowhere.tsv does not exist", "wavlist_to_hdf5.py"]),
    "a mask that is longer than the clips": (
        {"spectransforms": [{"TimeMasking": {"time_mask_param": 96}}]},
        ["0.96 s", "0.41 s", "max_share: 0.2"],
    ),
    "a share that is none": (
        {"spectransforms": [{"TimeMasking": {"time_mask_param": 96, "max_share": 20}}]},
        ["max_share", "0 to 1"],
    ),
    "auto where nothing chooses": ({"mixup": "auto"}, ["mixup says auto, which only model,"]),
    "auto misspelt": ({"epochs": "aut"}, ["epochs is 'aut'"]),
    "a budget that is none": ({"budget": "ten", "epochs": None}, ["budget is 'ten'", "10m, 2h or 90s"]),
    "a budget beside a number of epochs": ({"budget": "10m", "epochs": 3}, ["budget chooses the number of epochs"]),
    "a budget for a file without auto": (
        {"config": str(ROOT / "trainconfig" / "demo_teacher.yaml"), "budget": "10m", "epochs": None},
        ["budget chooses the number of epochs, but epochs is 25"],
    ),
    "two ways to validate": ({"valid_fraction": 0.1}, ["valid_data and valid_fraction are both given"]),
    "a model that is none": ({"model": "resnet11"}, ["no model is called 'resnet11' (did you mean 'resnet10'?)"]),
    "an argument of another model": ({"model_args.patch_stride": 8}, ["unknown argument 'patch_stride'"]),
    "a checkpoint that says nothing": ({"model": "nothing.pt"}, ["nothing.pt"]),
}


@pytest.mark.parametrize(("changes", "parts"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_in_training_is_answered_by_a_sentence_and_writes_nothing(changes, parts, packs, tmp_path, capsys):
    changes = dict(changes)
    for key in ("eval_data", "valid_data"):
        if changes.get(key) in packs:
            changes[key] = packs[changes[key]]
    with pytest.raises(SystemExit) as stopped:
        train(packs, tmp_path / "runs", **changes)
    assert stopped.value.code == 1
    said = capsys.readouterr().err
    for part in parts:
        assert part in said, said
    assert "Traceback" not in said
    assert not (tmp_path / "runs").exists()


def test_soft_targets_with_masks_longer_than_the_clips_are_refused(packs, tmp_path, capsys):
    with pytest.raises(SystemExit):
        save_logits.save_logits(
            str(ROOT / "logitconfig" / "balanced_base_chunk10s_topk20.yaml"),
            train_data=packs["single"],
            model="resnet10_small",
            outputpath=str(tmp_path),
        )
    said = capsys.readouterr().err
    assert "1.92 s" in said
    assert "max_share: 0.2" in said


def test_clips_that_are_learnt_from_and_judged_by_are_said(packs, tmp_path, capsys):
    train(packs, tmp_path / "runs", baseline=False, **{"model_args.width": 4})
    said = capsys.readouterr().err
    assert "8 clips are in" in said
    assert "figures are then too good" in said


def run_lists(monkeypatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["make_lists.py", *words])
    run_commands(lists_command.make_lists, as_text=True)


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["nowhere"], "nowhere"),
        (["sounds", "--pattern", "{speaker}.wav"], "{label}"),
        (["sounds", "--pattern", "{label}-{speaker}.wav"], "a_1.wav"),
        (["sounds", "--valid", "0.6", "--test", "0.5"], "0.6"),
        (["sounds", "--vald", "0.1"], "did you mean"),
        (["sounds", "--pattern", "{label}_{take}.wav", "--group", "tak"], "take"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_in_lists_are_answered_by_a_sentence(words, part, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a_1", "a_2", "b_1", "b_2"):
        (tmp_path / "sounds").mkdir(exist_ok=True)
        (tmp_path / "sounds" / f"{name}.wav").write_bytes(name.encode())
    with pytest.raises(SystemExit) as stopped:
        run_lists(monkeypatch, *words)
    assert stopped.value.code not in (0, None)
    said = capsys.readouterr().err
    assert part in said, said
    assert "Traceback" not in said
    assert not (tmp_path / "data").exists()


def test_a_baseline_of_clips_without_labels_is_a_sentence(packs, capsys):
    with pytest.raises(SystemExit):
        baseline_command.main(["--train_data", packs["unlabelled"], "--test_data", packs["single"]])
    assert "missing 'labels'" in capsys.readouterr().err
