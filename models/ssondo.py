"""A model in one call: raw sound in, embeddings or classes out, as S-SONDO's package has it.

Any model will do: the published students, a run's folder, a tagger. Clips are cut into segments, the tail kept: as long
as those that a head was trained on, else of the training length in a checkpoint of S-SONDO, else 10 s.

Letters: B batch, S samples, R segments of all clips, F mel bands, T frames, C classes, E embedding width, W width of
a teacher's space.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.errors import UserError
from models.base import AudioTagger
from models.devices import choose_device
from models.head_inputs import HeadInput
from models.headed import SEGMENT_SECONDS, Head, HeadedTagger
from models.heads import FOLDER, check_fit, load_head
from models.loading import load_model
from models.registry import get_model_entry, list_models
from models.ssondo_students import Student
from models.waveforms import as_waveform
from models.weight_sources import read_weights

_AT_ONCE = 32  # segments that go through the network together, so that hours of sound fit
_NEW_HEADS = ("linear", "mlp")
Embed = Callable[[Tensor, Tensor | None], Tensor]  # waveforms (B,S), samples of each (B,) or None -> (B,I)


class Ssondo(nn.Module):
    """A model, and a head or none, on raw sound.

    Args:
        model: embeds.
        head: reads the mean embedding of a clip's segments; None for the embeddings themselves.
        return_logits: give (embeddings, projected) without a head, (logits, embeddings) with one.
        pad: fill segments up with zeros that count as sound, as published heads were trained. Else a segment is as long
            as its sound.
        segment_seconds: length of a segment; None for that of the model, see `get_segment_seconds`.

    Raises:
        UserError: the head is for another width, or projections are requested from a model that has none.
    """

    def __init__(
        self,
        model: AudioTagger,
        head: Head | None = None,
        *,
        return_logits: bool = False,
        pad: bool = False,
        segment_seconds: float | None = None,
    ) -> None:
        super().__init__()
        if head is not None:
            check_fit(model, head)
        elif return_logits and not (isinstance(model, Student) and model.num_classes):
            raise UserError(
                f"return_logits: {model.name!r} has kept no projection into a teacher's space; give a published "
                "checkpoint of S-SONDO, or a head"
            )
        self.model, self.head = model, head
        self.return_logits, self.pad = return_logits, pad
        seconds = get_segment_seconds(model) if segment_seconds is None else segment_seconds
        self.segment_samples = round(seconds * model.sample_rate)
        self._trainable: list[nn.Parameter] | None = None  # what was learning before the backbone was frozen

    @property
    def backbone(self) -> nn.Module:
        """The network that embeds, without the layers that read its embeddings where these are apart."""
        return self.model.model if isinstance(self.model, Student) else self.model

    @property
    def embedding_dim(self) -> int:
        """E."""
        return self.model.embed_dim

    @property
    def sample_rate(self) -> int:
        """Hertz of the waveforms it takes."""
        return self.model.sample_rate

    def forward(self, x: Any) -> Tensor | tuple[Tensor, Tensor]:
        """Embed clips, or tag them where there is a head.

        Args:
            x: mono (B,S) or (S,) at `sample_rate`, S at least 1: a tensor or array of floats with full scale 1.0, or of
                int16; or a list of clips (S,).

        Returns:
            Without a head: one vector a segment (B, n_segments, E), and with `return_logits` the clip's place in the
            teacher's space (B,W) too. With a head: logits (B,C), and with `return_logits` clip embeddings (B,E) too.
        """
        if self.head is not None:
            found = _weighted_mean(*self._embed_segments(x, None, partial(self.head.embed_waveform, self.model)))
            logits = self.head(found)
            is_clip = self.head.input == HeadInput()
            return (logits, found if is_clip else self.get_embeddings(x)) if self.return_logits else logits
        segments, own = self._embed_segments(x, None, self._embed)
        if not self.return_logits:
            return segments
        projected = self.model.get_submodule("classification_head")(segments)
        return segments, _weighted_mean(projected, own)

    def get_embeddings(self, x: Any, lengths: Any = None) -> Tensor:
        """Embed whole clips.

        Args:
            x: as in `forward`.
            lengths: (B,) samples of each clip, None where all of S belong to it.

        Returns:
            (B,E), the mean over a clip's segments, each weighted by the sound in it.
        """
        return _weighted_mean(*self._embed_segments(x, lengths, self._embed))

    def preprocess(self, x: Any) -> Tensor:
        """Compute the spectrogram of each segment: (B,S) or (S,) -> (B, n_segments, F, T).

        The tail of a clip of several segments is filled up with silence.
        """
        segments, own = self._split_segments(x, None)
        if self.pad:
            mel = self.model.front_end(segments.flatten(0, 1))
        else:
            mel = self.model.front_end(segments.flatten(0, 1), own.flatten())
        return mel.unflatten(0, own.shape)

    def freeze_backbone(self) -> None:
        """Keep everything but the head as it is: no gradients, and no statistics of batches, from now on."""
        if self._trainable is None:
            self._trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.model.requires_grad_(False).eval()

    def unfreeze_backbone(self) -> None:
        """Let what learned before `freeze_backbone` learn again."""
        for parameter in self._trainable or []:
            parameter.requires_grad_(True)
        self._trainable = None
        self.model.train(self.training)

    def train(self, mode: bool = True) -> "Ssondo":
        """Switch to training or evaluation; a frozen backbone stays in evaluation."""
        super().train(mode)
        if self._trainable is not None:
            self.model.eval()
        return self

    def _split_segments(self, sound: Any, lengths: Any) -> tuple[Tensor, Tensor]:
        """(B,S) or (S,) -> segments (B, n_segments, samples), and the samples of sound in each (B, n_segments)."""
        device = next(self.parameters()).device
        x, own = as_waveform(sound, lengths, device=device, check_values=not self.training)
        n_samples = x.shape[1]
        ends = torch.full((len(x),), n_samples, device=x.device) if own is None else own
        x = x.masked_fill(torch.arange(n_samples, device=x.device) >= ends[:, None], 0.0)
        n_segments = -(-n_samples // self.segment_samples)
        size = self.segment_samples if self.pad or n_segments > 1 else n_samples
        segments = F.pad(x, (0, n_segments * size - n_samples)).unflatten(1, (n_segments, size))
        starts = torch.arange(n_segments, device=x.device) * size
        return segments, (ends[:, None] - starts).clamp(0, size)

    def _embed(self, waveform: Tensor, lengths: Tensor | None) -> Tensor:
        return self.model.embed_waveform(waveform, lengths)[0]

    def _embed_segments(self, x: Any, lengths: Any, embed: Embed) -> tuple[Tensor, Tensor]:
        """(B,S) or (S,) -> what `embed` gives of each segment (B, n_segments, I), and the samples of sound in each."""
        segments, own = self._split_segments(x, lengths)
        used = own > 0
        clips, n_own = segments[used], own[used]  # (R,samples), (R,)
        at_once = len(clips) if self.model.training else _AT_ONCE
        pieces = [
            embed(piece, None if self.pad else n)
            for piece, n in zip(clips.split(at_once), n_own.split(at_once), strict=True)
        ]
        rows = torch.cat(pieces)
        return rows.new_zeros(*own.shape, rows.shape[1]).masked_scatter(used[..., None], rows), own


def get_segment_seconds(model: AudioTagger) -> float:
    """Return the length of the segments that a student was trained on; 10 s if it is unknown."""
    network = model.model if isinstance(model, HeadedTagger) else model
    return network.segment_seconds if isinstance(network, Student) else SEGMENT_SECONDS


def _weighted_mean(segments: Tensor, own: Tensor) -> Tensor:
    """Mean of segments (B, n_segments, E), each weighted by its samples of sound (B, n_segments) -> (B,E)."""
    share = own / own.sum(1, keepdim=True)
    return (segments * share[..., None]).sum(1)


def get_ssondo(
    checkpoint: str | Path | AudioTagger = "matpac-mobilenetv3",
    head: str | Path | None = None,
    n_classes: int | None = None,
    hidden_sizes: Sequence[int] | None = None,
    return_logits: bool = False,
    device: str = "cpu",
    pad: bool | None = None,
    heads_folder: str | Path = FOLDER,
) -> Ssondo:
    """Load a model that embeds raw sound, with or without a head of classes.

    Args:
        checkpoint: a name from `list_models`, a file (published `.ckpt` or own), a run's folder, or a model at hand.
        head: None for embeddings; a name from `list_heads` or a head's file; "linear" or "mlp" for a new one.
        n_classes: C of a new head.
        hidden_sizes: hidden layers of a new "mlp", by default (512,).
        return_logits: give the projection into the teacher's space, or with a head the embeddings, beside.
        device: "cpu", "cuda" or "auto".
        pad: fill segments up to their length with zeros, by default only where the head was trained so.
        heads_folder: where saved heads lie.

    Returns:
        The model, in evaluation mode.

    Raises:
        UserError: a model or head that cannot be had, or settings that contradict each other.

    Example:
        >>> model = get_ssondo("experiments/student", head="linear", n_classes=10)
        >>> model.freeze_backbone()
        >>> logits = model(torch.zeros(2, 160000))  # (2, 10)
    """
    where = choose_device(device)
    if isinstance(checkpoint, AudioTagger):
        model = checkpoint
    else:
        width = _projection_width(checkpoint) if return_logits and head is None else None
        model = load_model(checkpoint, num_classes=width)
    unread = [name for name, value in (("n_classes", n_classes), ("hidden_sizes", hidden_sizes)) if value is not None]
    if unread and (head not in _NEW_HEADS or (head == "linear" and hidden_sizes is not None)):
        which = "a new 'mlp'" if head == "linear" else "a new head, 'linear' or 'mlp'"
        raise UserError(f"{' and '.join(unread)} can only be given for {which}, not with head {head!r}")
    if head is None:
        own_head = None
    elif head in _NEW_HEADS:
        if n_classes is None:
            raise UserError(f"head {head!r} needs n_classes, the number of its classes")
        sizes = () if head == "linear" else (512,) if hidden_sizes is None else tuple(hidden_sizes)
        own_head = Head(model.embed_dim, n_classes, hidden_sizes=sizes)
        own_head.facts["chunk_length"] = get_segment_seconds(model)
    else:
        own_head = load_head(head, heads_folder)
    if pad is None:
        pad = own_head is not None and own_head.padded
    seconds = None if own_head is None else own_head.chunk_seconds
    return Ssondo(model, own_head, return_logits=return_logits, pad=pad, segment_seconds=seconds).to(where).eval()


def _projection_width(checkpoint: str | Path) -> int | None:
    """W of a published checkpoint, None where it has no projection."""
    named = str(checkpoint) in list_models()
    origin = get_model_entry(str(checkpoint)).weights if named else checkpoint
    width = read_weights(origin)[1].get("projection") if origin is not None else None
    return width if isinstance(width, int) else None
