"""Arguments that several networks share, with their documentation and defaults.

The class of a network lists them, with its own defaults, in `shared_settings`; its constructor takes them as flat
keyword arguments, as in configurations and checkpoints (`model_args.embed_dim`), and `take_settings` groups them.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Annotated, Any, TypeVar, cast, get_args

from common.errors import Faults, some
from models.chunks import Average
from models.token_merging import MergingSetting

Defaults = TypeVar("Defaults", bound=tuple[Any, ...])


@dataclass(frozen=True)
class Bounds:
    """Bounds of an argument, as in Pydantic's `Field`, which exported code does without.

    Attributes:
        ge: lowest value.
        gt: a value below all.
        le: highest value.
        min_length: of a sequence.
        max_length: of a sequence.
        allow_inf_nan: whether a number may be infinite or NaN.
    """

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    min_length: int | None = None
    max_length: int | None = None
    allow_inf_nan: bool | None = None


# Bounds of arguments: wide enough for any network that is trained, and narrow enough that a file's description of one
# cannot fill the memory.
Width = Annotated[int, Bounds(ge=1, le=65536)]
SampleRate = Annotated[int, Bounds(ge=1000, le=768000)]
Bands = Annotated[int, Bounds(ge=1, le=1024)]
Frames = Annotated[int, Bounds(ge=1, le=1_000_000)]
Blocks = Annotated[int, Bounds(ge=1, le=256)]
BlocksOfStages = Annotated[Sequence[Blocks], Bounds(max_length=16)]
Edge = Annotated[int, Bounds(ge=1, le=1024)]
Edges = Edge | Annotated[Sequence[Edge], Bounds(min_length=2, max_length=2)]  # of a square, or in bands and frames
Factor = Annotated[float, Bounds(gt=0, le=64)]
Rate = Annotated[float, Bounds(ge=0, le=1)]
Number = Annotated[float, Bounds(allow_inf_nan=False)]
Positive = Annotated[float, Bounds(gt=0, allow_inf_nan=False)]
Seconds = Annotated[float, Bounds(le=86400)]
Hertz = Annotated[float, Bounds(ge=0, le=384000)]
HertzRange = Annotated[int, Bounds(ge=1, le=384000)]


@dataclass(frozen=True)
class MelSettings:
    """Settings of a front-end.

    Attributes:
        sample_rate: of the waveform, in hertz.
        n_mels: mel bands F.
        n_fft: samples of a Fourier transform.
        win_size: samples of the window, at most `n_fft`.
        hop_size: samples from one frame to the next.
        f_min: lower edge of the lowest band in hertz.
        f_max: upper edge of the highest band in hertz, None for half the sample rate.
    """

    sample_rate: SampleRate
    n_mels: Bands
    n_fft: Annotated[int, Bounds(ge=2, le=32768)]
    win_size: Annotated[int, Bounds(ge=1, le=32768)]
    hop_size: Annotated[int, Bounds(ge=1, le=65536)]
    f_min: Hertz
    f_max: Hertz | None


@dataclass(frozen=True)
class TransformerSettings:
    """Settings of a vision transformer on spectrograms.

    Attributes:
        embed_dim: D.
        depth: number of blocks.
        num_heads: H, a divisor of D.
        mlp_ratio: hidden width of the MLPs in units of D.
        qkv_bias: whether queries, keys and values have a bias.
        target_length: longest input in frames; longer clips are split into chunks.
        patch_size: edge of a square patch, or [bands, frames].
        patch_stride: from one patch to the next, or [bands, frames].
        eval_avg: how chunks of a long clip are joined, "mean" or "max" of their probabilities.
        drop_rate: dropout of tokens and projections.
        attn_drop_rate: dropout of attention weights.
        drop_path_rate: stochastic depth of the last block, rising linearly from 0.
        init_values: initial layer scale, None for none.
        time_patch_out: number of random columns of the patch grid dropped in training.
        freq_patch_out: number of random rows of the patch grid dropped in training.
        token_merging: tokens merged in each block, see `models.token_merging.split_setting`.
        token_merging_in_training: False for evaluation mode only.
    """

    embed_dim: Width = 768
    depth: Blocks = 12
    num_heads: Annotated[int, Bounds(ge=1, le=1024)] = 12
    mlp_ratio: Factor = 4.0
    qkv_bias: bool = True
    target_length: Frames = 1012
    patch_size: Edges = 16
    patch_stride: Edges = 16
    eval_avg: Average = "mean"
    drop_rate: Rate = 0.0
    attn_drop_rate: Rate = 0.0
    drop_path_rate: Rate = 0.0
    init_values: Number | None = None
    time_patch_out: Annotated[int, Bounds(ge=0)] | None = None
    freq_patch_out: Annotated[int, Bounds(ge=0)] | None = None
    token_merging: MergingSetting = None
    token_merging_in_training: bool = True

    @property
    def patch_shape(self) -> tuple[int, int]:
        """Mel bands and frames of a patch."""
        return _as_pair(self.patch_size)

    @property
    def patch_strides(self) -> tuple[int, int]:
        """Mel bands and frames from one patch to the next."""
        return _as_pair(self.patch_stride)

    def add_faults(self, faults: Faults, n_mels: int) -> None:
        """Add settings that contradict each other or the number of mel bands."""
        if self.eval_avg not in get_args(Average):
            faults.add(f"eval_avg must be one of {some(get_args(Average))}, not {self.eval_avg!r}")
        if self.num_heads < 1 or self.embed_dim % self.num_heads:
            faults.add(f"embed_dim {self.embed_dim} cannot be shared among {self.num_heads} heads")
        n_bands, n_frames = self.patch_shape
        if self.target_length < n_frames or n_mels < n_bands:
            patch = n_frames if n_bands == n_frames else f"{n_bands} bands and {n_frames} frames"
            faults.add(f"target_length {self.target_length} and n_mels {n_mels} must hold a patch of {patch}")


def _as_pair(edges: Edges) -> tuple[int, int]:
    bands, frames = (edges, edges) if isinstance(edges, int) else edges
    return bands, frames


def take_settings(defaults: Defaults, given: Mapping[str, Any]) -> Defaults:
    """Override defaults by arguments.

    Args:
        defaults: instances of settings with distinct field names.
        given: name -> value.

    Returns:
        Instances of the same classes, in the same order.

    Raises:
        TypeError: an unknown name.
    """
    known = [{each.name for each in fields(settings)} for settings in defaults]
    unknown = [name for name in given if not any(name in names for names in known)]
    if unknown:
        raise TypeError(f"unexpected keyword argument {unknown[0]!r}")
    taken = (
        replace(settings, **{name: value for name, value in given.items() if name in names})
        for settings, names in zip(defaults, known, strict=True)
    )
    return cast(Defaults, tuple(taken))


def find_arguments(factory: Callable[..., Any]) -> dict[str, Any]:
    """Return the arguments of a network factory besides `num_classes`: name -> default.

    Args:
        factory: a class, a function, or a partial of one; `shared_settings` of a class are among its arguments.
    """
    parameters = inspect.signature(factory).parameters.values()
    found = {each.name: each.default for each in parameters if each.kind is not inspect.Parameter.VAR_KEYWORD}
    for settings in getattr(getattr(factory, "func", factory), "shared_settings", ()):
        found |= asdict(settings)
    found |= getattr(factory, "keywords", {})
    return {name: default for name, default in found.items() if name != "num_classes"}
