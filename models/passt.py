"""PaSST: a ViT on overlapping patches with separate position embeddings for time and frequency, trained on parts.

Method: Koutini, Schlüter, Eghbal-zadeh, Widmer, "Efficient training of audio transformers with patchout", Interspeech
2022. Names in the state dict are those of the published checkpoints.

Letters as in `models.vit`.
"""

import logging
import math
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.errors import Faults
from models.base import Encoded
from models.efficientat_mel import EfficientAtMel
from models.frontends import SILENCE_DB
from models.layers import initialise
from models.registry import register_model
from models.settings import HertzRange, MelSettings, Number, TransformerSettings, take_settings
from models.vit import SpectrogramTransformer
from models.weight_adaptation import adapt_image_weights, fit_time_embedding, is_image_transformer

logger = logging.getLogger(__name__)


class PaSST(SpectrogramTransformer):
    """PaSST's network; gives logits.

    Shorter clips use the first time positions, and in training as many from a random one on, as published. Published
    code leaves out the columns of longer clips that have no position; here they are taken in chunks, the last one
    filled up with silence, by whose own frames the probabilities are weighed, since a clip's end may hold what its
    beginning does not. Fewer frames more than make a patch change nothing, and the result is the published one.

    Args:
        num_classes: C.
        norm_eps: of the layer norms of the blocks.
        fmin_aug_range: in training, `f_min` is raised by a random whole number below this for each batch: 10 in
            published training, 1 for never.
        fmax_aug_range: in training, `f_max` is moved at random within a range of this many hertz: 2000 in published
            training, 1 for never.
        **settings: those of `TransformerSettings` and `MelSettings` (`models.settings`), by default `shared_settings`.
            `target_length`: ten seconds are 1000; 998 in published code, with as many patches. `patch_stride`: 10 to 16
            in published checkpoints, 20 leaves gaps. In published training, `time_patch_out` is 40 and
            `freq_patch_out` 4.

    Raises:
        UserError: arguments contradict each other; all faults are listed at once.
    """

    n_prefix = 2
    last_layer = "head.1"
    shared_settings: ClassVar[tuple[TransformerSettings, MelSettings]] = (
        TransformerSettings(target_length=1000, patch_stride=10),
        EfficientAtMel.defaults,
    )

    def __init__(
        self,
        *,
        num_classes: int = 527,
        norm_eps: Number = 1e-6,
        fmin_aug_range: HertzRange = 1,
        fmax_aug_range: HertzRange = 1,
        **settings: Any,
    ) -> None:
        transformer, mel = take_settings(self.shared_settings, settings)
        front_end = EfficientAtMel(**asdict(mel), min_frames=transformer.patch_shape[1])
        front_end.vary_edges(fmin_aug_range, fmax_aug_range)
        self.fill = front_end.power_db_to_value(SILENCE_DB)
        faults = Faults("the settings of PaSST")
        super().__init__(
            front_end, transformer, num_classes=num_classes, outputs="logits", norm_eps=norm_eps, faults=faults
        )
        self.head = nn.Sequential(nn.LayerNorm(self.embed_dim), nn.Linear(self.embed_dim, num_classes))
        # Part of published checkpoints and of no computation: without a gradient, so that no rank waits for one.
        self.head_dist = nn.Linear(self.embed_dim, num_classes).requires_grad_(False)
        self.apply(initialise)

    def adapt_weights(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Take PaSST for other lengths and other classes, and image transformers, with a notice of what is changed.

        Positions of pictures are stretched to this grid; their means over one axis are those of the other, as
        published.
        """
        adapted = dict(state)
        if is_image_transformer(adapted) and "pos_embed" in adapted:
            positions = adapted.pop("pos_embed")
            adapted = adapt_image_weights(adapted) | self._split_positions(positions)
        if "time_new_pos_embed" in adapted:
            given, expected = adapted["time_new_pos_embed"], self.time_new_pos_embed.shape[-1]
            adapted["time_new_pos_embed"] = fit_time_embedding("time_new_pos_embed", given, expected)
        for key, own in self.head_dist.state_dict(prefix="head_dist.").items():
            if key not in adapted or adapted[key].shape != own.shape:
                adapted[key] = own
        return adapted

    def no_weight_decay(self) -> set[str]:
        """Position embeddings and the two tokens before them."""
        return {"new_pos_embed", "freq_new_pos_embed", "time_new_pos_embed", "cls_token", "dist_token"}

    def _split_positions(self, positions: Tensor) -> dict[str, Tensor]:
        """Positions (1,P+N,D) of a square grid as those of PaSST."""
        size = (self.freq_new_pos_embed.shape[2], self.time_new_pos_embed.shape[3])
        edge = math.isqrt(positions.shape[1] - self.n_prefix)
        if edge**2 + self.n_prefix != positions.shape[1]:
            return {"pos_embed": positions}  # reported as unexpected
        logger.warning("pos_embed of %d x %d patches becomes one of %d rows and one of %d columns", edge, edge, *size)
        grid = positions[:, self.n_prefix :].transpose(1, 2).unflatten(2, (edge, edge))  # (1,D,f,t)
        grid = F.interpolate(grid, size, mode="bicubic", align_corners=False)
        return {
            "new_pos_embed": positions[:, : self.n_prefix],
            "freq_new_pos_embed": grid.mean(3, keepdim=True),
            "time_new_pos_embed": grid.mean(2, keepdim=True),
        }

    def _make_positions(self, n_rows: int, n_columns: int) -> None:
        self.cls_token = nn.Parameter(torch.randn(1, 1, self.embed_dim) * 0.02)
        self.dist_token = nn.Parameter(torch.randn(1, 1, self.embed_dim) * 0.02)
        self.new_pos_embed = nn.Parameter(torch.randn(1, self.n_prefix, self.embed_dim) * 0.02)
        self.freq_new_pos_embed = nn.Parameter(torch.randn(1, self.embed_dim, n_rows, 1) * 0.02)
        self.time_new_pos_embed = nn.Parameter(torch.randn(1, self.embed_dim, 1, n_columns) * 0.02)

    def _add_positions(self, patches: Tensor, columns: Tensor | None = None) -> Tensor:
        time = self._time_positions(patches.shape[2], columns)  # (1,1,t,D) or (R,1,t,D)
        return patches + (time + self.freq_new_pos_embed.permute(0, 2, 3, 1))

    def _time_positions(self, n_columns: int, columns: Tensor | None) -> Tensor:
        """Positions of the first columns; in training of as many from a random one on.

        One number is drawn for the whole batch, always, so that what patch-out draws next does not depend on lengths;
        where it puts a clip depends on the clip's own columns (R,) alone.
        """
        positions = self.time_new_pos_embed[0, :, 0].T  # (t of the grid, D)
        if not self.training:
            return positions[:n_columns][None, None]
        device = positions.device
        source = device if self.generator is None else self.generator.device
        draw = torch.rand(1, generator=self.generator, device=source).to(device)
        used = torch.tensor([n_columns], device=device) if columns is None else columns
        free = len(positions) - used
        first = torch.minimum((draw * (free + 1)).long(), free)  # a product of floats may be rounded up
        place = first[:, None] + torch.arange(n_columns, device=device)
        return positions[place.clamp(max=len(positions) - 1)][:, None]  # padding has any position

    def _prefix_tokens(self) -> Tensor:
        return torch.cat([self.cls_token, self.dist_token], dim=1) + self.new_pos_embed

    def pool_rows(self, encoded: Encoded) -> Tensor:
        """Embed rows by the mean of the two tokens before the patches: (R,D)."""
        assert encoded.prefix is not None
        return encoded.prefix.mean(1)

    def classify_rows(self, encoded: Encoded) -> Tensor:
        """Tag rows: logits (R,C)."""
        return self.head(self.pool_rows(encoded))


_RELEASES = "https://github.com/kkoutini/PaSST/releases/download"
# published name -> file of the releases and settings; lengths that give as many positions as the file has
_PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "passt_s_swa_p16_128_ap476": ("v0.0.1-audioset/passt-s-f128-p16-s10-ap.476-swa.pt", {}),
    "passt_s_swa_p16_128_ap4761": ("v0.0.2-audioset/passt-s-f128-p16-s10-ap.4761-swa.pt", {}),
    "passt_s_p16_128_ap472": ("v0.0.2-audioset/passt-s-f128-p16-s10-ap.472.pt", {}),
    "passt_s_swa_p16_s12_128_ap473": ("v0.0.2-audioset/passt-s-f128-p16-s12-ap.473-swa.pt", {"patch_stride": 12}),
    "passt_s_p16_s12_128_ap470": ("v0.0.2-audioset/passt-s-f128-p16-s12-ap.470.pt", {"patch_stride": 12}),
    "passt_s_swa_p16_s14_128_ap471": ("v0.0.2-audioset/passt-s-f128-p16-s14-ap.471-swa.pt", {"patch_stride": 14}),
    "passt_s_p16_s14_128_ap469": ("v0.0.2-audioset/passt-s-f128-p16-s14-ap.469.pt", {"patch_stride": 14}),
    "passt_s_swa_p16_s16_128_ap473": ("v0.0.2-audioset/passt-s-f128-p16-s16-ap.473-swa.pt", {"patch_stride": 16}),
    "passt_s_p16_s16_128_ap468": ("v0.0.2-audioset/passt-s-f128-p16-s16-ap.468.pt", {"patch_stride": 16}),
    "passt_s_f128_20sec_p16_s10_ap474": ("v0.0.5/passt-s-f128-20sec-p16-s10-ap.474-swa.pt", {"target_length": 2006}),
    "passt_s_f128_30sec_p16_s10_ap473": ("v0.0.5/passt-s-f128-30sec-p16-s10-ap.473-swa.pt", {"target_length": 3006}),
    "passt_s_kd_p16_128_ap486": ("v.0.0.9/passt-s-kd-ap.486.pt", {}),
    "passt_l_kd_p16_128_ap47": ("v.0.0.10/passt-l-kd-ap.47.pt", {"depth": 7}),
}
for _name, (_file, _settings) in _PUBLISHED.items():
    register_model(_name, weights=f"{_RELEASES}/{_file}")(partial(PaSST, **_settings))
register_model(
    "passt_s",
    weights=f"{_RELEASES}/{_PUBLISHED['passt_s_swa_p16_128_ap476'][0]}",
    initialisation="timm:deit_base_distilled_patch16_384",
)(PaSST)
# this project's own, for CPUs and tests
register_model("passt_pico")(partial(PaSST, embed_dim=64, num_heads=1, depth=4))
