"""The Audio Spectrogram Transformer: overlapping patches of 128 Kaldi mel bands, a class and a distillation token.

Method: Gong, Chung, Glass, "AST: Audio Spectrogram Transformer", Interspeech 2021; initialisation from DeiT (Touvron et
al., "Training data-efficient image transformers & distillation through attention", ICML 2021). Names in the state dict
are those of the published checkpoints, less their prefixes `module.` and `v.`.

Letters as in `models.vit`.
"""

import logging
import math
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.errors import Faults
from models.base import Encoded
from models.kaldi_mel import KaldiMel
from models.layers import initialise
from models.registry import register_model
from models.settings import Bands, Number, Positive, SampleRate, TransformerSettings, take_settings
from models.vit import SpectrogramTransformer
from models.weight_adaptation import adapt_image_weights, is_image_transformer

logger = logging.getLogger(__name__)


class AST(SpectrogramTransformer):
    """AST's network; gives logits.

    Shorter clips are filled up to `target_length` frames with what AST reads there (0 before the normalisation), and
    all of it takes part, as published. Published code crops longer ones to their first `target_length` frames; here
    what follows is taken in further chunks, by whose own frames the probabilities are weighed, since a clip's end may
    hold what its beginning does not. Fewer frames more than make a patch change nothing, and the result is the
    published one.

    Args:
        num_classes: C.
        norm_eps: of the layer norms of the blocks.
        sample_rate: of the waveform, in hertz.
        n_mels: F.
        mean: of the log mel values of the training data, which are brought to mean 0 and deviation 0.5.
        std: their standard deviation.
        **settings: those of `TransformerSettings` (`models.settings`), by default `shared_settings`; the front-end is
            Kaldi's, which has no others. `target_length` is 1024 for AudioSet, 512 for ESC-50, 128 for Speech Commands.

    Raises:
        UserError: arguments contradict each other; all faults are listed at once.
    """

    fixed_length = True
    n_prefix = 2
    last_layer = "mlp_head.1"
    shared_settings: ClassVar[tuple[TransformerSettings]] = (TransformerSettings(target_length=1024, patch_stride=10),)

    def __init__(
        self,
        *,
        num_classes: int = 527,
        norm_eps: Number = 1e-6,
        sample_rate: SampleRate = 16000,
        n_mels: Bands = 128,
        mean: Number = -4.2677393,
        std: Positive = 4.5689974,
        **settings: Any,
    ) -> None:
        (transformer,) = take_settings(self.shared_settings, settings)
        front_end = KaldiMel(sample_rate=sample_rate, n_mels=n_mels, mean=mean, std=std)
        self.fill = front_end.zero_value
        faults = Faults("the settings of AST")
        super().__init__(
            front_end, transformer, num_classes=num_classes, outputs="logits", norm_eps=norm_eps, faults=faults
        )
        self.mlp_head = nn.Sequential(nn.LayerNorm(self.embed_dim), nn.Linear(self.embed_dim, num_classes))
        self.apply(initialise)

    def adapt_weights(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Take published AST checkpoints and image transformers, with a notice of what is changed.

        Positions of another grid are cropped to the middle, or stretched; patch weights of three colours are summed;
        ImageNet's last layers are left out.
        """
        of_audio = {key: value for key, value in state.items() if not key.startswith(("v.head.", "v.head_dist."))}
        adapted = {key.removeprefix("v."): value for key, value in of_audio.items()}  # published ones keep ImageNet's
        square = is_image_transformer(adapted)
        if square:
            adapted = adapt_image_weights(adapted)
        positions = adapted.get("pos_embed")
        if positions is not None and positions.ndim == 3 and (square or positions.shape != self.pos_embed.shape):
            adapted["pos_embed"] = self._fit_positions(positions, square)
        return adapted

    def no_weight_decay(self) -> set[str]:
        """Position embeddings and the two tokens before them."""
        return {"pos_embed", "cls_token", "dist_token"}

    def _fit_positions(self, given: Tensor, square: bool) -> Tensor:
        """Fit positions (1,P+N,D) of another grid: of a square one, or of as many rows as ours."""
        n_rows, n_columns = self._grid
        n_given = given.shape[1] - self.n_prefix
        rows = math.isqrt(max(n_given, 1)) if square else n_rows
        if n_given < 1 or n_given % rows:
            return given  # reported as a tensor of another shape
        grid = given[:, self.n_prefix :].transpose(1, 2).unflatten(2, (rows, n_given // rows))  # (1,D,f,t)
        logger.warning("pos_embed is fitted from %d x %d to %d x %d patches", rows, n_given // rows, n_rows, n_columns)
        for axis, expected in ((2, n_rows), (3, n_columns)):
            there = grid.shape[axis]
            if there > expected:
                grid = grid.narrow(axis, there // 2 - expected // 2, expected)
            elif there < expected:
                size = (expected, grid.shape[3]) if axis == 2 else (grid.shape[2], expected)
                grid = F.interpolate(grid, size, mode="bilinear", align_corners=False)
        return torch.cat([given[:, : self.n_prefix], grid.flatten(2).transpose(1, 2)], dim=1)

    def _make_positions(self, n_rows: int, n_columns: int) -> None:
        self._grid = (n_rows, n_columns)
        self.cls_token = nn.Parameter(torch.randn(1, 1, self.embed_dim) * 0.02)
        self.dist_token = nn.Parameter(torch.randn(1, 1, self.embed_dim) * 0.02)
        self.pos_embed = nn.Parameter(torch.randn(1, self.n_prefix + n_rows * n_columns, self.embed_dim) * 0.02)

    def _add_positions(self, patches: Tensor, columns: Tensor | None = None) -> Tensor:
        return patches + self.pos_embed[:, self.n_prefix :].unflatten(1, self._grid)

    def _prefix_tokens(self) -> Tensor:
        return torch.cat([self.cls_token, self.dist_token], dim=1) + self.pos_embed[:, : self.n_prefix]

    def pool_rows(self, encoded: Encoded) -> Tensor:
        """Embed rows by the mean of the two tokens before the patches: (R,D)."""
        assert encoded.prefix is not None
        return encoded.prefix.mean(1)

    def classify_rows(self, encoded: Encoded) -> Tensor:
        """Tag rows: logits (R,C)."""
        return self.mlp_head(self.pool_rows(encoded))


# width, heads, depth: those of DeiT; the smallest is this project's own, for CPUs and tests
SIZES = {"pico": (64, 1, 12), "tiny": (192, 3, 12), "small": (384, 6, 12), "base": (768, 12, 12)}
_INITIALISATION = {
    "tiny": "timm:deit_tiny_distilled_patch16_224",
    "small": "timm:deit_small_distilled_patch16_224",
    "base": "timm:deit_base_distilled_patch16_384",
}
for _size, (_width, _heads, _depth) in SIZES.items():
    register_model(f"ast_{_size}", initialisation=_INITIALISATION.get(_size))(
        partial(AST, embed_dim=_width, num_heads=_heads, depth=_depth)
    )

_DROPBOX = "https://www.dropbox.com/s"
# published file -> its folder and settings; the numbers are strides and mAP or accuracy
_PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "audioset_10_10_0.4593": ("ca0b1v2nlxzyeb4", {}),
    "audioset_10_10_0.4495": ("1tv0hovue1bxupk", {}),
    "audioset_10_10_0.4483": ("6u5sikl4b9wo4u5", {}),
    "audioset_10_10_0.4475": ("kt6i0v9fvfm1mbq", {}),
    "audioset_12_12_0.4467": ("snfhx3tizr4nuc8", {"patch_stride": 12}),
    "audioset_14_14_0.4431": ("z18s6pemtnxm4k7", {"patch_stride": 14}),
    "audioset_16_16_0.4422": ("mdsa4t1xmcimia6", {"patch_stride": 16}),
    "speechcommands_10_10_0.9812": (
        "q0tbqpwv44pquwy",
        {"target_length": 128, "mean": -6.845978, "std": 5.5654526},
    ),
}
for _file, (_folder, _settings) in _PUBLISHED.items():
    register_model(f"ast_{_file}", weights=f"{_DROPBOX}/{_folder}/{_file}.pth?dl=1")(partial(AST, **_settings))
