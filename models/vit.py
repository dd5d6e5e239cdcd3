"""What all vision transformers on spectrograms share: patches, chunks of long clips, padding, patch-out, merging.

Patch-out after Koutini et al., "Efficient training of audio transformers with patchout", Interspeech 2022; merging of
tokens in `models.token_merging`.

Letters: B batch, F mel bands, T frames, C classes, D width, f and t rows and columns of the patch grid, N = f t tokens
(frequency-major), P prefix tokens (class, distillation), R rows of the network's batch: a clip, or a chunk of a long
one.
"""

from typing import ClassVar, NamedTuple, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.errors import Faults, UserError, some
from models.base import AudioTagger, Outputs
from models.chunks import Average, Count, drop_remainder, join, join_logits, split
from models.frontends import SILENCE_DB, FrontEnd
from models.layers import Block, PatchEmbed
from models.token_merging import MergingSetting, TokenGroups, merging_schedule, split_setting


class Rows(NamedTuple):
    """Normalised spectrograms as the network sees them.

    Attributes:
        mel: (R,F,T'), at most `target_length` frames.
        columns: (R,) patch columns that take part in attention and pooling, None where all do.
        steps: (R,) patch columns that hold any of the clip's own frames, None where all do.
        clip: (R,) the clip of each row, ascending, None where every clip is one row.
        weights: (R,) what each row counts in the mean over its clip's, None where all count the same.
    """

    mel: Tensor
    columns: Tensor | None
    steps: Tensor | None
    clip: Tensor | None
    weights: Tensor | None = None


class Tokens(NamedTuple):
    """What the transformer gives back.

    Attributes:
        prefix: (R,P,D), None for networks without prefix tokens.
        grid: (R,f,t,D) after the final norm.
        own: (R,t) columns that count, None where all do.
    """

    prefix: Tensor | None
    grid: Tensor
    own: Tensor | None


class SpectrogramTransformer(AudioTagger):
    """A ViT on mel patches; subclasses bring positions, prefix tokens, normalisation and head.

    Clips longer than `target_length` frames are cut into chunks of that many, the last one filled up; the
    probabilities of all chunks are joined as `eval_avg` says. Each chunk counts by its own frames, and a remainder
    shorter than a patch is left out (see `models.chunks`), unless a subclass has `equal_chunks`.

    Args:
        front_end: waveform to spectrogram.
        num_classes: C.
        outputs: whether the head gives "logits" or "probabilities".
        embed_dim: D.
        depth: number of blocks.
        num_heads: a divisor of D.
        mlp_ratio: hidden width of the MLPs in units of D.
        qkv_bias: whether queries, keys and values have a bias.
        norm_eps: of the layer norms.
        target_length: longest input in frames.
        patch_size: edge of a patch, in bands and frames.
        patch_stride: from one patch to the next.
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
        faults: what a subclass has found wrong with its own arguments.

    Raises:
        UserError: arguments contradict each other; all faults are told at once.
    """

    masks_padding = True
    fixed_length: ClassVar[bool] = False  # shorter clips are filled up to `target_length` too, and all of it takes part
    equal_chunks: ClassVar[bool] = False  # every chunk counts the same, however little of it is the clip's own
    fill: float = 0.0  # what is filled up reads, on the normalised scale
    n_prefix: int = 0  # P

    def __init__(
        self,
        front_end: FrontEnd,
        *,
        num_classes: int,
        outputs: Outputs,
        embed_dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float,
        qkv_bias: bool,
        norm_eps: float,
        target_length: int,
        patch_size: int,
        patch_stride: int,
        eval_avg: Average,
        drop_rate: float,
        attn_drop_rate: float,
        drop_path_rate: float,
        init_values: float | None,
        time_patch_out: int | None,
        freq_patch_out: int | None,
        token_merging: MergingSetting,
        token_merging_in_training: bool,
        faults: Faults,
    ) -> None:
        if eval_avg not in get_args(Average):
            faults.add(f"eval_avg must be one of {some(get_args(Average))}, not {eval_avg!r}")
        if num_heads < 1 or embed_dim % num_heads:
            faults.add(f"embed_dim {embed_dim} cannot be shared among {num_heads} heads")
        if target_length < patch_size or front_end.n_mels < patch_size:
            faults.add(f"target_length {target_length} and n_mels {front_end.n_mels} must hold a patch of {patch_size}")
        try:
            r, proportional = split_setting(token_merging)
            schedule = merging_schedule(r, depth)
        except UserError as error:
            faults.add(str(error))
        faults.raise_if_any()
        super().__init__(front_end, num_classes=num_classes, embed_dim=embed_dim, outputs=outputs)
        self.eval_avg, self.target_length = eval_avg, target_length
        self.patch_size, self.patch_stride = patch_size, patch_stride
        self.time_patch_out, self.freq_patch_out = time_patch_out or 0, freq_patch_out or 0
        self.merges_in_training = token_merging_in_training
        self.patch_embed = PatchEmbed(embed_dim, patch_size, patch_stride)
        self._make_positions(self._n_patches(front_end.n_mels), self._n_patches(target_length))
        self.pos_drop = nn.Dropout(drop_rate)
        self.blocks = nn.ModuleList(
            Block(
                embed_dim,
                num_heads,
                mlp_ratio=mlp_ratio,
                qkv_bias=qkv_bias,
                norm_eps=norm_eps,
                dropout=drop_rate,
                attention_dropout=attn_drop_rate,
                drop_path=drop_path_rate * index / max(depth - 1, 1),
                init_values=init_values,
            )
            for index in range(depth)
        )
        self.norm = nn.LayerNorm(embed_dim, eps=norm_eps)
        self.merged_tokens, self.proportional_attention = schedule, proportional

    @property
    def generator(self) -> torch.Generator | None:
        """Draws what patch-out leaves out, and all else that a batch of training shares; None for torch's default."""
        return self.front_end.generator

    @generator.setter
    def generator(self, generator: torch.Generator | None) -> None:
        self.front_end.generator = generator

    def _make_positions(self, n_rows: int, n_columns: int) -> None:
        """Make the parameters of positions and prefix tokens, for a grid of that size."""
        raise NotImplementedError

    def _placed(self, patches: Tensor, columns: Tensor | None = None) -> Tensor:
        """Add positions to patches: (R,f,t,D), columns that take part (R,) or None for all -> (R,f,t,D)."""
        raise NotImplementedError

    def _prefix(self) -> Tensor | None:
        """Tokens before the patches, with their positions, (1,P,D); None for none."""
        return None

    def _classify(self, tokens: Tokens) -> Tensor:
        """(R,C), what `outputs` says."""
        raise NotImplementedError

    def _normalise(self, mel: Tensor, n_frames: Tensor | None) -> Tensor:
        """Normalise what the front-end gave, (B,F,T) -> (B,F,T); own frames (B,) or None."""
        return mel

    def _clip_embeddings(self, tokens: Tokens) -> Tensor | None:
        """(R,D), or None where it is the mean of the clip's own columns."""
        return None

    def merge_tokens(self, setting: MergingSetting) -> None:
        """Merge tokens from now on as `token_merging` says, or no longer (0).

        Raises:
            UserError: it is no such setting.
        """
        r, proportional = split_setting(setting)
        self.merged_tokens, self.proportional_attention = merging_schedule(r, len(self.blocks)), proportional
        self.arguments["token_merging"] = setting

    def forward_spectrogram(self, mel: Tensor, n_frames: Tensor | None = None) -> Tensor:
        """Tag spectrograms of any length.

        Args:
            mel: (B,F,T) as the front-end gives it.
            n_frames: (B,) frames of each clip, None where all of T belong to it.

        Returns:
            (B,C), what `outputs` says.

        Raises:
            UserError: the spectrogram has another number of bands, or too few frames for one patch.
        """
        rows = self._rows(mel, n_frames)
        return self._tagged(self._encode(rows.mel, rows.columns), rows, len(mel))

    def _tagged(self, tokens: Tokens, rows: Rows, n_clips: int) -> Tensor:
        """(B,C), what `outputs` says."""
        output = self._classify(tokens)
        if rows.clip is None:
            return output
        if self.outputs == "logits":
            return join_logits(output, rows.clip, n_clips, self.eval_avg, self.activation, rows.weights)
        return join(output, rows.clip, n_clips, self.eval_avg, rows.weights)

    def forward_features(self, mel: Tensor) -> Tensor:
        """Compute the tokens after the final norm.

        Args:
            mel: (B,F,T), at most `target_length` frames.

        Returns:
            (B,P+N,D), patches frequency-major behind the prefix tokens; merged ones have the same values.

        Raises:
            UserError: the spectrogram does not fit.
        """
        if mel.shape[-1] > self.target_length:
            raise UserError(f"{mel.shape[-1]} frames are more than the {self.target_length} of one chunk")
        tokens = self._encode(self._rows(mel, None).mel, None)
        grid = tokens.grid.flatten(1, 2)
        return grid if tokens.prefix is None else torch.cat([tokens.prefix, grid], dim=1)

    def embed_spectrogram(self, mel: Tensor, n_frames: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Embed spectrograms of any length.

        Args:
            mel: (B,F,T) as the front-end gives it.
            n_frames: (B,) frames of each clip, None where all of T belong to it.

        Returns:
            One vector a clip (B,D): the mean of its prefix tokens where the head reads that, chunks averaged by their
            frames, else the mean over its patches; and the mean over frequency for every patch column (B,T',D).
        """
        rows = self._rows(mel, n_frames)
        return self._embedded(self._encode(rows.mel, rows.columns), rows, len(mel))

    def tag_and_embed(self, mel: Tensor, n_frames: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Tag and embed at once: (B,F,T), own frames (B,) or None -> (B,C) as `forward`, clip embeddings (B,D)."""
        rows = self._rows(mel, n_frames)
        tokens = self._encode(rows.mel, rows.columns)
        return self._tagged(tokens, rows, len(mel)), self._embedded(tokens, rows, len(mel))[0]

    def _embedded(self, tokens: Tokens, rows: Rows, n_clips: int) -> tuple[Tensor, Tensor]:
        """Clip embeddings (B,D) and columns (B,T',D)."""
        frames, clips = tokens.grid.mean(1), self._clip_embeddings(tokens)  # (R,t,D), (R,D)
        if clips is not None and rows.clip is not None:
            clips = join(clips, rows.clip, n_clips, "mean", rows.weights)
        if rows.steps is None:
            return frames.mean(1) if clips is None else clips, frames
        own, steps = (
            torch.arange(frames.shape[1], device=frames.device) < rows.steps[:, None],
            rows.steps,
        )  # (R,t), (R,)
        if self.training and self.time_patch_out and tokens.own is not None:  # some of the clip's columns are left out
            own, steps = tokens.own, tokens.own.sum(1)
        if rows.clip is not None:
            steps = steps.new_zeros(n_clips).index_add_(0, rows.clip, steps)  # (B,)
        joined = frames.new_zeros(n_clips, int(steps.max()), self.embed_dim)
        joined[torch.arange(joined.shape[1], device=frames.device) < steps[:, None]] = frames[own]
        return joined.sum(1) / steps[:, None] if clips is None else clips, joined

    def probabilities_of(self, mel: Tensor) -> Tensor:
        """Probabilities of spectrograms of any length (B,F,T) -> (B,C), in shapes alone, as graphs want it.

        Chunks as in `forward_spectrogram`; fewer frames than one patch are followed by silence.
        """
        tokens, inside = self._encode_shapes(mel)
        # Sizes by `shape`: `len` would make a tracer take that of its example for all.
        found = self.probabilities(self._classify(tokens)).unflatten(0, (mel.shape[0], inside.shape[0]))
        return found.amax(1) if self.eval_avg == "max" else self._mean_of_chunks(found, inside)

    def embedding_of(self, mel: Tensor) -> Tensor:
        """Clip embeddings of spectrograms of any length (B,F,T) -> (B,D), in shapes alone, as graphs want it.

        Chunks as in `embed_spectrogram`; fewer frames than one patch are followed by silence.
        """
        tokens, inside = self._encode_shapes(mel)
        clips = self._clip_embeddings(tokens)
        by_clip = (mel.shape[0], inside.shape[0])
        if clips is not None:
            return self._mean_of_chunks(clips.unflatten(0, by_clip), inside)
        columns = tokens.grid.mean(1)  # (R,t,D)
        # A column of a chunk counts where its first frame is the clip's own: all of those of a chunk that is full.
        counted = inside[:, :: self.patch_stride][:, : columns.shape[1]].repeat(mel.shape[0], 1)  # (R,t)
        if tokens.own is not None:
            counted = counted * tokens.own
        total = (columns * counted[..., None]).unflatten(0, by_clip).sum((1, 2))
        return total / counted.unflatten(0, by_clip).sum((1, 2))[:, None]

    def _mean_of_chunks(self, x: Tensor, inside: Tensor) -> Tensor:
        """Mean over the chunks of each clip: (B,chunks,D), own frames of a chunk 1 (chunks,frames) -> (B,D)."""
        if self.equal_chunks:
            return x.mean(1)
        share = inside.sum(1, keepdim=True) / inside.sum()  # (chunks,1)
        return (x * share).sum(1)

    def _encode_shapes(self, mel: Tensor) -> tuple[Tokens, Tensor]:
        """Encode spectrograms of any length (B,F,T) as rows of B x chunks; and which frames of a chunk are its clip's.

        Returns:
            The tokens, and 1 or 0 for each frame of the chunks of a clip (chunks, frames).
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
            mel = mel.narrow(2, 0, n_frames)  # a slice would have a length that a tracer knows nothing of
        chunk = self.target_length if self.fixed_length else torch.sym_min(n_frames, self.target_length)
        columns = None
        if any(self.merged_tokens) and not self.fixed_length:
            # Numbers of tokens that hang on the clip's length, block after block, keep a tracer busy for hours: short
            # clips are padded, and masked as beside longer ones.
            columns = torch.full((batch * n_chunks,), self._n_patches(chunk), device=mel.device)
            chunk = self.target_length
        behind = (0, n_chunks * chunk - n_frames)
        inside = F.pad(mel.new_ones(n_frames), behind).reshape(n_chunks, chunk)
        mel = F.pad(self._normalise(mel, None), behind, value=self.fill)
        chunks = mel.transpose(1, 2).reshape(batch * n_chunks, chunk, mel.shape[1]).transpose(1, 2)  # (R,F,chunk)
        return self._encode(chunks, columns), inside

    def n_steps(self, n_samples: int) -> int:
        """Patch columns that a clip of `n_samples` has, over all its chunks."""
        n_frames = self._counted(self.front_end.n_frames(n_samples))
        if n_frames <= self.target_length and not self.fixed_length:
            return self._n_patches(n_frames)
        n_full = (n_frames - 1) // self.target_length
        rest = torch.tensor(n_frames - n_full * self.target_length)
        return n_full * self._n_patches(self.target_length) + int(self._touched(rest))

    def _n_patches(self, size: int) -> int:
        return (size - self.patch_size) // self.patch_stride + 1

    def _counted(self, n_frames: Count) -> Count:
        """Frames that take part, of clips of `n_frames`."""
        return n_frames if self.equal_chunks else drop_remainder(n_frames, self.target_length, self.patch_size)

    def _touched(self, n_frames: Tensor) -> Tensor:
        """Columns of filled-up chunks that hold any of their first `n_frames` (R,) frames."""
        return (-(-n_frames // self.patch_stride)).clamp(max=self._n_patches(self.target_length))

    def _rows(self, mel: Tensor, n_frames: Tensor | None) -> Rows:
        """Normalise, and cut long clips into chunks; the padding of one chunk counts, padding of a batch does not."""
        _, n_mels, n_total = mel.shape
        least = 1 if self.fixed_length else self.patch_size
        if n_mels != self.front_end.n_mels or n_total < least:
            raise UserError(
                f"{self.name} takes spectrograms of {self.front_end.n_mels} bands and at least {least} "
                f"frames, not {n_mels} bands and {n_total} frames"
            )
        if n_frames is not None:
            n_frames = self._counted(n_frames.to(mel.device))
        n_total = self._counted(n_total)
        mel = self._normalise(mel[:, :, :n_total], n_frames)
        if n_total <= self.target_length and not self.fixed_length:
            columns = None if n_frames is None else (n_frames - self.patch_size) // self.patch_stride + 1
            return Rows(mel, columns, columns, None)

        chunk = self.target_length
        if n_total <= chunk:
            frames = torch.full((len(mel),), n_total, device=mel.device) if n_frames is None else n_frames
            is_padding = torch.arange(n_total, device=mel.device) >= frames[:, None]  # (B,T)
            mel = F.pad(mel.masked_fill(is_padding[:, None], self.fill), (0, chunk - n_total), value=self.fill)
            return Rows(mel, None, self._touched(frames), None)
        chunks, inside, clip = split(mel, n_frames, chunk, self.fill)
        touched, weights = self._touched(inside), None if self.equal_chunks else inside
        if self.fixed_length:
            return Rows(chunks, None, touched, clip, weights)
        whole = (inside - self.patch_size) // self.patch_stride + 1
        alone = torch.zeros_like(inside, dtype=torch.bool) if n_frames is None else (n_frames <= chunk)[clip]
        columns = torch.where(alone, whole, self._n_patches(chunk)) if bool(alone.any()) else None
        return Rows(chunks, columns, torch.where(alone, whole, touched), clip, weights)

    def _encode(self, mel: Tensor, columns: Tensor | None) -> Tokens:
        x = self._placed(self.patch_embed(mel), columns)  # (R,f,t,D)
        n_rows, n_columns = x.shape[1:3]
        own = None if columns is None else torch.arange(n_columns, device=x.device) < columns[:, None]  # (R,t)
        if self.training:
            if self.time_patch_out:
                kept = self._kept(n_columns, self.time_patch_out, x.device)
                if own is not None:
                    kept[0] = 0  # the one column that every clip has
                    own = own[:, kept]
                x = x[:, :, kept]
            if self.freq_patch_out:
                x = x[:, self._kept(n_rows, self.freq_patch_out, x.device)]
        n_rows, n_columns = x.shape[1:3]
        x = x.flatten(1, 2)  # (R,N,D)
        prefix = self._prefix()
        n_prefix = 0 if prefix is None else prefix.shape[1]
        if prefix is not None:
            x = torch.cat([prefix.expand(x.shape[0], -1, -1), x], dim=1)
        counted = None
        if own is not None:
            counted = F.pad(own[:, None].expand(-1, n_rows, -1).flatten(1), (n_prefix, 0), value=True)  # (R,P+N)
        x = self._through_blocks(self.pos_drop(x), counted, n_prefix)
        return Tokens(x[:, :n_prefix] if n_prefix else None, x[:, n_prefix:].unflatten(1, (n_rows, n_columns)), own)

    def _through_blocks(self, x: Tensor, own: Tensor | None, n_prefix: int) -> Tensor:
        """Blocks, token merging and the final norm: (R,P+N,D), tokens that count (R,P+N) or None -> (R,P+N,D)."""
        groups = TokenGroups(own, n_prefix, self.proportional_attention)
        merges = self.merges_in_training or not self.training
        for block, amount in zip(cast("list[Block]", self.blocks), self.merged_tokens, strict=True):
            x, keys = block.attend(x, groups.bias)
            x = groups.merge(x, keys, amount if merges else 0)
            x = block.feed_forward(x)
        return groups.spread(self.norm(x))

    def _draw_device(self, device: torch.device) -> torch.device:
        """Where random numbers are drawn for tensors on `device`."""
        return device if self.generator is None else self.generator.device

    def _kept(self, size: int, n_out: int, device: torch.device) -> Tensor:
        """Ascending indices that patch-out leaves, at least one."""
        order = torch.randperm(size, generator=self.generator, device=self._draw_device(device))
        return order[: max(size - n_out, 1)].sort().values.to(device)
