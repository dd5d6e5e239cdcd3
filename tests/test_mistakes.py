"""Mistakes of the first hours: the command, and the sentence that must come."""

import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile as sf
import torch
import yaml

import save_logits
from common.errors import Faults
from common.places import describe_elsewhere
from models import create_model, save_checkpoint
from run import Runner
from scripts import baseline as baseline_command
from scripts import make_lists as lists_command
from tests.training.test_automatic import noise, write_pack
from training.config import SoftTargetConfig
from training.settings import check_settings

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
    "one class alone": ({"data": "alone", "valid_data": "null", "valid_fraction": 0.2}, ["has the one class 'dog'"]),
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
    "auto where nothing chooses": ({"mixup": "auto"}, ["mixup is auto, which is supported only for model,"]),
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
def test_a_mistake_in_training_ends_with_a_message_and_writes_nothing(changes, parts, packs, tmp_path, capsys):
    changes = dict(changes)
    for key in ("eval_data", "valid_data"):
        if changes.get(key) in packs:
            changes[key] = packs[changes[key]]
    with pytest.raises(SystemExit) as stopped:
        train(packs, tmp_path / "runs", **changes)
    assert stopped.value.code == 1
    message = capsys.readouterr().err
    for part in parts:
        assert part in message, message
    assert "Traceback" not in message
    assert not (tmp_path / "runs").exists()


def test_soft_targets_with_masks_longer_than_the_clips_are_refused(packs, tmp_path, capsys):
    with pytest.raises(SystemExit):
        save_logits.save_logits(
            str(ROOT / "logitconfig" / "balanced_base_chunk10s_topk20.yaml"),
            train_data=packs["single"],
            model="resnet10_small",
            outputpath=str(tmp_path),
        )
    message = capsys.readouterr().err
    assert "1.92 s" in message
    assert "max_share: 0.2" in message


def test_clips_that_are_in_two_sets_are_reported(packs, tmp_path, capsys):
    train(packs, tmp_path / "runs", baseline=False, **{"model_args.width": 4})
    message = capsys.readouterr().err
    assert "8 clips are both in" in message
    assert "so metrics on the latter are too good" in message


def run_lists(monkeypatch, *words: str) -> None:
    lists_command.main([*words])


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
def test_mistakes_in_lists_end_with_a_message(words, part, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a_1", "a_2", "b_1", "b_2"):
        (tmp_path / "sounds").mkdir(exist_ok=True)
        (tmp_path / "sounds" / f"{name}.wav").write_bytes(name.encode())
    with pytest.raises(SystemExit) as stopped:
        run_lists(monkeypatch, *words)
    assert stopped.value.code not in (0, None)
    message = capsys.readouterr().err
    assert part in message, message
    assert "Traceback" not in message
    assert not (tmp_path / "data").exists()


def test_a_baseline_of_clips_without_labels_is_a_sentence(packs, capsys):
    with pytest.raises(SystemExit):
        baseline_command.main(["--train_data", packs["unlabelled"], "--test_data", packs["single"]])
    assert "missing 'labels'" in capsys.readouterr().err


# ---------------------------------------------------------------- whole commands, as they are typed

PROBE = "run.py probe model.pt --test_data single.tsv"
# command, parts of the sentence that must come
COMMANDS = {
    # --- the command line itself
    "a command that is none": ("run.py evaluat model.pt", ["no command 'evaluat' (did you mean 'evaluate'?)"]),
    "no configuration": ("run.py train", ["CONFIG_FILE is not given", "python run.py train CONFIG_FILE"]),
    "a key without dashes": ("run.py train mine.yaml epochs=3", ["'epochs=3'", "did you mean --epochs 3?"]),
    "a word too many": ("run.py evaluate model.pt single.tsv more", ["'more' is not an argument"]),
    "a seed in words": ("run.py --seed one train mine.yaml", ["--seed is 'one'; expected a whole number"]),
    "a key without a value": ("run.py train mine.yaml --epochs", ["epochs", "without a value"]),
    "an option without a value": ("run.py evaluate model.pt --test_data", ["--test_data is given without a value"]),
    "clips at once in words": (
        "run.py evaluate model.pt single.tsv --batch_size many",
        ["'many'; expected whole number"],
    ),
    "no clips at once": ("run.py evaluate model.pt single.tsv --batch_size 0", ["batch_size is 0", "at least 1"]),
    "an unknown option": ("run.py evaluate model.pt --tst_data single.tsv", ["--tst_data (did you mean 'test_data'?)"]),
    "nothing to evaluate": ("run.py evaluate", ["give a run's folder, a checkpoint or a model's name"]),
    "a precision that is none": ("run.py evaluate model.pt single.tsv --mode fp8", ["mode is 'fp8'", "bf16"]),
    "a device that is none": ("run.py evaluate model.pt single.tsv --device gpu", ["use auto, cpu or cuda"]),
    # --- keys of a configuration
    "lr": ("run.py train mine.yaml --lr 0.1", ["unknown key 'lr' (did you mean 'optimizer_args.lr'?)"]),
    "learning_rate": ("run.py train mine.yaml --learning_rate 1", ["did you mean 'optimizer_args.lr'?"]),
    "weight_decay": ("run.py train mine.yaml --weight_decay 0.1", ["did you mean 'optimizer_args.weight_decay'?"]),
    "an argument of the optimiser": (
        "run.py train mine.yaml --optimizer_args.l 1",
        ["AdamW has no argument 'l'", "'lr'"],
    ),
    "width": ("run.py train mine.yaml --width 8", ["unknown key 'width' (did you mean 'model_args.width'?)"]),
    "gpu": ("run.py train mine.yaml --gpu 0", ["unknown key 'gpu' (did you mean 'device'?)"]),
    "a negative batch": (
        "run.py train mine.yaml --batch_size -3",
        ["batch_size is -3", "expected whole number, at least 1"],
    ),
    "an optimiser misspelt": ("run.py train mine.yaml --optimizer Adm", ["SGD (did you mean 'Adam'?)"]),
    "a transform without arguments": (
        "run.py train mine.yaml --wavtransforms none",
        ["expected mapping {NAME: VALUE}"],
    ),
    "a transform that is none": ("run.py train mine.yaml --wavtransforms.Shft {}", ["'Shft' (did you mean 'Shift'?)"]),
    "a model misspelt": ("run.py config mine.yaml --model resnet11", ["no model is called 'resnet11'", "'resnet10'"]),
    "a model of nonsense": ("run.py config mine.yaml --model nonsense", ["no model is called 'nonsense'; known are"]),
    "a key of the other command": ("run.py train mine.yaml --topk 5", ["'topk', which is a key of `save_logits.py`"]),
    "a file of the other command": ("save_logits.py mine.yaml", ["keys of `run.py train`", "give it to that command"]),
    # --- the configuration's file
    "a configuration that is not there": ("run.py train nowhere.yaml", ["does not exist (looked for in "]),
    "a configuration misspelt": ("run.py train own_techer", ["did you mean trainconfig/own_teacher.yaml or "]),
    "a list as a configuration": ("run.py train single.tsv", ["is a list of sounds", "trainconfig/own_teacher.yaml"]),
    "a folder as a configuration": (
        "run.py train ROOT/trainconfig",
        ["a folder; expected a file of it: ", "own_student.yaml"],
    ),
    "YAML with a hole": ("run.py train broken.yaml", ["it is no YAML: line ", "expected ',' or ']'"]),
    "YAML of another kind": ("run.py train list.yaml", ["holds list, not a mapping"]),
    "from another folder": (
        "run.py train trainconfig/own_teacher.yaml",
        ["data/mine/labels/train.tsv does not exist (lo"],
    ),
    # --- lists
    "a packed list without labels": (
        "run.py evaluate model.pt unlabelled.tsv",
        ["missing 'labels'. The list is packed, but"],
    ),
    "a column that is called otherwise": (
        "run.py evaluate model.pt label.tsv",
        ["(did you mean 'label'?)", "is packed"],
    ),
    "commas in a packed list": (
        "run.py evaluate model.pt single.csv",
        ["separated by ','", "tab-separated: give the one"],
    ),
    "a folder as a list": ("run.py evaluate model.pt .", ["is a folder; expected a packed list, such as "]),
    "a list misspelt": ("run.py evaluate model.pt singel.tsv", ["does not exist (did you mean 'single.tsv'?)"]),
    "a list of sounds that are not packed": (
        "run.py evaluate model.pt list.tsv",
        ["not packed yet", "wavlist_to_hdf5.py"],
    ),
    "a shard as a list": ("run.py train mine.yaml --train_data pack.h5", ["is no text"]),
    "other classes": (
        "run.py evaluate model.pt birds.tsv",
        ["none of the 8 rows has a known class: found crow, wren"],
    ),
    "other numbers of classes": (
        "run.py train mine.yaml --num_classes 5",
        ["num_classes is 5, but", "2 classes: cat, dog"],
    ),
    "numbers of classes of its own": (
        "run.py evaluate audioset.pt numbers.tsv",
        ["0 to 3", "0 is 'Speech'", "its own"],
    ),
    # --- models
    "a run that is not finished": (
        "run.py evaluate runs/mine/latest single.tsv",
        ["is created when a run finishes", "2026-01-01"],
    ),
    "runs of a configuration": (
        "run.py evaluate runs/done single.tsv",
        ["contains runs; give one of them", "runs/done/latest"],
    ),
    "a run without a checkpoint": (
        "run.py evaluate runs/mine/resnet10_small/2026-01-01_00-00-00_0 single.tsv",
        ["is a run without a checkpoint"],
    ),
    "a run misspelt": ("run.py evaluate runs/mien/latest single.tsv", ["no such file or folder", "'mine'"]),
    "a sound as a model": ("run.py evaluate sound.wav single.tsv", ["sound.wav is a sound file, not a checkpoint"]),
    "a configuration as a model": ("run.py evaluate mine.yaml single.tsv", ["is a text file, not a checkpoint"]),
    "a pack as a model": ("run.py evaluate pack.h5 single.tsv", ["is an HDF5 file, of packed sounds"]),
    "a name misspelt": ("run.py evaluate ced_tny single.tsv", ["no model of that name (did you mean 'ced_tiny'?)"]),
    "a head that is none": (
        "run.py evaluate model.pt single.tsv --head birds",
        ["no head is called 'birds'", "run.py probe"],
    ),
    "a head on an exported model": ("run.py evaluate model.onnx single.tsv --head birds", ["no embeddings"]),
    "weights that are exported": (
        "run.py train mine.yaml --pretrained model.onnx",
        ["is an exported model", "checkpoint"],
    ),
    "weights that are a sound": ("run.py train mine.yaml --weights sound.wav", ["is a sound file, not a checkpoint"]),
    "a teacher that is none": ("run.py train mine.yaml --teacher ced_bse", ["teacher: ced_bse", "'ced_base'"]),
    "a store that is none": (
        "run.py train mine.yaml --logitspath nowhere",
        ["nowhere is not a folder", "save_logits.py"],
    ),
    "a run as a store": (
        "run.py train mine.yaml --logitspath runs/done/latest",
        ["has no files logits_ep", "save_logits.py"],
    ),
    "one store twice": (
        "run.py train mine.yaml --objective cosine --embeddingspath here,here",
        ["embeddingspath lists here more than once; give each teacher's store once"],
    ),
    "a negative weight of a teacher": (
        "run.py train mine.yaml --objective cosine --teacher model.pt,audioset.pt --objective_args.weights 1,-1",
        ["weights is -1; expected a number of at least 0 for each teacher, [1, 2] for example"],
    ),
    "two weights of one teacher": (
        "run.py train mine.yaml --objective cosine --teacher model.pt --loss BCELoss --objective_args.weights 1,2",
        ["number of weights: 2, of teachers: 1; give one weight for each teacher"],
    ),
    "a run to go on with that is none": (
        "run.py train mine.yaml --resume nowhere",
        ["no run.json found; expected auto, never"],
    ),
    # --- probes and targets
    "a probe without labels": (
        f"{PROBE} --train_data unlabelled.tsv --name p",
        ["has no column 'labels'", "--label_column"],
    ),
    "a probe without a name": (f"{PROBE} --train_data single.tsv", ["--name is missing"]),
    "a probe without folds": (
        "run.py probe model.pt --data single.tsv --name p",
        ["no column 'fold'", "--fold_column"],
    ),
    "a probe on an exported model": (
        "run.py probe model.onnx --train_data single.tsv --name p",
        ["is an exported model"],
    ),
    "a probe's option misspelt": (
        f"{PROBE} --train_data single.tsv --name p --epoch 3",
        ["--epoch (did you mean 'epochs'?)"],
    ),
    "one length of windows to compare": (
        f"{PROBE} --train_data single.tsv --name p --temporal_support 1",
        ["--temporal_support compares lengths: give two or more, 0.25,0.5,1,2,5,10 for example"],
    ),
    "lengths of windows in words": (
        f"{PROBE} --train_data single.tsv --name p --temporal_support short,long",
        ["--temporal_support is 'short'; expected list of number, above 0"],
    ),
    "a probe's learning rate in words": (f"{PROBE} --train_data single.tsv --name p --lr fast", ["--lr is 'fast'"]),
    "targets of no classes": ("save_logits.py targets.yaml --topk 0", ["topk is 0"]),
    "targets of an unpacked list": ("save_logits.py targets.yaml --train_data list.tsv", ["not packed yet"]),
    "a second file for targets": ("save_logits.py targets.yaml mine.yaml", ["'mine.yaml' is not an argument"]),
    # --- tagging
    "threshold misspelt": (
        "inference.py sound.wav --treshold 0.5",
        ["unknown option --treshold (did you mean 'threshold'?)"],
    ),
    "a threshold above 1": (
        "inference.py sound.wav --threshold 5",
        ["--threshold is 5; expected number"],
    ),
    "windows of no length": ("inference.py sound.wav -c 0", ["--chunk_length is 0; expected number, above 0"]),
    "a folder without sounds": ("inference.py empty -m model.pt", ["the folder has no sound files"]),
    "a sound that is not there": ("inference.py nowhere.wav -m model.pt", ["no such file or folder"]),
    "a list in place of sounds": (
        "inference.py single.tsv -m model.pt",
        ["is a list or a pack", "give sound files or folders"],
    ),
    "no sounds": ("inference.py", ["no sounds"]),
    "a file that is not there": ("inference.py sound.wav -m nowhere.onnx", ["no such file; export_onnx.py writes one"]),
    "a network without weights": ("inference.py sound.wav -m resnet10", ["no published weights", "--weights PATH"]),
    "an output of no kind": (
        "inference.py sound.wav -m model.pt --output tags.txt",
        ["ends in .csv, .jsonl, .parquet"],
    ),
    "embeddings as a table": ("inference.py sound.wav -m model.pt --embeddings e.csv", ["ends in .h5, not e.csv"]),
    "merging without tokens": ("inference.py sound.wav -m model.pt --token_merging 8", ["has no tokens to merge"]),
    # --- exports and packs
    "an export of nothing": ("export_onnx.py -m nowhere.pt", ["no such file or folder"]),
    "an export of an export": ("export_onnx.py -m model.onnx", ["is an exported model"]),
    "a model without -m": ("export_onnx.py model.pt", ["'model.pt' belongs to no option; a model is given with -m"]),
    "no frames": ("export_onnx.py -m model.pt --max-frames 0", ["--max_frames is 0; expected whole number"]),
    "a precision too small": ("export_onnx.py -m model.pt --precision int4", ["--precision is 'int4'"]),
    "a folder to pack": (
        "scripts/wavlist_to_hdf5.py empty data",
        ["is a folder; expected a list of sounds", "make_lists.py"],
    ),
    "a list to pack that is not there": ("scripts/wavlist_to_hdf5.py nowhere.tsv data", ["no such file"]),
    "a list without names": (
        "scripts/wavlist_to_hdf5.py nameless.tsv data",
        ["missing 'filename' (did you mean 'name'?)"],
    ),
    "a list of sounds that are not there": (
        "scripts/wavlist_to_hdf5.py list.tsv data",
        ["a.wav: there is no such file"],
    ),
    "packs to nowhere": ("scripts/wavlist_to_hdf5.py list.tsv", ["OUTDIR is missing"]),
    "no samples a second": ("scripts/wavlist_to_hdf5.py list.tsv data --sample_rate 0", ["sample_rate 0", "above 0"]),
}

CONFIG = """
train_data: single.tsv
model: resnet10_small
model_args: {width: 4}
pretrained: false
loss: CrossEntropyLoss
optimizer: AdamW
num_workers: 0
epochs: 1
"""


@pytest.fixture(scope="module")
def work(packs, tmp_path_factory) -> Path:
    """A folder as a user may have it: lists, packs, configurations, a checkpoint, an export, runs."""
    folder = tmp_path_factory.mktemp("work")
    for name in ("single", "unlabelled"):
        shutil.copy(packs[name], folder / f"{name}.tsv")
    shutil.copy(packs["unpacked"], folder / "list.tsv")
    rows = [line.split("\t") for line in (folder / "single.tsv").read_text().splitlines()]
    shutil.copy(rows[1][2], folder / "pack.h5")
    (folder / "single.csv").write_text("".join(",".join(row) + "\n" for row in rows))
    for name, labels in {"birds": ["wren", "crow"], "numbers": ["0", "1", "2", "3"]}.items():
        cells = ["labels", *(labels[number % len(labels)] for number in range(8))]
        (folder / f"{name}.tsv").write_text(
            "".join(f"{row[0]}\t{cell}\t{row[2]}\n" for row, cell in zip(rows, cells, strict=True))
        )
    (folder / "label.tsv").write_text((folder / "single.tsv").read_text().replace("labels", "label", 1))
    (folder / "nameless.tsv").write_text("name\tlabels\na.wav\tdog\n")
    (folder / "mine.yaml").write_text(CONFIG)
    (folder / "targets.yaml").write_text("train_data: single.tsv\nmodel: model.pt\nspectransforms: null\n")
    (folder / "broken.yaml").write_text("train_data: [single.tsv\n")
    (folder / "list.yaml").write_text("- single.tsv\n")
    sf.write(folder / "sound.wav", noise(0.4, 16000, 0), 16000)
    (folder / "empty").mkdir()
    (folder / "empty" / "notes.txt").write_text("nothing")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = create_model("resnet10_small", labels=["cat", "dog"], activation="softmax", width=4)
        save_checkpoint(folder / "model.pt", model)
        save_checkpoint(folder / "audioset.pt", create_model("resnet10_small", width=4))
    (folder / "model.onnx").write_bytes(b"refused before it is read")
    run = folder / "runs" / "mine" / "resnet10_small" / "2026-01-01_00-00-00_0"
    done = folder / "runs" / "done" / "resnet10_small" / "2026-01-01_00-00-00_1"
    for path in (run, done):
        path.mkdir(parents=True)
        (path / "run.json").write_text("{}")
    (folder / "runs" / "done" / "latest").symlink_to("resnet10_small/2026-01-01_00-00-00_1")
    return folder


def give(command: str, work: Path, monkeypatch) -> None:
    """Run a command line in the folder `work`, as `python SCRIPT ...` does."""
    script, *words = shlex.split(command.replace("ROOT", str(ROOT)))
    monkeypatch.chdir(work)
    monkeypatch.setattr(sys, "argv", [script, *words])
    monkeypatch.setattr(sys, "path", list(sys.path))
    runpy.run_path(str(ROOT / script), run_name="__main__")


def files_below(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if not path.name.endswith(".lock")}


@pytest.mark.parametrize(("command", "parts"), COMMANDS.values(), ids=COMMANDS)
def test_a_mistaken_command_ends_with_a_message_and_writes_nothing(command, parts, work, capsys, monkeypatch):
    before = files_below(work)
    with pytest.raises(SystemExit) as stopped:
        give(command, work, monkeypatch)
    assert stopped.value.code in (1, 2)
    message = capsys.readouterr().err
    for part in parts:
        assert part in message, message
    assert "Traceback" not in message
    assert "weights_only" not in message  # PyTorch's advice to switch its safety off
    assert files_below(work) == before


@pytest.mark.parametrize("name", ["other classes", "other numbers of classes"])
def test_classes_that_all_differ_are_one_line(name, work, capsys, monkeypatch):
    with pytest.raises(SystemExit):
        give(COMMANDS[name][0], work, monkeypatch)
    assert capsys.readouterr().err.count("\n  - ") == 1


@pytest.mark.parametrize("off", ["0", "false", "null", "0.0"])
def test_augmentation_is_switched_off_by_what_means_off(off, work, capsys, monkeypatch):
    more = "" if off.startswith("0") else f" --wavtransforms {off} --spectransforms {off}"
    give(f"run.py config mine.yaml --mixup {off}{more}", work, monkeypatch)
    message = yaml.safe_load(capsys.readouterr().out)
    assert (message["mixup"], message["wavtransforms"], message["spectransforms"]) == (None, {}, [])
    config = check_settings(
        SoftTargetConfig,
        {"train_data": "a", "model": "b", "wavtransforms": None, "spectransforms": False},
        faults := Faults("targets"),
    )
    faults.raise_if_any()
    assert (config.wavtransforms, config.spectransforms) == ({}, [])


def test_a_command_of_another_folder_runs_there(tmp_path):
    words = [sys.executable, str(ROOT / "run.py"), "config", "trainconfig/own_embedder.yaml", "--sampler", "null"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout)["sampler"] is None


def test_what_is_meant_for_the_projects_folder_is_reported_with_its_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert describe_elsewhere("README.md") == f" (looked for in {tmp_path}; it is in {ROOT}: run the command there)"
    assert describe_elsewhere("nowhere.md") == f" (looked for in {tmp_path})"
    monkeypatch.chdir(ROOT)
    assert describe_elsewhere("nowhere.md") == ""


def test_classes_that_differ_by_case_alone_are_warned_of(packs, tmp_path, capsys):
    lines = Path(packs["single"]).read_text().splitlines()
    twice = tmp_path / "twice.tsv"
    twice.write_text("\n".join([*lines[:-1], lines[-1].replace("cat", "Cat")]) + "\n")
    with pytest.raises(SystemExit):
        train({**packs, "twice": str(twice)}, tmp_path / "runs", "twice", loss="nonsense")
    message = capsys.readouterr().err
    assert "'Cat' (1 clips) and 'cat' (3 clips)" in message
    assert "write them alike" in message


def test_a_folder_with_a_semicolon_in_its_name_is_reported(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a; b/1", "a; b/2", "c/1", "c/2"):
        (tmp_path / "sounds" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "sounds" / f"{name}.wav").write_bytes(name.encode())
    run_lists(monkeypatch, "sounds", "--output", "lists")
    message = capsys.readouterr().out
    assert "'a; b' (2 sounds: a;b); rename what is one label" in message
