"""The audio transformers of CED: a ViT on mel patches with separate position embeddings for time and frequency.

Method: Dinkel et al., "CED: Consistent ensemble distillation for audio tagging", ICASSP 2024. Names in the state dict
are those of the published checkpoints.

Letters as in `models.vit`.
"""

import inspect
import logging
from collections.abc import Mapping
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from common.errors import Faults, some
from models.chunks import Average
from models.frontends import CedMel
from models.layers import initialise
from models.registry import register_model
from models.relatives import fit_time
from models.token_merging import MergingSetting
from models.vit import SpectrogramTransformer, Tokens

logger = logging.getLogger(__name__)

Pooling = Literal["mean", "token", "dm", "logit"]


class AudioTransformer(SpectrogramTransformer):
    """CED's network.

    Clips longer than `target_length` frames are cut into chunks of that many, the last one filled up with zeros after
    the normalisation; the probabilities of all chunks are joined as `eval_avg` says. As published, one frame behind
    whole chunks makes another chunk, and every chunk counts the same.

    Args:
        num_classes: C.
        embed_dim: D.
        depth: number of blocks.
        num_heads: H, a divisor of D.
        mlp_ratio: hidden width of the MLPs in units of D.
        qkv_bias: whether queries, keys and values have a bias.
        pooling: "mean" (of tokens, then probabilities), "logit" (the same without activation), "dm" (mean over
            frequency, a probability for every column, mean over time), "token" (from a class token).
        target_length: longest input in frames.
        patch_size: edge of a patch, in bands and frames.
        patch_stride: from one patch to the next.
        init_bn: normalise each mel band by batch statistics.
        eval_avg: how chunks of a long clip are joined, "mean" or "max" of their probabilities.
        drop_rate: dropout of tokens and projections.
        attn_drop_rate: dropout of attention weights.
        drop_path_rate: stochastic depth of the last block, rising linearly from 0.
        init_values: initial layer scale, None for none.
        time_patch_out: random columns of the patch grid left out in training.
        freq_patch_out: random rows of the patch grid left out in training.
        token_merging: tokens merged away in each block, see `models.token_merging.merging_schedule`; or, for attention
            in which merged tokens count like others, {"r": those, "proportional": False}.
        token_merging_in_training: False: only in evaluation mode.
        sample_rate: of the waveform, in hertz.
        n_mels: F.
        f_min: lower edge of the bands in hertz.
        f_max: upper edge in hertz, None for half the sample rate.
        n_fft: samples of a Fourier transform.
        win_size: samples of the window.
        hop_size: samples between frames.
        center: whether frames are centred.

    Raises:
        UserError: arguments contradict each other; all faults are told at once.
    """

    last_layer = "outputlayer.1"
    equal_chunks = True

    def __init__(
        self,
        *,
        num_classes: int = 527,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        pooling: Pooling = "mean",
        target_length: int = 1012,
        patch_size: int = 16,
        patch_stride: int = 16,
        init_bn: bool = True,
        eval_avg: Average = "mean",
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        init_values: float | None = None,
        time_patch_out: int | None = None,
        freq_patch_out: int | None = None,
        token_merging: MergingSetting = None,
        token_merging_in_training: bool = True,
        sample_rate: int = 16000,
        n_mels: int = 64,
        f_min: float = 0.0,
        f_max: float | None = 8000.0,
        n_fft: int = 512,
        win_size: int = 512,
        hop_size: int = 160,
        center: bool = True,
    ) -> None:
        faults = Faults("the settings of the audio transformer")
        if pooling not in get_args(Pooling):
            faults.add(f"pooling must be one of {some(get_args(Pooling))}, not {pooling!r}")
        front_end = CedMel(
            sample_rate=sample_rate,
            n_mels=n_mels,
            n_fft=n_fft,
            win_size=win_size,
            hop_size=hop_size,
            f_min=f_min,
            f_max=f_max,
            center=center,
            min_frames=patch_size,
        )
        self.pooling = pooling
        super().__init__(
            front_end,
            num_classes=num_classes,
            outputs="logits" if pooling == "logit" else "probabilities",
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            qkv_bias=qkv_bias,
            norm_eps=1e-6,
            target_length=target_length,
            patch_size=patch_size,
            patch_stride=patch_stride,
            eval_avg=eval_avg,
            drop_rate=drop_rate,
            attn_drop_rate=attn_drop_rate,
            drop_path_rate=drop_path_rate,
            init_values=init_values,
            time_patch_out=time_patch_out,
            freq_patch_out=freq_patch_out,
            token_merging=token_merging,
            token_merging_in_training=token_merging_in_training,
            faults=faults,
        )
        # Index 1, as in published checkpoints; over the mel axis: (R,F,1,T).
        self.init_bn = nn.Sequential(nn.Identity(), nn.BatchNorm2d(n_mels, momentum=0.01)) if init_bn else None
        self.outputlayer = nn.Sequential(nn.LayerNorm(embed_dim), nn.Linear(embed_dim, num_classes))
        self.apply(initialise)

    def _make_positions(self, n_rows: int, n_columns: int) -> None:
        self.time_pos_embed = nn.Parameter(torch.randn(1, self.embed_dim, 1, n_columns) * 0.02)
        self.freq_pos_embed = nn.Parameter(torch.randn(1, self.embed_dim, n_rows, 1) * 0.02)
        if self.pooling == "token":
            self.cls_token = nn.Parameter(torch.zeros(1, 1, self.embed_dim))
            self.token_pos_embed = nn.Parameter(torch.randn(1, self.embed_dim) * 0.02)

    def _placed(self, patches: Tensor, columns: Tensor | None = None) -> Tensor:
        positions = self.time_pos_embed[..., : patches.shape[2]] + self.freq_pos_embed  # (1,D,f,t)
        return patches + positions.permute(0, 2, 3, 1)

    def _prefix(self) -> Tensor | None:
        return self.cls_token + self.token_pos_embed if self.pooling == "token" else None

    def adapt_weights(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Crop or stretch the time embedding of a network with another `target_length`, with a notice."""
        if "time_pos_embed" not in state:
            return dict(state)
        fitted = fit_time("time_pos_embed", state["time_pos_embed"], self.time_pos_embed.shape[-1])
        return dict(state) | {"time_pos_embed": fitted}

    def no_weight_decay(self) -> set[str]:
        """Position embeddings and the class token."""
        names = {"time_pos_embed", "freq_pos_embed", "cls_token", "token_pos_embed"}
        return names & set(dict(self.named_parameters()))

    def _normalise(self, mel: Tensor, n_frames: Tensor | None) -> Tensor:
        """Batch norm over bands; in training its statistics leave out padding."""
        if self.init_bn is None:
            return mel
        if n_frames is None or not self.training:
            return self.init_bn(mel.unsqueeze(2)).squeeze(2)
        own = torch.arange(mel.shape[2], device=mel.device) < n_frames[:, None]  # (B,T)
        frames = self.init_bn(mel.transpose(1, 2)[own][:, :, None, None])[:, :, 0, 0]
        normalised = frames.new_zeros(len(mel), mel.shape[2], mel.shape[1])
        normalised[own] = frames
        return normalised.transpose(1, 2)

    def _classify(self, tokens: Tokens) -> Tensor:
        if tokens.prefix is not None:
            return self._activate(self.outputlayer(tokens.prefix[:, 0]))
        columns = tokens.grid.mean(1)  # (R,t,D)
        if self.pooling == "dm":
            return _masked_mean(self._activate(self.outputlayer(columns)), tokens.own)
        logits = self.outputlayer(_masked_mean(columns, tokens.own))
        return logits if self.pooling == "logit" else self._activate(logits)


def _masked_mean(x: Tensor, own: Tensor | None) -> Tensor:
    """Mean over columns that count: (R,t,D), own (R,t) or None -> (R,D)."""
    if own is None:
        return x.mean(1)
    return (x * own[..., None]).sum(1) / own.sum(1, keepdim=True)


# with their defaults, all that make a network but the number of its classes
ARGUMENTS = {
    name: parameter.default
    for name, parameter in inspect.signature(AudioTransformer).parameters.items()
    if name != "num_classes"
}

# width, heads, depth; the two smallest are this project's own, for CPUs and tests
SIZES = {
    "pico": (64, 1, 4),
    "nano": (128, 2, 6),
    "tiny": (192, 3, 12),
    "mini": (256, 4, 12),
    "small": (384, 6, 12),
    "base": (768, 12, 12),
}
_ZENODO = "https://zenodo.org/record"
_PUBLISHED = {
    "tiny": f"{_ZENODO}/8275347/files/audiotransformer_tiny_mAP_4814.pt?download=1",
    "mini": f"{_ZENODO}/8275347/files/audiotransformer_mini_mAP_4896.pt?download=1",
    "small": f"{_ZENODO}/8275319/files/audiotransformer_small_mAP_4958.pt?download=1",
    "base": f"{_ZENODO}/8275347/files/audiotransformer_base_mAP_4999.pt?download=1",
}


def _sized(size: str) -> partial[AudioTransformer]:
    width, heads, depth = SIZES[size]
    return partial(AudioTransformer, embed_dim=width, num_heads=heads, depth=depth)


for _size in SIZES:
    _masked = (
        f"{_ZENODO}/8275347/files/audiotransformer_{_size}_mae_as_10s.pt?download=1" if _size in _PUBLISHED else None
    )
    register_model(f"audiotransformer_{_size}", initialisation=_masked)(_sized(_size))
for _size, _url in _PUBLISHED.items():
    register_model(f"ced_{_size}", weights=_url)(_sized(_size))
register_model(
    "audiotransformer_base_4740",
    weights=f"{_ZENODO}/7964975/files/audiotransformer_base_mAP_47_40.pt?download=1",
)(_sized("base"))
