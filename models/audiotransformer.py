"""The audio transformers of CED: a ViT on mel patches with separate position embeddings for time and frequency.

Method: Dinkel et al., "CED: Consistent ensemble distillation for audio tagging", ICASSP 2024; patch-out after Koutini
et al., "Efficient training of audio transformers with patchout", Interspeech 2022. Names in the state dict are those
of the published checkpoints.

Letters: B batch, F mel bands, T frames, C classes, D width, f and t rows and columns of the patch grid, N = f t tokens
(frequency-major), R rows of the network's batch: a clip, or a chunk of a long one.
"""

import inspect
import logging
from collections.abc import Mapping
from functools import partial
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.errors import Faults, UserError, some
from models.base import AudioTagger
from models.chunks import Average, join, join_logits, split
from models.frontends import SILENCE_DB, CedMel
from models.layers import Block
from models.registry import register_model

logger = logging.getLogger(__name__)

Pooling = Literal["mean", "token", "dm", "logit"]


class PatchEmbed(nn.Module):
    """Project patches of the spectrogram: (R,F,T) -> (R,f,t,D).

    The weights are a convolution's, as published. Patches that do not overlap are projected by a product of matrices,
    which is faster than the convolution and leaves the tokens in one piece.
    """

    def __init__(self, width: int, patch_size: int, patch_stride: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(1, width, patch_size, patch_stride)

    def forward(self, mel: Tensor) -> Tensor:
        """(R,F,T) -> (R,f,t,D)."""
        size, stride = self.proj.kernel_size[0], self.proj.stride[0]
        if stride != size:
            return self.proj(mel[:, None]).permute(0, 2, 3, 1).contiguous()
        n_rows, n_columns = mel.shape[1] // size, mel.shape[2] // size
        mel = mel[:, : n_rows * size, : n_columns * size]
        patches = mel.unflatten(2, (n_columns, size)).unflatten(1, (n_rows, size)).transpose(2, 3)  # (R,f,t,size,size)
        return F.linear(patches.flatten(3), self.proj.weight.flatten(1), self.proj.bias)


class Rows(NamedTuple):
    """Normalised spectrograms as the network sees them.

    Attributes:
        mel: (R,F,T'), at most `target_length` frames.
        columns: (R,) patch columns that take part in attention and pooling, None where all do.
        steps: (R,) patch columns that hold any of the clip's own frames, None where all do.
        clip: (R,) the clip of each row, ascending, None where every clip is one row.
    """

    mel: Tensor
    columns: Tensor | None
    steps: Tensor | None
    clip: Tensor | None


class Tokens(NamedTuple):
    """What the transformer gives back.

    Attributes:
        cls: (R,D), None for networks without a class token.
        grid: (R,f,t,D) after the final norm.
        own: (R,t) columns that count, None where all do.
    """

    cls: Tensor | None
    grid: Tensor
    own: Tensor | None


class AudioTransformer(AudioTagger):
    """CED's network.

    Clips longer than `target_length` frames are cut into chunks of that many, the last one filled up with zeros after
    the normalisation; the probabilities of all chunks are averaged.

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
        sample_rate: of the waveform, in hertz.
        n_mels: F.
        f_min: lower edge of the bands in hertz.
        f_max: upper edge in hertz, None for half the sample rate.
        n_fft: samples of a Fourier transform.
        win_size: samples of the window.
        hop_size: samples between frames.
        center: whether frames are centred.

    Attributes:
        generator: draws what patch-out leaves out; None means torch's default one.

    Raises:
        UserError: arguments contradict each other; all faults are told at once.
    """

    masks_padding = True
    head = "outputlayer.1"

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
        if eval_avg not in get_args(Average):
            faults.add(f"eval_avg must be one of {some(get_args(Average))}, not {eval_avg!r}")
        if num_heads < 1 or embed_dim % num_heads:
            faults.add(f"embed_dim {embed_dim} cannot be shared among {num_heads} heads")
        if target_length < patch_size or n_mels < patch_size:
            faults.add(f"target_length {target_length} and n_mels {n_mels} must hold a patch of {patch_size}")
        faults.raise_if_any()
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
        super().__init__(
            front_end,
            num_classes=num_classes,
            embed_dim=embed_dim,
            outputs="logits" if pooling == "logit" else "probabilities",
        )
        self.pooling, self.eval_avg, self.target_length = pooling, eval_avg, target_length
        self.patch_size, self.patch_stride = patch_size, patch_stride
        self.time_patch_out, self.freq_patch_out = time_patch_out or 0, freq_patch_out or 0
        self.generator: torch.Generator | None = None

        # Index 1, as in published checkpoints; over the mel axis: (R,F,1,T).
        self.init_bn = nn.Sequential(nn.Identity(), nn.BatchNorm2d(n_mels, momentum=0.01)) if init_bn else None
        self.patch_embed = PatchEmbed(embed_dim, patch_size, patch_stride)
        n_rows, n_columns = int(self._n_patches(n_mels)), int(self._n_patches(target_length))
        self.time_pos_embed = nn.Parameter(torch.randn(1, embed_dim, 1, n_columns) * 0.02)
        self.freq_pos_embed = nn.Parameter(torch.randn(1, embed_dim, n_rows, 1) * 0.02)
        if pooling == "token":
            self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
            self.token_pos_embed = nn.Parameter(torch.randn(1, embed_dim) * 0.02)
        self.pos_drop = nn.Dropout(drop_rate)
        self.blocks = nn.ModuleList(
            Block(
                embed_dim,
                num_heads,
                mlp_ratio=mlp_ratio,
                qkv_bias=qkv_bias,
                dropout=drop_rate,
                attention_dropout=attn_drop_rate,
                drop_path=drop_path_rate * index / max(depth - 1, 1),
                init_values=init_values,
            )
            for index in range(depth)
        )
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.outputlayer = nn.Sequential(nn.LayerNorm(embed_dim), nn.Linear(embed_dim, num_classes))
        self.apply(_initialise)

    def forward_spectrogram(self, mel: Tensor, n_frames: Tensor | None = None) -> Tensor:
        """Tag spectrograms of any length.

        Args:
            mel: (B,F,T) in decibels.
            n_frames: (B,) frames of each clip, None where all of T belong to it.

        Returns:
            (B,C), logits for pooling "logit", else probabilities.

        Raises:
            UserError: the spectrogram has another number of bands, or too few frames for one patch.
        """
        rows = self._rows(mel, n_frames)
        output = self._classify(self._encode(rows.mel, rows.columns))
        if rows.clip is None:
            return output
        if self.outputs == "logits":
            return join_logits(output, rows.clip, len(mel), self.eval_avg, self.activation)
        return join(output, rows.clip, len(mel), self.eval_avg)

    def forward_features(self, mel: Tensor) -> Tensor:
        """Compute the tokens after the final norm.

        Args:
            mel: (B,F,T), at most `target_length` frames.

        Returns:
            (B,N,D), frequency-major; a class token, where there is one, comes first.

        Raises:
            UserError: the spectrogram does not fit.
        """
        if mel.shape[-1] > self.target_length:
            raise UserError(f"{mel.shape[-1]} frames are more than the {self.target_length} of one chunk")
        tokens = self._encode(self._rows(mel, None).mel, None)
        grid = tokens.grid.flatten(1, 2)
        return grid if tokens.cls is None else torch.cat([tokens.cls[:, None], grid], dim=1)

    def embed_spectrogram(self, mel: Tensor, n_frames: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Embed spectrograms of any length.

        Args:
            mel: (B,F,T) in decibels.
            n_frames: (B,) frames of each clip, None where all of T belong to it.

        Returns:
            The mean over tokens (B,D), and the mean over frequency for every patch column (B,T',D).
        """
        rows = self._rows(mel, n_frames)
        frames = self._encode(rows.mel, rows.columns).grid.mean(1)  # (R,t,D)
        if rows.steps is None:
            return frames.mean(1), frames
        own = torch.arange(frames.shape[1], device=mel.device) < rows.steps[:, None]  # (R,t)
        steps = rows.steps
        if rows.clip is not None:
            steps = steps.new_zeros(len(mel)).index_add_(0, rows.clip, steps)  # (B,)
        joined = frames.new_zeros(len(mel), int(steps.max()), self.embed_dim)
        joined[torch.arange(joined.shape[1], device=mel.device) < steps[:, None]] = frames[own]
        return joined.sum(1) / steps[:, None], joined

    def probabilities_of(self, mel: Tensor) -> Tensor:
        """Probabilities of spectrograms of any length (B,F,T) -> (B,C), in shapes alone, as graphs want it.

        Chunks as in `forward_spectrogram`; fewer frames than one patch are followed by silence.
        """
        batch, _, n_frames = mel.shape
        mel = F.pad(mel, (0, torch.sym_max(self.patch_size - n_frames, 0)), value=SILENCE_DB)
        n_frames = mel.shape[2]
        n_chunks = (n_frames + self.target_length - 1) // self.target_length  # graphs round a negative quotient upwards
        chunk = torch.sym_min(n_frames, self.target_length)
        mel = F.pad(self._normalise(mel, None), (0, n_chunks * chunk - n_frames))
        chunks = mel.unflatten(2, (n_chunks, chunk)).transpose(1, 2).flatten(0, 1)  # (R,F,chunk)
        found = self.probabilities(self._classify(self._encode(chunks, None))).unflatten(0, (batch, n_chunks))
        return found.amax(1) if self.eval_avg == "max" else found.mean(1)

    def n_steps(self, n_samples: int) -> int:
        """Patch columns that a clip of `n_samples` has, over all its chunks."""
        n_frames = self.front_end.n_frames(n_samples)
        if n_frames <= self.target_length:
            return self._n_patches(n_frames)
        n_full = (n_frames - 1) // self.target_length
        return n_full * self._n_patches(self.target_length) + self._n_touched(n_frames - n_full * self.target_length)

    def adapt_weights(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Crop or stretch the time embedding of a network with another `target_length`, with a notice."""
        adapted = dict(state)
        given = adapted.get("time_pos_embed")
        wanted = self.time_pos_embed.shape[-1]
        if given is None or given.ndim != 4 or given.shape[-1] == wanted:
            return adapted
        if given.shape[-1] > wanted:
            how, embedding = "cropped", given[..., :wanted]
        else:
            how, embedding = "interpolated", F.interpolate(given, (1, wanted), mode="bilinear", align_corners=False)
        logger.warning("time_pos_embed is %s from %d to %d patch columns", how, given.shape[-1], wanted)
        return adapted | {"time_pos_embed": embedding}

    def no_weight_decay(self) -> set[str]:
        """Position embeddings and the class token."""
        names = {"time_pos_embed", "freq_pos_embed", "cls_token", "token_pos_embed"}
        return names & set(dict(self.named_parameters()))

    def _n_patches(self, size: int) -> int:
        return (size - self.patch_size) // self.patch_stride + 1

    def _n_touched(self, n_frames: int) -> int:
        """Columns of a zero-filled chunk that hold any of its first `n_frames` frames."""
        return min(-(-n_frames // self.patch_stride), self._n_patches(self.target_length))

    def _rows(self, mel: Tensor, n_frames: Tensor | None) -> Rows:
        """Normalise, and cut long clips into chunks; the padding of one chunk counts, padding of a batch does not."""
        _, n_mels, n_total = mel.shape
        if n_mels != self.front_end.n_mels or n_total < self.patch_size:
            raise UserError(
                f"{self.name} takes spectrograms of {self.front_end.n_mels} bands and at least {self.patch_size} "
                f"frames, not {n_mels} bands and {n_total} frames"
            )
        if n_frames is not None:
            n_frames = n_frames.to(mel.device)
        mel = self._normalise(mel, n_frames)
        if n_total <= self.target_length:
            columns = None if n_frames is None else (n_frames - self.patch_size) // self.patch_stride + 1
            return Rows(mel, columns, columns, None)

        chunk = self.target_length
        chunks, inside, clip = split(mel, n_frames, chunk)
        whole = (inside - self.patch_size) // self.patch_stride + 1
        touched = (-(-inside // self.patch_stride)).clamp(max=self._n_patches(chunk))
        alone = torch.zeros_like(inside, dtype=torch.bool) if n_frames is None else (n_frames <= chunk)[clip]
        columns = torch.where(alone, whole, self._n_patches(chunk)) if bool(alone.any()) else None
        return Rows(chunks, columns, torch.where(alone, whole, touched), clip)

    def _normalise(self, mel: Tensor, n_frames: Tensor | None) -> Tensor:
        """Batch norm over bands, (B,F,T) -> (B,F,T); in training its statistics leave out padding."""
        if self.init_bn is None:
            return mel
        if n_frames is None or not self.training:
            return self.init_bn(mel.unsqueeze(2)).squeeze(2)
        own = torch.arange(mel.shape[2], device=mel.device) < n_frames[:, None]  # (B,T)
        frames = self.init_bn(mel.transpose(1, 2)[own][:, :, None, None])[:, :, 0, 0]
        normalised = frames.new_zeros(len(mel), mel.shape[2], mel.shape[1])
        normalised[own] = frames
        return normalised.transpose(1, 2)

    def _encode(self, mel: Tensor, columns: Tensor | None) -> Tokens:
        x = self.patch_embed(mel)  # (R,f,t,D)
        n_rows, n_columns = x.shape[1:3]
        positions = self.time_pos_embed[..., :n_columns] + self.freq_pos_embed[:, :, :n_rows]  # (1,D,f,t)
        x = x + positions.permute(0, 2, 3, 1)
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
        has_cls = self.pooling == "token"
        if has_cls:
            x = torch.cat([(self.cls_token + self.token_pos_embed).expand(x.shape[0], -1, -1), x], dim=1)
        bias = None
        if own is not None:
            keys = own[:, None].expand(-1, n_rows, -1).flatten(1)  # (R,N)
            bias = F.pad(keys, (int(has_cls), 0), value=True)[:, None, None]
        x = self.pos_drop(x)
        for block in self.blocks:
            x = block(x, bias)
        x = self.norm(x)
        grid = x[:, int(has_cls) :].unflatten(1, (n_rows, n_columns))
        return Tokens(x[:, 0] if has_cls else None, grid, own)

    def _kept(self, size: int, n_out: int, device: torch.device) -> Tensor:
        """Ascending indices that patch-out leaves, at least one."""
        where = device if self.generator is None else self.generator.device
        order = torch.randperm(size, generator=self.generator, device=where)
        return order[: max(size - n_out, 1)].sort().values.to(device)

    def _classify(self, tokens: Tokens) -> Tensor:
        """(R,C)."""
        if tokens.cls is not None:
            return self._activate(self.outputlayer(tokens.cls))
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


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


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
