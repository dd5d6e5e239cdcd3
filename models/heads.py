"""Saving and loading of heads, and attaching them to models.

A head's file is a `torch.save` of {"head": state dict, "config": dict} that contains tensors and plain values only.
"""

import logging
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from common.errors import UserError, did_you_mean, some
from common.files import whole_file
from models.base import Activation, AudioTagger
from models.description import FORMAT_VERSION, restore_head
from models.downloads import download
from models.head_inputs import measure_layers
from models.headed import Head, HeadedTagger
from models.loading import load_model, weights_hash
from models.source_errors import describe_onnx
from models.tensor_files import read_tensors

logger = logging.getLogger(__name__)

FOLDER = "heads"
_PUBLISHED_URL = "https://huggingface.co/mohammedali2501/ssondo/resolve/main/heads"
_PUBLISHED_MODEL = "matpac-mobilenetv3"
_PUBLISHED_WIDTH = 960
# name -> kind of classes, number of classes, activation
PUBLISHED: dict[str, tuple[str, int, Activation]] = {
    "esc50": ("environmental sounds", 50, "softmax"),
    "us8k": ("urban sounds", 10, "softmax"),
    "fsd50k": ("sound events", 200, "sigmoid"),
    "gtzan": ("music genres", 10, "softmax"),
    "openmic": ("instruments", 20, "sigmoid"),
    "nsynth": ("instrument families", 11, "softmax"),
    "magna-tag-a-tune": ("music tags", 50, "sigmoid"),
}


def weights_sha256(model: AudioTagger) -> str:
    """Return the SHA-256 of the weights that determine a model's embeddings.

    The last layer or head (classes only) and the front-end (determined by the settings) are excluded.
    """
    if isinstance(model, HeadedTagger):
        return weights_sha256(model.model)
    return weights_hash(model, ("front_end.", f"{model.last_layer}."))


def save_head(path: str | Path, head: Head) -> None:
    """Write a head and its config atomically.

    Raises:
        UserError: its facts contain values that cannot be read back safely.
    """
    config = {"format_version": FORMAT_VERSION, **head.config()}
    with whole_file(path) as file:
        torch.save({"head": head.state_dict(), "config": config}, file)
        file.finish()
        read_tensors(file.path)  # raises where a fact could not be loaded again


def load_head(name_or_path: str | Path, folder: str | Path = FOLDER) -> Head:
    """Read a head.

    Args:
        name_or_path: a name in `folder`, a published name (downloaded once and cached), or a file.
        folder: of the saved heads.

    Returns:
        The head, in evaluation mode.

    Raises:
        UserError: an unknown name, or a file that is no head.
    """
    name, saved = str(name_or_path), Path(folder) / f"{name_or_path}.pt"
    if saved.is_file():
        return _read_head(saved)
    if name in PUBLISHED:
        return _read_published_head(download(f"{_PUBLISHED_URL}/{name}.pth", f"ssondo_head_{name}.pth"), name)
    if not Path(name).is_file():
        known = list_heads(folder)
        raise UserError(
            f"no head is called {name!r}{did_you_mean(name, known)}, and there is no such file; "
            f"known are {some(known, 99)}; train one with `run.py probe`"
        )
    if Path(name).suffix == ".pth" and Path(name).stem in PUBLISHED:
        return _read_published_head(Path(name), Path(name).stem)
    return _read_head(Path(name))


def list_heads(folder: str | Path = FOLDER) -> dict[str, str]:
    """Return all heads: name -> description, those saved in `folder` before the published ones."""
    heads: dict[str, str] = {}
    for path in sorted(Path(folder).glob("*.pt")):
        try:
            heads[path.stem] = _describe_head(_read_head(path))
        except UserError as error:
            heads[path.stem] = f"cannot be used: {error}"
    for name, (what, num_classes, _) in PUBLISHED.items():
        heads.setdefault(name, f"{num_classes} classes of {what}, published for {_PUBLISHED_MODEL}")
    return heads


def _describe_head(head: Head) -> str:
    facts, words = head.facts, f"{head.num_classes} classes"
    if isinstance(facts.get("value"), int | float):
        words += f", {facts.get('metric') or 'score'} {facts['value']:.3f}"
    if facts.get("data"):
        words += f" on {facts['data']}"
    return words + (f", for {facts['model']}" if facts.get("model") else "")


def _read_head(path: Path) -> Head:
    content = read_tensors(path)
    config, state = content.get("config"), content.get("head")
    if not isinstance(config, dict) or not isinstance(state, dict) or not _holds_tensors(state):
        raise UserError(f"{path}: found entries {some(map(str, content))}; expected a head, with 'head' and 'config'")
    return restore_head(config, state, str(path))


def _holds_tensors(state: dict[Any, Any]) -> bool:
    return all(isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items())


def _read_published_head(path: Path, name: str) -> Head:
    """Read a head of S-SONDO's release: one linear layer on unscaled embeddings of clips that are padded to 10 s."""
    what, num_classes, activation = PUBLISHED[name]
    head = Head(_PUBLISHED_WIDTH, num_classes, activation=activation)
    state = read_tensors(path)
    try:
        tensors = {part: state[f"probe.linear_probe.{part}"] for part in ("weight", "bias")}
        cast(nn.Linear, head.layers[0]).load_state_dict(tensors, strict=True)
    except (AttributeError, KeyError, RuntimeError) as error:
        raise UserError(f"{path}: is not the published head {name!r} ({error}): delete the file") from error
    head.padded = True
    head.facts = {"name": name, "model": _PUBLISHED_MODEL, "data": what}
    return head.eval()


def check_fit(model: AudioTagger, head: Head) -> None:
    """Check that a head fits a model's embeddings; warn where it was trained on those of other weights.

    Raises:
        UserError: the widths differ.
    """
    trained_on = head.facts.get("model")
    hint = f"; it was trained on {trained_on!r}" if trained_on else ""
    if head.read_layers:
        model.check_layers(head.read_layers)
        widths = measure_layers(model)
        if list(head.widths) != [widths[layer] for layer in head.read_layers]:
            raise UserError(
                f"the head takes layers {some(map(str, head.read_layers))} of widths {some(map(str, head.widths))}, "
                f"those of {model.name!r} have others{hint}"
            )
    elif head.embed_dim != model.embed_dim:
        raise UserError(
            f"the head takes embeddings of width {head.embed_dim}, those of {model.name!r} have {model.embed_dim}{hint}"
        )
    sha = head.facts.get("weights_sha256")
    if sha is not None and sha != weights_sha256(model):
        logger.warning("the head was trained on other weights (of %s) than these of %s", trained_on, model.name)
    elif sha is None and trained_on not in (None, model.name):
        logger.warning("the head was trained on %s, not on %s", trained_on, model.name)


def load_tagger(
    source: str | Path,
    *,
    head: str | Path | None = None,
    weights: str | Path | None = None,
    device: str | torch.device = "cpu",
    token_merging: Any = None,
    **arguments: Any,
) -> AudioTagger:
    """Load a model and attach a head: the meaning of `-m MODEL --head NAME` in every command.

    Args:
        source: see `models.load_model`.
        head: see `load_head`; None for the classes of the model.
        weights: see `models.load_model`.
        device: of the model.
        token_merging: see `models.token_merging.merging_schedule`; by default that of the model.
        **arguments: settings that override those of the checkpoint.

    Returns:
        The model, in evaluation mode.

    Raises:
        UserError: a model or a head that cannot be loaded, or that do not fit together.
    """
    if str(source).lower().endswith(".onnx"):
        if head is None:
            raise UserError(describe_onnx(source))
        raise UserError(f"{source} has no embeddings for --head; give a model's name, a checkpoint or a folder")
    loaded_head = None if head is None else load_head(head)
    model = load_model(source, weights=weights, device=device, **arguments)
    if token_merging is not None:
        model.merge_tokens(token_merging)
    return model if loaded_head is None else attach_head(model, loaded_head)


def check_classes(model: AudioTagger, source: str | Path) -> None:
    """Check that a model has classes.

    Args:
        model: to check.
        source: as the user gave it, for the message.

    Raises:
        UserError: it only embeds.
    """
    if not model.num_classes:
        raise UserError(
            f"{source}: {model.name} only embeds and has no classes; train a head on its embeddings with "
            f"`python run.py probe {source} --data PACK.tsv --name NAME`, and give --head NAME"
        )


def attach_head(model: AudioTagger, head: Head) -> HeadedTagger:
    """Attach a head to a model, on the model's device, and replace the head that it may have; see `check_fit`.

    Returns:
        Both, in evaluation mode.
    """
    model = model.model if isinstance(model, HeadedTagger) else model
    check_fit(model, head)
    return HeadedTagger(model, head.to(next(model.parameters()).device)).eval()
