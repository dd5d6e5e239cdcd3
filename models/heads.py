"""Small networks from embeddings to classes: built, saved, found again, and put onto a model.

A head's file is a `torch.save` of {"head": state dict, "config": dict} that holds tensors and plain values only.

Letters: B batch, S samples, F mel bands, T frames, C classes, E embedding width.
"""

import itertools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.errors import UserError, did_you_mean, some
from common.files import whole_file
from models.base import Activation, AudioTagger
from models.labels import labels_for
from models.loading import fetch, read_tensors, weights_hash

logger = logging.getLogger(__name__)

FOLDER = "heads"
FORMAT_VERSION = 1
_PUBLISHED_URL = "https://huggingface.co/mohammedali2501/ssondo/resolve/main/heads"
_PUBLISHED_MODEL = "matpac-mobilenetv3"
_PUBLISHED_WIDTH = 960
# name -> what it tells apart, classes, whether a clip has exactly one
PUBLISHED: dict[str, tuple[str, int, Activation]] = {
    "esc50": ("environmental sounds", 50, "softmax"),
    "us8k": ("urban sounds", 10, "softmax"),
    "fsd50k": ("sound events", 200, "sigmoid"),
    "gtzan": ("music genres", 10, "softmax"),
    "openmic": ("instruments", 20, "sigmoid"),
    "nsynth": ("instrument families", 11, "softmax"),
    "magna-tag-a-tune": ("music tags", 50, "sigmoid"),
}


class Head(nn.Module):
    """Classes from a clip's embedding: standardised, then one linear layer or several with ReLU between.

    Args:
        embed_dim: E.
        num_classes: C.
        hidden_sizes: widths of the hidden layers, none for a linear head.
        labels: names of the classes, by default their numbers.
        activation: "softmax" (exactly one class a clip) or "sigmoid" (any number).
        dropout: after each hidden layer.

    Attributes:
        facts: plain values that go into its file. Read here: "model", "weights_sha256" (what `weights_sha256` of this
            module says of the model), "metric", "value" and "data", of which `list_heads` makes a line.
        padded: it was trained on clips that zeros fill up to 10 s.

    Raises:
        UserError: a width below 1, another number of labels, or no such activation.
    """

    mean: Tensor
    scale: Tensor

    def __init__(
        self,
        embed_dim: int,
        num_classes: int,
        *,
        hidden_sizes: Sequence[int] = (),
        labels: list[str] | None = None,
        activation: Activation = "softmax",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        sizes = [embed_dim, *hidden_sizes, num_classes]
        if any(size < 1 for size in sizes):
            raise UserError(f"a head from {sizes[0]} over {sizes[1:-1]} to {sizes[-1]}: every width must be at least 1")
        if activation not in get_args(Activation):
            raise UserError(f"activation must be one of {some(get_args(Activation))}, not {activation!r}")
        self.embed_dim, self.num_classes, self.hidden_sizes = embed_dim, num_classes, tuple(hidden_sizes)
        self.labels, self.activation, self.dropout = labels_for(num_classes, labels), activation, dropout
        self.facts: dict[str, Any] = {}
        self.padded = False
        self.register_buffer("mean", torch.zeros(embed_dim))
        self.register_buffer("scale", torch.ones(embed_dim))
        layers: list[nn.Module] = []
        for n_in, n_out in itertools.pairwise(sizes[:-1]):
            layers += [nn.Linear(n_in, n_out), nn.ReLU(), nn.Dropout(dropout)]
        self.layers = nn.Sequential(*layers, nn.Linear(sizes[-2], num_classes))

    def forward(self, embedding: Tensor) -> Tensor:
        """Clip embeddings (B,E) -> logits (B,C)."""
        return self.layers((embedding - self.mean) / self.scale)


def weights_sha256(model: AudioTagger) -> str:
    """Return the SHA-256 of the weights that a model's embeddings follow from.

    What only its classes need (the last layer) and what its settings say (the front-end) do not count.
    """
    return weights_hash(model, ("front_end.", f"{model.last_layer}."))


def save_head(path: str | Path, head: Head) -> None:
    """Write a head with all that it says of itself, whole or not at all.

    Raises:
        UserError: its facts hold what cannot be read back safely.
    """
    config = {
        "format_version": FORMAT_VERSION,
        "embed_dim": head.embed_dim,
        "num_classes": head.num_classes,
        "hidden_sizes": list(head.hidden_sizes),
        "labels": list(head.labels),
        "activation": head.activation,
        "dropout": head.dropout,
        "padded": head.padded,
        "facts": head.facts,
    }
    with whole_file(path) as partial:
        torch.save({"head": head.state_dict(), "config": config}, partial)
        read_tensors(partial)


def load_head(name_or_path: str | Path, folder: str | Path = FOLDER) -> Head:
    """Read a head.

    Args:
        name_or_path: a name in `folder`, a published name (fetched once and kept), or a file.
        folder: where saved heads lie.

    Returns:
        The head, in evaluation mode.

    Raises:
        UserError: there is none, or the file is none.
    """
    name, own = str(name_or_path), Path(folder) / f"{name_or_path}.pt"
    if own.is_file():
        return _read_head(own)
    if name in PUBLISHED:
        return _published_head(fetch(f"{_PUBLISHED_URL}/{name}.pth", f"ssondo_head_{name}.pth"), name)
    if not Path(name).is_file():
        known = list_heads(folder)
        raise UserError(
            f"no head is called {name!r}{did_you_mean(name, known)}, and there is no such file; "
            f"known are {some(known, 99)}; `run.py probe` makes one"
        )
    if Path(name).suffix == ".pth" and Path(name).stem in PUBLISHED:
        return _published_head(Path(name), Path(name).stem)
    return _read_head(Path(name))


def list_heads(folder: str | Path = FOLDER) -> dict[str, str]:
    """Return what heads there are: name -> what it is, those saved in `folder` before the published ones."""
    heads: dict[str, str] = {}
    for path in sorted(Path(folder).glob("*.pt")):
        try:
            heads[path.stem] = _described(_read_head(path))
        except UserError as error:
            heads[path.stem] = f"cannot be used: {error}"
    for name, (what, num_classes, _) in PUBLISHED.items():
        heads.setdefault(name, f"{num_classes} classes of {what}, published for {_PUBLISHED_MODEL}")
    return heads


def _described(head: Head) -> str:
    facts, words = head.facts, f"{head.num_classes} classes"
    if isinstance(facts.get("value"), int | float):
        words += f", {facts.get('metric') or 'score'} {facts['value']:.3f}"
    if facts.get("data"):
        words += f" on {facts['data']}"
    return words + (f", for {facts['model']}" if facts.get("model") else "")


def _read_head(path: Path) -> Head:
    content = read_tensors(path)
    config, state = content.get("config"), content.get("head")
    if not isinstance(config, dict) or not isinstance(state, dict):
        raise UserError(f"{path}: found entries {some(map(str, content))}; wanted a head, with 'head' and 'config'")
    try:
        sizes = {name: config[name] for name in ("hidden_sizes", "labels", "activation", "dropout")}
        head = Head(config["embed_dim"], config["num_classes"], **sizes)
        head.load_state_dict(state, strict=True)
        head.facts, head.padded = dict(config["facts"]), bool(config["padded"])
    except (KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"{path}: is no whole head ({error}): make it again with `run.py probe`") from error
    return head.eval()


def _published_head(path: Path, name: str) -> Head:
    """A head of S-SONDO's release: one linear layer on unscaled embeddings of clips filled up to 10 s."""
    what, num_classes, activation = PUBLISHED[name]
    head = Head(_PUBLISHED_WIDTH, num_classes, activation=activation)
    state = read_tensors(path)
    try:
        tensors = {part: state[f"probe.linear_probe.{part}"] for part in ("weight", "bias")}
        cast(nn.Linear, head.layers[0]).load_state_dict(tensors, strict=True)
    except (KeyError, RuntimeError) as error:
        raise UserError(f"{path}: is not the published head {name!r} ({error}): remove it") from error
    head.padded = True
    head.facts = {"name": name, "model": _PUBLISHED_MODEL, "data": what}
    return head.eval()


SEGMENT_SECONDS = 10.0  # of what S-SONDO hears at once, and its published heads were trained on


class HeadedTagger(AudioTagger):
    """A model and a head behind the face of a tagger: it embeds as the model does, and tags as the head does.

    Args:
        model: gives the embeddings, and the front-end.
        head: reads them.
    """

    def __init__(self, model: AudioTagger, head: Head) -> None:
        super().__init__(model.front_end, num_classes=head.num_classes, embed_dim=model.embed_dim)
        self.model, self.head = model, head
        self.name, self.arguments = model.name, dict(model.arguments)
        self.labels, self.activation = list(head.labels), head.activation
        self.last_layer = f"head.layers.{len(head.layers) - 1}"  # type: ignore[misc]  # depends on the head's depth

    def forward(self, waveform: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Tag clips: (B,S), own samples (B,) or None -> logits (B,C)."""
        if self.head.padded:  # trained on clips filled up with zeros that count as sound
            n_samples, least = waveform.shape[1], round(SEGMENT_SECONDS * self.sample_rate)
            if lengths is not None:
                behind = torch.arange(n_samples, device=waveform.device) >= lengths[:, None].to(waveform.device)
                waveform, lengths = waveform.masked_fill(behind, 0.0), lengths.clamp(min=least)
            waveform = F.pad(waveform, (0, max(least - n_samples, 0)))
        return self.head(self.model.embed(waveform, lengths)[0])

    def forward_spectrogram(self, mel: Tensor, n_frames: Tensor | None = None) -> Tensor:
        """Tag spectrograms: (B,F,T), own frames (B,) or None -> logits (B,C)."""
        return self.head(self.model.embed_spectrogram(mel, n_frames)[0])

    def forward_features(self, mel: Tensor) -> Tensor:
        """Compute what the model's own head reads."""
        return self.model.forward_features(mel)

    def embed(self, waveform: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Embed clips as the model does."""
        return self.model.embed(waveform, lengths)

    def embed_spectrogram(self, mel: Tensor, n_frames: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Embed spectrograms as the model does."""
        return self.model.embed_spectrogram(mel, n_frames)

    def tag_and_embed(self, mel: Tensor, n_frames: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits (B,C) and clip embeddings (B,E) in one pass."""
        clip = self.model.embed_spectrogram(mel, n_frames)[0]
        return self.head(clip), clip

    def n_steps(self, n_samples: int) -> int:
        """Time steps that `embed` gives a clip of `n_samples` samples."""
        return self.model.n_steps(n_samples)

    def merge_tokens(self, setting: Any) -> None:
        """Merge tokens of the model from now on."""
        self.model.merge_tokens(setting)


def check_fit(model: AudioTagger, head: Head) -> None:
    """See that a head can read a model's embeddings; tell where it was trained on those of other weights.

    Raises:
        UserError: the embeddings have another width than the head reads.
    """
    made_for = head.facts.get("model")
    if head.embed_dim != model.embed_dim:
        made = f"; it was made for {made_for!r}" if made_for else ""
        raise UserError(
            f"the head reads embeddings of {head.embed_dim} numbers, {model.name!r} gives {model.embed_dim}{made}"
        )
    sha = head.facts.get("weights_sha256")
    if sha is not None and sha != weights_sha256(model):
        logger.warning("the head was trained on other weights (of %s) than these of %s", made_for, model.name)
    elif sha is None and made_for not in (None, model.name):
        logger.warning("the head was trained on %s, not on %s", made_for, model.name)


def attach_head(model: AudioTagger, head: Head) -> HeadedTagger:
    """Put a head onto a model, on the model's device and in evaluation mode; see `check_fit`."""
    check_fit(model, head)
    return HeadedTagger(model, head.to(next(model.parameters()).device)).eval()
