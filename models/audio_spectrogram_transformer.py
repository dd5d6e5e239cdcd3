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
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.errors import Faults
from models.chunks import Average
from models.kaldi_mel import KaldiMel
from models.layers import initialise
from models.registry import register_model
from models.relatives import from_pictures, is_of_pictures
from models.token_merging import MergingSetting
from models.vit import SpectrogramTransformer, Tokens

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
        embed_dim: D.
        depth: number of blocks.
        num_heads: a divisor of D.
        mlp_ratio: hidden width of the MLPs in units of D.
        qkv_bias: whether queries, keys and values have a bias.
        norm_eps: of the layer norms of the blocks.
        target_length: input in frames: 1024 for AudioSet, 512 for ESC-50, 128 for Speech Commands.
        patch_size: edge of a patch, in bands and frames.
        patch_stride: from one patch to the next.
        eval_avg: how chunks of a long clip are joined, "mean" or "max" of their probabilities.
        drop_rate: dropout of tokens and projections.
        attn_drop_rate: dropout of attention weights.
        drop_path_rate: stochastic depth of the last block, rising linearly from 0.
        time_patch_out: random columns of the patch grid left out in training.
        freq_patch_out: random rows of the patch grid left out in training.
        token_merging: tokens merged away in each block, see `models.token_merging.merging_schedule`; or, for attention
            in which merged tokens count like others, {"r": those, "proportional": False}.
        token_merging_in_training: False: only in evaluation mode.
        sample_rate: of the waveform, in hertz.
        n_mels: F.
        mean: of the log mel values of the training data, which are brought to mean 0 and deviation 0.5.
        std: their standard deviation.

    Raises:
        UserError: arguments contradict each other; all faults are told at once.
    """

    fixed_length = True
    n_prefix = 2
    last_layer = "mlp_head.1"

    def __init__(
        self,
        *,
        num_classes: int = 527,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        norm_eps: float = 1e-6,
        target_length: int = 1024,
        patch_size: int = 16,
        patch_stride: int = 10,
        eval_avg: Average = "mean",
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        time_patch_out: int | None = None,
        freq_patch_out: int | None = None,
        token_merging: MergingSetting = None,
        token_merging_in_training: bool = True,
        sample_rate: int = 16000,
        n_mels: int = 128,
        mean: float = -4.2677393,
        std: float = 4.5689974,
    ) -> None:
        front_end = KaldiMel(sample_rate=sample_rate, n_mels=n_mels, mean=mean, std=std)
        self.fill = front_end.zero_value
        super().__init__(
            front_end,
            num_classes=num_classes,
            outputs="logits",
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            qkv_bias=qkv_bias,
            norm_eps=norm_eps,
            target_length=target_length,
            patch_size=patch_size,
            patch_stride=patch_stride,
            eval_avg=eval_avg,
            drop_rate=drop_rate,
            attn_drop_rate=attn_drop_rate,
            drop_path_rate=drop_path_rate,
            init_values=None,
            time_patch_out=time_patch_out,
            freq_patch_out=freq_patch_out,
            token_merging=token_merging,
            token_merging_in_training=token_merging_in_training,
            faults=Faults("the settings of AST"),
        )
        self.mlp_head = nn.Sequential(nn.LayerNorm(embed_dim), nn.Linear(embed_dim, num_classes))
        self.apply(initialise)

    def adapt_weights(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Take published AST checkpoints and image transformers, with a notice of what is changed.

        Positions of another grid are cropped to the middle, or stretched; patch weights of three colours are summed;
        ImageNet's last layers are left out.
        """
        of_audio = {key: value for key, value in state.items() if not key.startswith(("v.head.", "v.head_dist."))}
        adapted = {key.removeprefix("v."): value for key, value in of_audio.items()}  # published ones keep ImageNet's
        square = is_of_pictures(adapted)
        if square:
            adapted = from_pictures(adapted)
        positions = adapted.get("pos_embed")
        if positions is not None and positions.ndim == 3 and (square or positions.shape != self.pos_embed.shape):
            adapted["pos_embed"] = self._positions_of(positions, square)
        return adapted

    def no_weight_decay(self) -> set[str]:
        """Position embeddings and the two tokens before them."""
        return {"pos_embed", "cls_token", "dist_token"}

    def _positions_of(self, given: Tensor, square: bool) -> Tensor:
        """Fit positions (1,P+N,D) of another grid: of a square one, or of as many rows as ours."""
        n_rows, n_columns = self._grid
        n_given = given.shape[1] - self.n_prefix
        rows = math.isqrt(max(n_given, 1)) if square else n_rows
        if n_given < 1 or n_given % rows:
            return given  # told as a tensor of another shape
        grid = given[:, self.n_prefix :].transpose(1, 2).unflatten(2, (rows, n_given // rows))  # (1,D,f,t)
        logger.warning("pos_embed is fitted from %d x %d to %d x %d patches", rows, n_given // rows, n_rows, n_columns)
        for axis, wanted in ((2, n_rows), (3, n_columns)):
            there = grid.shape[axis]
            if there > wanted:
                grid = grid.narrow(axis, there // 2 - wanted // 2, wanted)
            elif there < wanted:
                size = (wanted, grid.shape[3]) if axis == 2 else (grid.shape[2], wanted)
                grid = F.interpolate(grid, size, mode="bilinear", align_corners=False)
        return torch.cat([given[:, : self.n_prefix], grid.flatten(2).transpose(1, 2)], dim=1)

    def _make_positions(self, n_rows: int, n_columns: int) -> None:
        self._grid = (n_rows, n_columns)
        self.cls_token = nn.Parameter(torch.randn(1, 1, self.embed_dim) * 0.02)
        self.dist_token = nn.Parameter(torch.randn(1, 1, self.embed_dim) * 0.02)
        self.pos_embed = nn.Parameter(torch.randn(1, self.n_prefix + n_rows * n_columns, self.embed_dim) * 0.02)

    def _placed(self, patches: Tensor, columns: Tensor | None = None) -> Tensor:
        return patches + self.pos_embed[:, self.n_prefix :].unflatten(1, self._grid)

    def _prefix(self) -> Tensor:
        return torch.cat([self.cls_token, self.dist_token], dim=1) + self.pos_embed[:, : self.n_prefix]

    def _clip_embeddings(self, tokens: Tokens) -> Tensor:
        assert tokens.prefix is not None
        return tokens.prefix.mean(1)

    def _classify(self, tokens: Tokens) -> Tensor:
        return self.mlp_head(self._clip_embeddings(tokens))


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
