"""What a MODEL on a command line is where it is none: a run that is not finished, a file of another kind."""

from pathlib import Path

from common.errors import did_you_mean, some
from common.places import describe_elsewhere
from models.registry import list_models

ONNX = ".onnx"
# The first bytes of files that are taken for checkpoints by mistake.
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


def describe_missing(source: str) -> str:
    """Return a sentence on a model that is neither a name nor a path that exists, with the way out."""
    path = Path(source)
    if path.name == "latest" and path.parent.is_dir():
        return _describe_unfinished(path)
    near = did_you_mean(source, list_models())
    for part in (path, path.parent):  # of experiments/own_techer/latest
        if not near and part.name and not part.exists() and part.parent.is_dir():
            near = did_you_mean(part.name, (each.name for each in part.parent.iterdir()))
    return f"{source}: no such file or folder, and no model of that name{near}{describe_elsewhere(path)}"


def describe_folder(folder: Path, found: list[str]) -> str:
    """Return a sentence on a folder of which no checkpoint can be chosen; `found` are its .pt files."""
    if (folder / "run.json").is_file() and not found:
        return (
            f"{folder} is a run without a checkpoint: it was stopped before its first evaluation, or is being trained "
            "now. Give the training command again, which goes on with it, or wait for its end"
        )
    if (folder / "latest").exists():
        return f"{folder} holds runs; give one of them, such as {folder / 'latest'}, the newest finished one"
    if unfinished := list(folder.glob("*/run.json")) or list(folder.glob("*/*/run.json")):
        return _describe_unfinished(unfinished[0].parent.with_name("latest"))
    return (
        f"{folder}: found {some(found) or 'no .pt files'}; wanted a run's folder with averaged.pt or best.pt, or a "
        "Hugging Face folder with config.json and model.safetensors"
    )


def _describe_unfinished(latest: Path) -> str:
    """Return a sentence on the link `latest` of a folder, or of the folder above it, in which no run is finished."""
    runs = sorted([*latest.parent.glob("*/run.json"), *latest.parent.glob("*/*/run.json")])
    if not runs:
        return (
            f"{latest}: no such folder, and {latest.parent} holds no run; `python run.py train CONFIG.yaml` makes one"
        )
    run = runs[-1].parent
    checkpoints = sorted(run.glob("*.pt"), key=lambda path: path.stat().st_mtime)
    now = f", or take what it has reached so far: {checkpoints[-1]}" if checkpoints else ""
    return (
        f"{latest} is there once a run is finished, and none in {latest.parent} is. Give the training command again, "
        f"which goes on with {run}{now}"
    )


def describe_onnx(path: str | Path) -> str:
    """Return a sentence on an exported file where a checkpoint is wanted."""
    return (
        f"{path} is an exported model, which tags (inference.py, run.py evaluate) and can do nothing else; give the "
        "checkpoint, run or name that it was exported from"
    )


def describe_kind(path: Path) -> str:
    """Return what a file is that is no checkpoint: "a sound file"; "" where its first bytes do not say it."""
    with open(path, "rb") as file:
        start = file.read(_FIRST_BYTES)
    for signature, kind in _SIGNATURES.items():
        if start.startswith(signature):
            return kind
    if not start:
        return "an empty file"
    whole = start if len(start) < _FIRST_BYTES else start[:-3]  # the last character may be cut
    try:
        return "" if "\0" in whole.decode("utf-8") else "a text file"
    except UnicodeDecodeError:
        return ""
