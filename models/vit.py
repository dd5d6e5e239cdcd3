"""What all vision transformers on spectrograms share: patches, chunks of long clips, padding, chosen and merged tokens.

Letters: B batch, F mel bands, T frames, C classes, D width, f and t rows and columns of the patch grid, N = f t tokens
(frequency-major), P prefix tokens (class, distillation), R rows of the network's batch: a clip, or a chunk of a long
one.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.errors import Faults, UserError
from models.base import AudioTagger, Encoded, Keep, Outputs
from models.chunks import Count, drop_remainder, join, join_logits, join_steps, mean_of_chunks, split
from models.frontends import SILENCE_DB, FrontEnd
from models.layers import Block, PatchEmbed, build_blocks
from models.patch_out import draw_patch_out
from models.settings import TransformerSettings
from models.token_merging import MergingSetting, TokenGroups, merging_schedule, split_setting, take_tokens


class SpectrogramTransformer(AudioTagger):
    """A ViT on mel patches; subclasses bring positions, prefix tokens, normalisation and head.

    Clips longer than `target_length` frames are cut into chunks of that many, the last one filled up; the
    probabilities of all chunks are averaged as set by `eval_avg`. Each chunk counts by its own frames, and a remainder
    shorter than a patch is left out (see `models.chunks`), unless a subclass has `equal_chunks`.

    Args:
        front_end: waveform to spectrogram.
        settings: of the network.
        num_classes: C.
        outputs: whether the head gives "logits" or "probabilities".
        norm_eps: of the layer norms.
        faults: what a subclass has found wrong with its own arguments.
        embed_dim: width E of clip embeddings and time steps, None for that of a token.

    Attributes:
        width: D of a token.
        n_rows: f.
        patch_size: frames of a patch.
        patch_stride: frames from one patch to the next.

    Raises:
        UserError: arguments contradict each other; all faults are listed at once.
    """

    masks_padding = True
    fixed_length: ClassVar[bool] = False  # shorter clips are filled up to `target_length` too, and all of it takes part
    equal_chunks: ClassVar[bool] = False  # every chunk counts the same, however little of it is the clip's own
    partial_columns: ClassVar[bool] = True  # columns of a filled-up chunk count that are its clip's in part
    fill: float = 0.0  # what is filled up reads, on the normalised scale
    n_prefix: int = 0  # P

    def __init__(
        self,
        front_end: FrontEnd,
        settings: TransformerSettings,
        *,
        num_classes: int,
        outputs: Outputs,
        norm_eps: float,
        faults: Faults,
        embed_dim: int | None = None,
    ) -> None:
        width, strides = settings.embed_dim, settings.patch_strides
        n_bands, patch_size = settings.patch_shape
        settings.add_faults(faults, front_end.n_mels)
        try:
            r, proportional = split_setting(settings.token_merging)
            schedule = merging_schedule(r, settings.depth)
        except UserError as error:
            faults.add(str(error))
        faults.raise_if_any()
        super().__init__(front_end, num_classes=num_classes, embed_dim=embed_dim or width, outputs=outputs)
        self.width, self.eval_avg, self.target_length = width, settings.eval_avg, settings.target_length
        self.patch_size, self.patch_stride = patch_size, strides[1]
        self.n_rows = (front_end.n_mels - n_bands) // strides[0] + 1
        self._needed_frames = 0 if self.partial_columns else patch_size - 1  # of the clip, beyond a column's first one
        self.time_patch_out, self.freq_patch_out = settings.time_patch_out or 0, settings.freq_patch_out or 0
        self.merges_in_training = settings.token_merging_in_training
        self.patch_embed = PatchEmbed(width, settings.patch_shape, strides)
        self._make_positions(self.n_rows, self._count_columns(settings.target_length))
        self.pos_drop = nn.Dropout(settings.drop_rate)
        self.blocks = build_blocks(settings, norm_eps)
        self.norm = nn.LayerNorm(width, eps=norm_eps)
        self.merged_tokens, self.proportional_attention = schedule, proportional

    def _make_positions(self, n_rows: int, n_columns: int) -> None:
        """Make the parameters of positions and prefix tokens, for a grid of that size."""
        raise NotImplementedError

    def _add_positions(self, patches: Tensor, columns: Tensor | None = None) -> Tensor:
        """Add positions to patches: (R,f,t,D), columns that take part (R,) or None for all -> (R,f,t,D)."""
        raise NotImplementedError

    def _prefix_tokens(self) -> Tensor | None:
        """Tokens before the patches, with their positions, (1,P,D); None for none."""
        return None

    def _normalise(self, mel: Tensor, n_frames: Tensor | None) -> Tensor:
        """Normalise what the front-end gave, (B,F,T) -> (B,F,T); own frames (B,) or None."""
        return mel

    def classify_rows(self, encoded: Encoded) -> Tensor:
        """Classify rows: (R,C), see `outputs`."""
        raise NotImplementedError

    def pool_rows(self, encoded: Encoded) -> Tensor | None:
        """Embed rows: (R,D), or None where a clip's embedding is the mean of its own columns."""
        return None

    def merge_tokens(self, setting: MergingSetting) -> None:
        """Set `token_merging` of all further calls; 0 turns it off.

        Raises:
            UserError: it is no such setting.
        """
        r, proportional = split_setting(setting)
        self.merged_tokens, self.proportional_attention = merging_schedule(r, len(self.blocks)), proportional
        self.arguments["token_merging"] = setting

    def encode(
        self, mel: Tensor, n_frames: Tensor | None = None, *, keep: Keep | None = None, layers: Sequence[int] = ()
    ) -> Encoded:
        """Compute the tokens after the final norm, of clips of any length; see `AudioTagger.encode`.

        With `keep`, patch-out leaves nothing out besides; where it chooses padding, that is masked in attention.

        Raises:
            UserError: another number of bands, too few frames for one patch, or no such block.
        """
        self.check_layers(layers)
        rows, columns, encoded = self._split_chunks(mel, n_frames)
        return self._encode_rows(rows, columns, encoded, keep, layers)

    def classify(self, encoded: Encoded) -> Tensor:
        """Classify: (B,C), see `outputs`; the probabilities of a clip's chunks are joined."""
        output, clip = self.classify_rows(encoded), encoded.clip_of_row
        if clip is None:
            return output
        if self.outputs == "logits":
            return join_logits(output, clip, encoded.n_clips, self.eval_avg, self.activation, encoded.weights)
        return join(output, clip, encoded.n_clips, self.eval_avg, encoded.weights)

    def pool(self, encoded: Encoded) -> Tensor:
        """Embed clips: (B,D).

        The mean of a clip's prefix tokens where the head reads these, chunks averaged by their frames; else the mean of
        its own columns, or of those of its own tokens that `keep` chose.
        """
        rows, clip = self.pool_rows(encoded), encoded.clip_of_row
        if rows is not None:
            return rows if clip is None else join(rows, clip, encoded.n_clips, "mean", encoded.weights)
        columns, n_columns = self._join_columns(encoded)
        return columns.mean(1) if n_columns is None else columns.sum(1) / n_columns.clamp(min=1)[:, None]

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    def pool_layers(self, encoded: Encoded) -> dict[int, Tensor]:
        """Embed clips by each block in `encoded.layers`: (B,D) each, see `AudioTagger.pool_layers`."""
        return {layer: self.pool(self._replace_tokens(encoded, layer)) for layer in encoded.layers}

    def _replace_tokens(self, encoded: Encoded, layer: int) -> Encoded:
        """Put the tokens of an inner block in place of those after the final norm."""
        if layer % self.n_layers == self.n_layers - 1:
            return encoded
        prefix, tokens = encoded.layers[layer].tensor_split([self.n_prefix], 1)
        grid = tokens if encoded.kept is not None else tokens.unflatten(1, encoded.grid)
        return replace(encoded, tokens=grid, prefix=prefix if self.n_prefix else None)

    def frames(self, encoded: Encoded) -> Tensor:
        """Embed time steps: the mean over frequency for every patch column (B,T',D), zero behind a clip's end.

        Raises:
            UserError: `keep` has left no columns.
        """
        if encoded.kept is not None:
            raise UserError(f"{self.name}: tokens that `keep` chose are no time steps; encode without it for these")
        columns, n_columns = self._join_columns(encoded)
        return columns if n_columns is None else columns[:, : int(n_columns.max())]

    def _columns(self, encoded: Encoded) -> Tensor:
        """Means over frequency (R,t,D), or the tokens that `keep` chose (R,N',D)."""
        assert encoded.tokens is not None
        return encoded.tokens.mean(1) if encoded.kept is None else encoded.tokens

    def _join_columns(self, encoded: Encoded) -> tuple[Tensor, Tensor | None]:
        """A clip's columns over all its rows, zero where they are not its own, (B,T',D), and their number (B,).

        None for the number where all are the clip's own; chosen tokens are columns, too.
        """
        columns = self._columns(encoded)
        if encoded.n_steps is None:
            return columns, None
        every = torch.arange(columns.shape[1], device=columns.device)
        step = every if encoded.kept is None else encoded.kept % encoded.grid[1]
        return join_steps(columns, step < encoded.n_steps[:, None], encoded.clip_of_row, encoded.n_clips)

    def forward_export(self, mel: Tensor) -> Tensor:
        """Probabilities of spectrograms of any length (B,F,T) -> (B,C), with operations on shapes alone, for graphs.

        Chunks as in `forward_spectrogram`; fewer frames than one patch are followed by silence.
        """
        encoded, inside = self._encode_shapes(mel)
        # Sizes by `shape`: `len` would make a tracer take that of its example for all.
        found = self.probabilities(self.classify_rows(encoded)).unflatten(0, (mel.shape[0], inside.shape[0]))
        return found.amax(1) if self.eval_avg == "max" else self._mean_export(found, inside)

    def embed_export(self, mel: Tensor) -> Tensor:
        """Clip embeddings of spectrograms of any length (B,F,T) -> (B,D), with operations on shapes alone, for graphs.

        Chunks as in `embed_spectrogram`; fewer frames than one patch are followed by silence.
        """
        return self._pool_shapes(*self._encode_shapes(mel))

    def embed_layers_export(self, mel: Tensor, layers: Sequence[int]) -> list[Tensor]:
        """Clip embeddings of layers of spectrograms (B,F,T) -> (B,D) each; see `embed_export`."""
        encoded, inside = self._encode_shapes(mel, layers)
        return [self._pool_shapes(self._replace_tokens(encoded, layer), inside) for layer in layers]

    def _pool_shapes(self, encoded: Encoded, inside: Tensor) -> Tensor:
        """Embed clips as `pool`, with operations on shapes alone: rows of all clips, `inside` (chunks,T) -> (B,D)."""
        n_clips = encoded.n_clips
        rows, by_clip = self.pool_rows(encoded), (n_clips, inside.shape[0])
        if rows is not None:
            return self._mean_export(rows.unflatten(0, by_clip), inside)
        columns = self._columns(encoded)  # (R,t,D)
        # As `_count_covered_columns`: all of a chunk that is full.
        counted = inside[:, self._needed_frames :: self.patch_stride][:, : columns.shape[1]].repeat(n_clips, 1)  # (R,t)
        if encoded.valid is not None:
            counted = counted * encoded.valid
        total = (columns * counted[..., None]).unflatten(0, by_clip).sum((1, 2))
        return total / counted.unflatten(0, by_clip).sum((1, 2))[:, None]

    def _mean_export(self, x: Tensor, inside: Tensor) -> Tensor:
        return x.mean(1) if self.equal_chunks else mean_of_chunks(x, inside)

    def _encode_shapes(self, mel: Tensor, layers: Sequence[int] = ()) -> tuple[Encoded, Tensor]:
        """Encode spectrograms of any length (B,F,T) as rows of B x chunks; and which frames of a chunk are its clip's.

        Returns:
            What is computed of them, and 1 or 0 for each frame of the chunks of a clip (chunks, frames).
        """
        batch, _, n_frames = mel.shape
        if not self.fixed_length:
            silence = self.front_end.power_db_to_value(SILENCE_DB)
            mel = F.pad(mel, (0, torch.sym_max(self.patch_size - n_frames, 0)), value=silence)
        n_frames = mel.shape[2]
        if self.equal_chunks:
            n_chunks = (n_frames + self.target_length - 1) // self.target_length
        else:  # as `drop_remainder`
            n_chunks = torch.sym_max((n_frames - self.patch_size) // self.target_length + 1, 1)
            n_frames = torch.sym_min(n_frames, n_chunks * self.target_length)
            mel = mel.narrow(2, 0, n_frames)  # the length of a slice would be unknown to a tracer
        chunk = self.target_length if self.fixed_length else torch.sym_min(n_frames, self.target_length)
        columns = None
        if any(self.merged_tokens) and not self.fixed_length:
            # Numbers of tokens that hang on the clip's length, block after block, keep a tracer busy for hours: short
            # clips are padded, and masked as beside longer ones.
            columns = torch.full((batch * n_chunks,), self._count_columns(chunk), device=mel.device)
            chunk = self.target_length
        behind = (0, n_chunks * chunk - n_frames)
        inside = F.pad(mel.new_ones(n_frames), behind).reshape(n_chunks, chunk)
        mel = F.pad(self._normalise(mel, None), behind, value=self.fill)
        chunks = mel.transpose(1, 2).reshape(batch * n_chunks, chunk, mel.shape[1]).transpose(1, 2)  # (R,F,chunk)
        return self._encode_rows(chunks, columns, Encoded(mel.shape[0]), layers=layers), inside

    def n_steps(self, n_samples: int) -> int:
        """Patch columns that a clip of `n_samples` has, over all its chunks."""
        n_frames = self._count_usable_frames(self.front_end.n_frames(n_samples))
        if n_frames <= self.target_length and not self.fixed_length:
            return self._count_columns(n_frames)
        n_full = (n_frames - 1) // self.target_length
        rest = torch.tensor(n_frames - n_full * self.target_length)
        return n_full * self._count_columns(self.target_length) + int(self._count_covered_columns(rest))

    def grid(self, n_frames: int) -> tuple[int, int]:
        """Rows and columns of the patches of spectrograms of `n_frames` frames, at most `target_length`."""
        n_frames = self.target_length if self.fixed_length else self._count_usable_frames(n_frames)
        return self.n_rows, self._count_columns(n_frames)

    def _count_columns(self, n_frames: int) -> int:
        return (n_frames - self.patch_size) // self.patch_stride + 1

    def _count_usable_frames(self, n_frames: Count) -> Count:
        """Frames that take part, of clips of `n_frames`."""
        return n_frames if self.equal_chunks else drop_remainder(n_frames, self.target_length, self.patch_size)

    def _count_covered_columns(self, n_frames: Tensor) -> Tensor:
        """Columns that count of filled-up chunks, of which the first `n_frames` (R,) frames are the clip's."""
        covered = -(-(n_frames - self._needed_frames) // self.patch_stride)
        return covered.clamp(min=0, max=self._count_columns(self.target_length))

    def _split_chunks(self, mel: Tensor, n_frames: Tensor | None) -> tuple[Tensor, Tensor | None, Encoded]:
        """Normalise, and cut long clips into chunks; the padding of one chunk counts, padding of a batch does not.

        Returns:
            Rows (R,F,T') of at most `target_length` frames, the columns of each that take part (R,), None where all do,
            and whose rows they are.
        """
        n_clips, n_mels, n_total = mel.shape
        least = 1 if self.fixed_length else self.patch_size
        if n_mels != self.front_end.n_mels or n_total < least:
            raise UserError(
                f"{self.name} takes spectrograms of {self.front_end.n_mels} bands and at least {least} "
                f"frames, not {n_mels} bands and {n_total} frames"
            )
        if n_frames is not None:
            n_frames = self._count_usable_frames(n_frames.to(mel.device))
        n_total = self._count_usable_frames(n_total)
        mel = self._normalise(mel[:, :, :n_total], n_frames)
        if n_total <= self.target_length and not self.fixed_length:
            columns = None if n_frames is None else (n_frames - self.patch_size) // self.patch_stride + 1
            return mel, columns, Encoded(n_clips, n_steps=columns)

        chunk = self.target_length
        if n_total <= chunk:
            frames = torch.full((n_clips,), n_total, device=mel.device) if n_frames is None else n_frames
            is_padding = torch.arange(n_total, device=mel.device) >= frames[:, None]  # (B,T)
            mel = F.pad(mel.masked_fill(is_padding[:, None], self.fill), (0, chunk - n_total), value=self.fill)
            return mel, None, Encoded(n_clips, n_steps=self._count_covered_columns(frames))
        chunks, inside, clip = split(mel, n_frames, chunk, self.fill)
        encoded = Encoded(n_clips, n_steps=self._count_covered_columns(inside), clip_of_row=clip)
        encoded.weights = None if self.equal_chunks else inside
        if self.fixed_length or n_frames is None or not bool((alone := (n_frames <= chunk)[clip]).any()):
            return chunks, None, encoded
        whole = (inside - self.patch_size) // self.patch_stride + 1
        encoded.n_steps = torch.where(alone, whole, self._count_covered_columns(inside))
        return chunks, torch.where(alone, whole, self._count_columns(chunk)), encoded

    def _encode_rows(
        self,
        mel: Tensor,
        columns: Tensor | None,
        encoded: Encoded,
        keep: Keep | None = None,
        layers: Sequence[int] = (),
    ) -> Encoded:
        """Write into `encoded` what is computed of rows (R,F,T'), of which columns (R,), or None for all, take part."""
        x, valid = self._prepare_tokens(mel, columns, encoded, keep)
        x, encoded.layers = self._run_blocks(x, valid, layers)
        prefix, x = x[:, : self.n_prefix], x[:, self.n_prefix :]
        encoded.prefix = prefix if self.n_prefix else None
        encoded.tokens = x.unflatten(1, encoded.grid) if encoded.kept is None else x
        return encoded

    def _prepare_tokens(
        self, mel: Tensor, columns: Tensor | None, encoded: Encoded, keep: Keep | None
    ) -> tuple[Tensor, Tensor | None]:
        """Patches with positions behind prefix tokens, those alone that are chosen: (R,P+N,D), valid (R,P+N) or None.

        `grid`, `valid` and `kept` are written into `encoded`.
        """
        x = self._add_positions(self.patch_embed(mel), columns)  # (R,f,t,D)
        encoded.grid = n_rows, n_columns = x.shape[1], x.shape[2]
        x, valid, places = x.flatten(1, 2), None, None
        if columns is not None:
            encoded.valid = torch.arange(n_columns, device=x.device) < columns[:, None]  # (R,t)
            valid = encoded.valid[:, None].expand(-1, n_rows, -1).flatten(1)  # (R,N)
        if keep is not None:
            places = encoded.kept = keep(n_rows, n_columns, encoded.valid)
            if places.ndim != 2 or len(places) != len(x):
                raise ValueError(f"keep gave places of shape {tuple(places.shape)}; expected (R,N') for {len(x)} rows")
        elif self.training and (self.time_patch_out or self.freq_patch_out):
            left_out = self.time_patch_out, self.freq_patch_out
            places = draw_patch_out(encoded, *left_out, self.generator, x.device).expand(x.shape[0], -1)
        if places is not None:
            x = take_tokens(x, places)
            valid = None if valid is None else valid.gather(1, places)
        if keep is not None:
            encoded.valid = valid
        prefix = self._prefix_tokens()
        if prefix is not None:
            x = torch.cat([prefix.expand(x.shape[0], -1, -1), x], dim=1)
        return self.pos_drop(x), None if valid is None else F.pad(valid, (self.n_prefix, 0), value=True)

    def _run_blocks(
        self, x: Tensor, valid: Tensor | None, layers: Sequence[int] = ()
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Blocks, token merging and the final norm: (R,P+N,D), tokens that count (R,P+N) or None -> (R,P+N,D).

        And what the chosen blocks give, each (R,P+N,D).
        """
        groups = TokenGroups(valid, self.n_prefix, self.proportional_attention)
        merges = self.merges_in_training or not self.training
        outputs: dict[int, Tensor] = {}
        for index, (block, amount) in enumerate(zip(cast("list[Block]", self.blocks), self.merged_tokens, strict=True)):
            x, keys = block.attend(x, groups.bias)
            x = groups.merge(x, keys, amount if merges else 0)
            x = block.feed_forward(x)
            outputs |= {layer: groups.spread(x) for layer in layers if layer % len(self.blocks) == index}
        return groups.spread(self.norm(x)), outputs
