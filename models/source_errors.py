"""Error messages for a MODEL that cannot be loaded: a missing path, an unfinished run, a file of another kind."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from common.errors import did_you_mean, some
from common.places import describe_elsewhere
from models.registry import list_models

ONNX = ".onnx"
# First bytes of the files that are most often given in place of a checkpoint.
_SIGNATURES = {
    b"RIFF": "a sound file",
    b"RF64": "a sound file",
    b"fLaC": "a sound file",
    b"OggS": "a sound file",
    b"ID3": "a sound file",
    b"\x89HDF": "an HDF5 file, of packed sounds or of stored targets",
    b"PAR1": "a Parquet table",
    b"\x89PNG": "a picture",
    b"%PDF": "a PDF",
}
_FIRST_BYTES = 512
# Names of tensors of published networks, or what they begin with, in this project's names.
_TELLTALES = {
    "time_new_pos_embed": "PaSST",
    "time_pos_embed": "CED",
    "dist_token": "AST",
    "v.dist_token": "AST",
    "cls_token": "MATPAC or M2D, or of a ViT of images",
    "features.": "a MobileNetV3 or DyMN",
    "student_model.": "S-SONDO",
}


def describe_missing(source: str) -> str:
    """Return the message for a model that is neither a registered name nor an existing path."""
    path = Path(source)
    if path.name == "latest" and path.parent.is_dir():
        return _describe_unfinished(path)
    near = did_you_mean(source, list_models())
    for part in (path, path.parent):  # the typo in experiments/own_techer/latest is in the parent
        if not near and part.name and not part.exists() and part.parent.is_dir():
            near = did_you_mean(part.name, (each.name for each in part.parent.iterdir()))
    return f"{source}: no such file or folder, and no model of that name{near}{describe_elsewhere(path)}"


def describe_folder(folder: Path, found: list[str]) -> str:
    """Return the message for a folder in which no checkpoint can be chosen; `found` are its .pt files."""
    if (folder / "run.json").is_file() and not found:
        return (
            f"{folder} is a run without a checkpoint: it was stopped before its first evaluation, or is still "
            "training. Repeat the training command, which resumes it, or wait until it has finished"
        )
    if (folder / "latest").exists():
        return f"{folder} contains runs; give one of them, such as {folder / 'latest'}, the newest finished one"
    if unfinished := list(folder.glob("*/run.json")) or list(folder.glob("*/*/run.json")):
        return _describe_unfinished(unfinished[0].parent.with_name("latest"))
    return (
        f"{folder}: found {some(found) or 'no .pt files'}; expected a run's folder with averaged.pt or best.pt, or a "
        "Hugging Face folder with config.json and model.safetensors"
    )


def _describe_unfinished(latest: Path) -> str:
    """Return the message for a link `latest` that does not exist since no run beside it has finished."""
    runs = sorted([*latest.parent.glob("*/run.json"), *latest.parent.glob("*/*/run.json")])
    if not runs:
        return (
            f"{latest}: no such folder, and {latest.parent} contains no run; start one with "
            "`python run.py train CONFIG.yaml`"
        )
    run = runs[-1].parent
    checkpoints = sorted(run.glob("best_epoch=*.pt"))  # by epoch, not by time: clocks may be set back
    now = f", or use its newest checkpoint: {checkpoints[-1]}" if checkpoints else ""
    return (
        f"{latest} is created when a run finishes, and no run in {latest.parent} has. Repeat the training command, "
        f"which resumes {run}{now}"
    )


def describe_onnx(path: str | Path) -> str:
    """Return the message for an exported file where a checkpoint is expected."""
    return (
        f"{path} is an exported model, which can only tag (inference.py, run.py evaluate); give the checkpoint, run or "
        "name that it was exported from"
    )


def describe_network(state: Mapping[str, Tensor]) -> str:
    """Return the network that a state dict is of, such as "PaSST"; "" where it is not recognised."""
    known = (kind for start, kind in _TELLTALES.items() if any(name.startswith(start) for name in state))
    kind = next(known, "")
    patches = state.get("patch_embed.proj.weight")
    is_high = patches is not None and patches.ndim == 4 and patches.shape[2] != patches.shape[3]
    return "Dasheng" if kind == "CED" and is_high else kind


def describe_kind(path: Path) -> str:
    """Return the kind of a file that is no checkpoint, such as "a sound file"; "" where it is not recognised."""
    with open(path, "rb") as file:
        start = file.read(_FIRST_BYTES)
    for signature, kind in _SIGNATURES.items():
        if start.startswith(signature):
            return kind
    if not start:
        return "an empty file"
    text = start if len(start) < _FIRST_BYTES else start[:-3]  # the last UTF-8 character may be cut
    try:
        return "" if "\0" in text.decode("utf-8") else "a text file"
    except UnicodeDecodeError:
        return ""
