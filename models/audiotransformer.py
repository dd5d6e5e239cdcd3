"""The audio transformers of CED: a ViT on mel patches with separate position embeddings for time and frequency.

Method: Dinkel et al., "CED: Consistent ensemble distillation for audio tagging", ICASSP 2024. Names in the state dict
are those of the published checkpoints.

Letters as in `models.vit`.
"""

import logging
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from common.errors import Faults, some
from models.base import Encoded
from models.ced_mel import CedMel
from models.layers import initialise
from models.registry import register_model
from models.settings import MelSettings, TransformerSettings, find_arguments, take_settings
from models.vit import SpectrogramTransformer
from models.weight_adaptation import fit_time_embedding

logger = logging.getLogger(__name__)

Pooling = Literal["mean", "token", "dm", "logit"]


class AudioTransformer(SpectrogramTransformer):
    """CED's network.

    Clips longer than `target_length` frames are cut into chunks of that many, the last one filled up with zeros after
    the normalisation; the probabilities of all chunks are averaged as set by `eval_avg`. As published, one frame behind
    whole chunks makes another chunk, and every chunk counts the same.

    Args:
        num_classes: C.
        pooling: "mean" (of tokens, then probabilities), "logit" (the same without activation), "dm" (mean over
            frequency, a probability for every column, mean over time), "token" (from a class token).
        init_bn: normalise each mel band by batch statistics.
        center: whether frames are centred.
        **settings: those of `TransformerSettings` and `MelSettings` (`models.settings`), by default `shared_settings`.

    Raises:
        UserError: arguments contradict each other; all faults are listed at once.
    """

    last_layer = "outputlayer.1"
    equal_chunks = True
    shared_settings: ClassVar[tuple[TransformerSettings, MelSettings]] = (
        TransformerSettings(),
        CedMel.defaults,
    )

    def __init__(
        self,
        *,
        num_classes: int = 527,
        pooling: Pooling = "mean",
        init_bn: bool = True,
        center: bool = True,
        **settings: Any,
    ) -> None:
        faults = Faults("the settings of the audio transformer")
        if pooling not in get_args(Pooling):
            faults.add(f"pooling must be one of {some(get_args(Pooling))}, not {pooling!r}")
        transformer, mel = take_settings(self.shared_settings, settings)
        self.pooling, self.n_prefix = pooling, int(pooling == "token")
        super().__init__(
            CedMel(**asdict(mel), center=center, min_frames=transformer.patch_shape[1]),
            transformer,
            num_classes=num_classes,
            outputs="logits" if pooling == "logit" else "probabilities",
            norm_eps=1e-6,
            faults=faults,
        )
        # Index 1, as in published checkpoints; over the mel axis: (R,F,1,T).
        self.init_bn = nn.Sequential(nn.Identity(), nn.BatchNorm2d(mel.n_mels, momentum=0.01)) if init_bn else None
        self.outputlayer = nn.Sequential(nn.LayerNorm(self.embed_dim), nn.Linear(self.embed_dim, num_classes))
        self.apply(initialise)

    def _make_positions(self, n_rows: int, n_columns: int) -> None:
        self.time_pos_embed = nn.Parameter(torch.randn(1, self.embed_dim, 1, n_columns) * 0.02)
        self.freq_pos_embed = nn.Parameter(torch.randn(1, self.embed_dim, n_rows, 1) * 0.02)
        if self.pooling == "token":
            self.cls_token = nn.Parameter(torch.zeros(1, 1, self.embed_dim))
            self.token_pos_embed = nn.Parameter(torch.randn(1, self.embed_dim) * 0.02)

    def _add_positions(self, patches: Tensor, columns: Tensor | None = None) -> Tensor:
        positions = self.time_pos_embed[..., : patches.shape[2]] + self.freq_pos_embed  # (1,D,f,t)
        return patches + positions.permute(0, 2, 3, 1)

    def _prefix_tokens(self) -> Tensor | None:
        return self.cls_token + self.token_pos_embed if self.pooling == "token" else None

    def adapt_weights(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Crop or stretch the time embedding of a network with another `target_length`, with a notice."""
        if "time_pos_embed" not in state:
            return dict(state)
        fitted = fit_time_embedding("time_pos_embed", state["time_pos_embed"], self.time_pos_embed.shape[-1])
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

    def classify_rows(self, encoded: Encoded) -> Tensor:
        """Tag rows: (R,C), as in `outputs`; a token that `keep` chose is read as a column of its own."""
        if encoded.prefix is not None:
            return self._activate(self.outputlayer(encoded.prefix[:, 0]))
        columns = self._columns(encoded)  # (R,t,D)
        if self.pooling == "dm":
            return masked_mean(self._activate(self.outputlayer(columns)), encoded.valid)
        logits = self.outputlayer(masked_mean(columns, encoded.valid))
        return logits if self.pooling == "logit" else self._activate(logits)


def masked_mean(columns: Tensor, valid: Tensor | None) -> Tensor:
    """Mean over columns that take part: (R,t,D), valid (R,t) or None for all -> (R,D)."""
    if valid is None:
        return columns.mean(1)
    return (columns * valid[..., None]).sum(1) / valid.sum(1, keepdim=True)


# with their defaults, all that make a network but the number of its classes, in the order of published config.json
_ORDER = (
    *("embed_dim", "depth", "num_heads", "mlp_ratio", "qkv_bias", "pooling", "target_length", "patch_size"),
    *("patch_stride", "init_bn", "eval_avg", "drop_rate", "attn_drop_rate", "drop_path_rate", "init_values"),
    *("time_patch_out", "freq_patch_out", "token_merging", "token_merging_in_training"),
    *("sample_rate", "n_mels", "f_min", "f_max", "n_fft", "win_size", "hop_size", "center"),
)
ARGUMENTS = {name: find_arguments(AudioTransformer)[name] for name in _ORDER}

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
