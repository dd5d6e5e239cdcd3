"""MATPAC, MATPAC++ and M2D: a ViT on 80 mel bands with fixed positions, whose embedding keeps frequency rows apart.

Methods: Quelennec et al., "Masked latent prediction and classification for self-supervised audio representation
learning", ICASSP 2025 (MATPAC), and "MATPAC++", arXiv 2508.12709; Niizumi et al., "Masked modeling duo", ICASSP 2023
(M2D). The three train the same network differently. It computes what MATPAC's published code does in its mode
'precise' (its mode 'fast' mixes up the columns of long clips in a batch).

MATPAC's layout is verified against values of the published code. Names of MATPAC++'s and M2D's tensors, and M2D's
front-end (centred frames, mean -7.1 and deviation 4.2), are those of their published code, not compared with a
published file. Files are read by `models.matpac_checkpoints`.

Letters as in `models.vit`; E embedding width.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.errors import Faults, UserError
from models.base import Encoded
from models.chunks import split
from models.layers import initialise
from models.matpac_mel import MatpacMel
from models.registry import register_model
from models.settings import MelSettings, Number, Positive, TransformerSettings, take_settings
from models.vit import SpectrogramTransformer

logger = logging.getLogger(__name__)

MatpacPooling = Literal["rows", "mean"]
_TABLE_ERROR = 1e-3  # of published positions, which may have been rounded to half precision


class HeadNorm(nn.BatchNorm1d):
    """Batch norm without parameters, as published; a batch of one clip, which has no deviation, uses the statistics."""

    def __init__(self, width: int) -> None:
        super().__init__(width, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B,E) -> (B,E)."""
        if self.training and len(x) == 1:
            return F.batch_norm(x, self.running_mean, self.running_var, eps=self.eps)
        return super().forward(x)


class MATPAC(SpectrogramTransformer):
    """MATPAC's network; gives logits.

    A clip is padded with zeros, on the standardised scale, to whole patches, and cut into chunks of `target_length`
    frames, the last one as short as it is. Its embedding is the mean over all of its patch columns, a column being its
    frequency rows side by side: 5 x 768 values as published. Classes are computed from that embedding.

    Args:
        num_classes: C.
        pooling: "rows" (E = f D, frequency rows side by side) or "mean" (E = D, their mean, as in the classifier that
            was fine-tuned on AudioSet).
        norm_eps: of the layer norms.
        mean: see `MatpacMel`.
        std: see `MatpacMel`.
        center: see `MatpacMel`.
        **settings: those of `TransformerSettings` and `MelSettings` (`models.settings`), by default `shared_settings`.
            `target_length` is a multiple of the patch, patches do not overlap, and rows are not dropped in training.

    Raises:
        UserError: arguments contradict each other; all faults are listed at once.
    """

    n_prefix = 1
    last_layer = "head.1"
    shared_settings: ClassVar[tuple[TransformerSettings, MelSettings]] = (
        TransformerSettings(target_length=608),
        MatpacMel.defaults,
    )

    def __init__(
        self,
        *,
        num_classes: int = 527,
        pooling: MatpacPooling = "rows",
        norm_eps: Number = 1e-6,
        mean: Number = -7.056,
        std: Positive = 4.193,
        center: bool = False,
        **settings: Any,
    ) -> None:
        transformer, mel = take_settings(self.shared_settings, settings)
        front_end = MatpacMel(**asdict(mel), mean=mean, std=std, center=center)
        faults = Faults("the settings of MATPAC")
        if pooling not in ("rows", "mean"):
            faults.add(f"pooling must be rows or mean, not {pooling!r}")
        (n_bands, n_frames), length = transformer.patch_shape, transformer.target_length
        if transformer.patch_strides != (n_bands, n_frames) or length % n_frames:
            faults.add(
                f"patches of {transformer.patch_size} with a patch_stride of {transformer.patch_stride} in a "
                f"target_length of {length}: they must lie side by side and fill it"
            )
        if transformer.freq_patch_out:
            faults.add("freq_patch_out must be 0: an embedding has a place for every row")
        if transformer.eval_avg != "mean":
            faults.add("eval_avg must be mean: classes are computed from the mean over all chunks")
        if transformer.embed_dim % 4:
            faults.add(f"embed_dim {transformer.embed_dim} must be a multiple of 4, for positions of two axes")
        self.pooling = pooling
        rows = mel.n_mels // n_bands if pooling == "rows" else 1
        super().__init__(
            front_end,
            transformer,
            num_classes=num_classes,
            outputs="logits",
            norm_eps=norm_eps,
            faults=faults,
            embed_dim=rows * transformer.embed_dim,
        )
        self.head = nn.Sequential(HeadNorm(self.embed_dim), nn.Linear(self.embed_dim, num_classes))
        self.apply(initialise)

    def _make_positions(self, n_rows: int, n_columns: int) -> None:
        self._grid = (n_rows, n_columns)
        self.cls_token = nn.Parameter(torch.randn(1, 1, self.width) * 0.02)
        self.register_buffer("pos_embed", compute_positions(self.width, n_rows, n_columns))

    def _add_positions(self, patches: Tensor, columns: Tensor | None = None) -> Tensor:
        grid = self.get_buffer("pos_embed")[:, 1:].unflatten(1, self._grid)  # (1,f,t,D)
        return patches + grid[:, :, : patches.shape[2]]

    def _prefix_tokens(self) -> Tensor:
        return self.cls_token + self.get_buffer("pos_embed")[:, :1]

    def adapt_weights(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compute positions anew for a network of another `target_length`, with a notice."""
        given, own = state.get("pos_embed"), self.get_buffer("pos_embed")
        if given is None or given.ndim != 3 or given.shape == own.shape or given.shape[2] != self.width:
            return dict(state)
        n_rows, n_columns = self._grid
        n_given = (given.shape[1] - 1) // n_rows
        table = compute_positions(self.width, n_rows, n_given)
        if table.shape != given.shape or not torch.allclose(given.float(), table, rtol=0, atol=_TABLE_ERROR):
            return dict(state)  # reported as a tensor of another shape
        logger.warning("pos_embed is computed for %d in place of %d patch columns", n_columns, n_given)
        return dict(state) | {"pos_embed": own}

    def no_weight_decay(self) -> set[str]:
        """The class token."""
        return {"cls_token"}

    def n_steps(self, n_samples: int) -> int:
        """Patch columns that a clip of `n_samples` has, the last one padded."""
        return -(-self.front_end.n_frames(n_samples) // self.patch_size)

    def grid(self, n_frames: int) -> tuple[int, int]:
        """Rows and columns of the patches of spectrograms of `n_frames` frames, the last column padded."""
        return self.n_rows, -(-n_frames // self.patch_size)

    def _split_chunks(self, mel: Tensor, n_frames: Tensor | None) -> tuple[Tensor, Tensor | None, Encoded]:
        """Pad clips to whole patches and cut long ones into chunks, of which only their own columns take part."""
        n_clips, n_mels, n_total = mel.shape
        if n_mels != self.front_end.n_mels or n_total < 1:
            raise UserError(
                f"{self.name} takes spectrograms of {self.front_end.n_mels} bands and at least 1 frame, not {n_mels} "
                f"bands and {n_total} frames"
            )
        if n_frames is not None:
            n_frames = n_frames.to(mel.device)
        chunk = min(self.target_length, -(-n_total // self.patch_size) * self.patch_size)
        rows, inside, clip = split(mel, n_frames, chunk)
        if n_total <= chunk and n_frames is None:
            return rows, None, Encoded(n_clips)
        columns = -(-inside // self.patch_size)
        encoded = Encoded(n_clips, n_steps=columns)
        if n_total > chunk:
            encoded.clip_of_row, encoded.weights = clip, inside
        return rows, columns, encoded

    def _encode_shapes(self, mel: Tensor, layers: Sequence[int] = ()) -> tuple[Encoded, Tensor]:
        """Encode spectrograms (B,F,T) as rows of B x chunks; which frames of a chunk are its clip's (chunks,frames)."""
        batch, _, n_frames = mel.shape
        n_columns = (n_frames + self.patch_size - 1) // self.patch_size
        chunk_columns = torch.sym_min(n_columns, self.target_length // self.patch_size)
        n_chunks = (n_columns + chunk_columns - 1) // chunk_columns
        chunk = chunk_columns * self.patch_size
        behind = (0, n_chunks * chunk - n_frames)
        inside = F.pad(mel.new_ones(n_frames), behind).reshape(n_chunks, chunk)
        columns = (n_columns - torch.arange(n_chunks, device=mel.device) * chunk_columns).clamp(max=chunk_columns)
        mel = F.pad(mel, behind)
        chunks = mel.transpose(1, 2).reshape(batch * n_chunks, chunk, mel.shape[1]).transpose(1, 2)  # (R,F,chunk)
        return self._encode_rows(chunks, columns.repeat(batch), Encoded(batch), layers=layers), inside

    def _columns(self, encoded: Encoded) -> Tensor:
        """Columns (R,t,E), or the tokens that `keep` chose (R,N',D)."""
        if self.pooling == "mean" or encoded.kept is not None:
            return super()._columns(encoded)
        assert encoded.tokens is not None
        return encoded.tokens.transpose(1, 2).flatten(2)

    def pool(self, encoded: Encoded) -> Tensor:
        """Embed clips: (B,E); where `keep` chose tokens, the mean of each row's own ones, 0 for a row without any."""
        if self.pooling == "mean" or encoded.kept is None:
            return super().pool(encoded)
        assert encoded.tokens is not None
        n_rows, n_columns = encoded.grid
        in_row = F.one_hot(encoded.kept // n_columns, n_rows).to(encoded.tokens.dtype)  # (R,N',f)
        if encoded.n_steps is not None:
            in_row = in_row * (encoded.kept % n_columns < encoded.n_steps[:, None])[..., None]
        total, number = in_row.mT @ encoded.tokens, in_row.sum(1)  # (R,f,D), (R,f)
        if encoded.clip_of_row is not None:
            total = total.new_zeros(encoded.n_clips, *total.shape[1:]).index_add_(0, encoded.clip_of_row, total)
            number = number.new_zeros(encoded.n_clips, n_rows).index_add_(0, encoded.clip_of_row, number)
        return (total / number.clamp(min=1)[..., None]).flatten(1)

    def classify(self, encoded: Encoded) -> Tensor:
        """Classify the embeddings of clips: logits (B,C)."""
        return self.head(self.pool(encoded))

    def forward_export(self, mel: Tensor) -> Tensor:
        """Probabilities of spectrograms of any length (B,F,T) -> (B,C), with operations on shapes alone, for graphs."""
        return self.probabilities(self.head(self.embed_export(mel)))


def compute_positions(width: int, n_rows: int, n_columns: int) -> Tensor:
    """Compute the fixed positions of a class token and a grid of patches: (1, 1 + f t, D), as in MAE.

    Zeros for the class token; for a patch the sines and cosines of its column in the first half, those of its row in
    the second.
    """
    rates = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(max(n_rows, n_columns), dtype=torch.float64)[:, None] * rates
    waves = torch.cat([angles.sin(), angles.cos()], 1)  # (places, D/2)
    time = waves[:n_columns].expand(n_rows, -1, -1)
    frequency = waves[:n_rows, None].expand(-1, n_columns, -1)
    grid = torch.cat([time, frequency], 2).flatten(0, 1)
    return F.pad(grid, (0, 0, 1, 0))[None].float()


_RELEASES = "https://github.com/aurianworld/matpac/releases/download"
register_model("matpac", weights=f"{_RELEASES}/Initial_release/matpac_10_2048.pt")(MATPAC)
register_model("matpac_plus", weights=f"{_RELEASES}/MATPAC%2B%2B/matpac_plus_6s_2048_enconly.pt")(MATPAC)
register_model("m2d")(partial(MATPAC, mean=-7.1, std=4.2, center=True))  # published as a zip archive
# width, heads, depth: this project's own, to be trained on CPUs and in tests
SIZES = {"pico": (64, 1, 4), "tiny": (192, 3, 12), "small": (384, 6, 12)}
for _size, (_width, _heads, _depth) in SIZES.items():
    register_model(f"matpac_{_size}")(partial(MATPAC, embed_dim=_width, num_heads=_heads, depth=_depth))
