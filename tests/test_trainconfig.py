"""The files of trainconfig/: the parts of their heads, and a run of each without data."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from audio.dataset import Pack
from common.errors import Faults
from distill.objectives import plan_objective
from models import load_model
from run import Runner
from tests.conftest import run_command
from training.automatic import read_train_config
from training.config import TrainConfig

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted((ROOT / "trainconfig").glob("*.yaml"))
PUBLISHED = [path for path in CONFIGS if "nsemble5014" in path.name]
FIELD = re.compile(r"# ([A-Z][a-z]+): +(\S.*)")
every_file = pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)


def read(path: Path) -> TrainConfig:
    faults = Faults(path.name)
    config = read_train_config(path, {}, faults)
    faults.raise_if_any()
    assert config is not None
    return config


def head(path: Path) -> list[str]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return lines[: next(number for number, line in enumerate(lines) if not line.startswith("#"))]


@every_file
def test_the_head_has_command_requirements_and_figures(path):
    lines = head(path)
    assert re.fullmatch(r"# [A-Z].*\.", lines[0])
    fields = dict(match.groups() for line in lines if (match := FIELD.fullmatch(line)))
    assert {"Command", "Needs", "Measured"} <= fields.keys()
    assert {"Reproduces", "For"} & fields.keys()
    assert f"python run.py train trainconfig/{path.name}" in "\n".join(lines)
    measured = "\n".join(lines).split("Measured:")[1]
    if "not measured here" not in measured:
        assert re.search(r"\d\d\d\d-\d\d-\d\d", measured)
        assert "CPU cores" in measured or "GPU" in measured
        assert re.search(r"\d\.\d", measured)


@every_file
def test_every_file_sets_what_chooses_its_checkpoints(path):
    config = read(path)
    if config.embeddingspath or plan_objective(config.objective).needs.targets == "none":
        # without validation: run.py probe evaluates it
        assert config.select_on is None
    elif path in PUBLISHED or (re.search(r"esc\d0", path.stem) and not path.stem.startswith("ssondo")):
        assert config.select_on == "eval"
    else:
        assert config.select_on == "valid"
    if config.select_on == "eval":
        text = path.read_text(encoding="utf-8")
        assert re.search(r"^#.*(optimistic|chooses nothing).*\n(#.*\n)?select_on: eval$", text, re.MULTILINE)


def check_run(outputs: Path, config: TrainConfig) -> None:
    """See that the one run in `outputs` left weights that give probabilities for a made-up sound."""
    (folder,) = (link.parent for link in outputs.rglob("finished.json") if link.parent.name != "latest")
    model = load_model(folder)
    assert model.name == config.model
    if not config.eval_data and not config.valid_data and not config.valid_fraction:
        assert model.num_classes == 0
        clip, _ = model.embed(torch.rand(2, model.sample_rate))
        assert bool(clip.isfinite().all())
        assert bool(clip.any())
        return
    assert (folder / "results.json").is_file() == bool(config.eval_data)
    pack = Pack.open(next(outputs.rglob("data/labels/train.tsv")))
    with torch.inference_mode():
        probabilities = model.predict(torch.from_numpy(np.stack([pack.read(i) for i in range(4)])))
    assert probabilities.shape == (4, config.num_classes or (527 if config.logitspath else 10))
    assert bool(torch.isfinite(probabilities).all())
    assert 0 <= probabilities.min() <= probabilities.max() <= 1


# Of files that differ in the size of the student alone, one is enough for every day.
TWINS = re.compile(
    r"(balanced_mixup_(mini|small|base)|full_audiotransformer_(mini|small|base))_.*|.*_cmkd_passt|quantized_(audioset|esc10).*|matpac_audioset|matpac_own"
)


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=[pytest.mark.long] if TWINS.fullmatch(path.stem) else [], id=path.stem)
        for path in CONFIGS
    ],
)
def test_every_file_runs_from_start_to_end_without_data(path, tmp_path, monkeypatch):
    config = read(path)
    # Twelve blocks of the larger models differ from one in nothing but their time, nor does their width; those of tiny
    # are all run. AST fills the made-up clips up to a thousand tokens and more.
    deep = config.model.startswith("audiotransformer") and config.model.endswith(("_base", "_small", "_mini"))
    shallow = {"model_args.depth": 1} if deep else {}
    if config.model.startswith(("ast_", "matpac")):
        shallow |= {"model_args.embed_dim": 64, "model_args.num_heads": 1, "model_args.depth": 1}
    if config.model.startswith(("efficientnet_", "resnet50_")):
        shallow |= {"model_args.n_mels": 32}
    monkeypatch.chdir(tmp_path)  # where no data/ and logits/ can be
    Runner(seed=1).train(str(path), smoke=True, outputpath=str(tmp_path / "runs"), **shallow)
    check_run(tmp_path / "runs", config)


@pytest.mark.parametrize(
    ("changes", "n_classes"),
    [
        ({"model": "mobilenetv3", "pretrained": False}, 0),
        ({"objective_args.lambda": 0.5}, 10),
        ({"model": "mobilenetv3", "pretrained": False, "objective_args.lambda": 0.5, "loss": "BCEWithLogitsLoss"}, 10),
    ],
    ids=["student", "labels", "both"],
)
def test_the_variants_of_ones_own_embedder_run_as_in_its_head(changes, n_classes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = ROOT / "trainconfig" / "own_embedder.yaml"
    Runner(seed=1).train(str(path), smoke=True, outputpath=str(tmp_path / "runs"), **changes)
    (folder,) = (link.parent for link in tmp_path.rglob("finished.json") if link.parent.name != "latest")
    model = load_model(folder)
    assert (model.name, model.num_classes) == (changes.get("model", "resnet10"), n_classes)


def test_the_command_of_a_head_runs_with_smoke_as_a_user_types_it(tmp_path):
    """In a folder that looks like a fresh checkout, so that a developer's own data are not in it."""
    for name in ("run.py", "trainconfig"):
        (tmp_path / name).symlink_to(ROOT / name)
    name = "trainconfig/own_student.yaml"
    result = run_command("run.py", "train", name, "--smoke", "true", "--outputpath", tmp_path / "runs", cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "next: python inference.py" in result.stdout
    assert "not found: data/mine/labels/train.tsv, " in result.stderr
    check_run(tmp_path / "runs", read(ROOT / name))
