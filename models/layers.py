"""Patches, and transformer blocks on fused attention.

`Attention` returns its keys and takes a bias, and `Block` offers its two halves, so that what works between them (token
merging, for example) needs no other block.

Letters: B batch, R rows of a batch, F mel bands, T frames, f and t rows and columns of patches, N tokens, D width, H
heads, d width of a head.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.settings import TransformerSettings


class PatchEmbed(nn.Module):
    """Project patches of the spectrogram: (R,F,T) -> (R,f,t,D).

    The weights are a convolution's, as published. Patches that do not overlap are projected by a product of matrices,
    which is faster than the convolution and leaves the tokens in one piece.
    """

    def __init__(self, width: int, patch_shape: tuple[int, int], patch_strides: tuple[int, int]) -> None:
        super().__init__()
        self.proj = nn.Conv2d(1, width, patch_shape, patch_strides)

    def forward(self, mel: Tensor) -> Tensor:
        """(R,F,T) -> (R,f,t,D)."""
        (n_bands, n_frames), strides = self.proj.kernel_size, self.proj.stride
        if strides != (n_bands, n_frames):
            return self.proj(mel[:, None]).permute(0, 2, 3, 1).contiguous()
        n_rows, n_columns = mel.shape[1] // n_bands, mel.shape[2] // n_frames
        mel = mel[:, : n_rows * n_bands, : n_columns * n_frames]
        patches = mel.unflatten(2, (n_columns, n_frames)).unflatten(1, (n_rows, n_bands)).transpose(2, 3)
        patches = patches.flatten(3)  # (R,f,t, bands x frames)
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class DropPath(nn.Module):
    """Stochastic depth: in training a residual branch is dropped for a whole clip with probability `p`."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """(B,...) -> (B,...), kept branches scaled up so that the expectation stays."""
        if self.p == 0 or not self.training:
            return x
        keep = torch.rand(x.shape[0], *[1] * (x.ndim - 1), device=x.device) >= self.p
        return x * keep / (1 - self.p)


class LayerScale(nn.Module):
    """A learned factor for each channel of a residual branch."""

    def __init__(self, width: int, initial: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), float(initial)))

    def forward(self, x: Tensor) -> Tensor:
        """(B,N,D) -> (B,N,D)."""
        return x * self.gamma


class Attention(nn.Module):
    """Multi-head self-attention.

    Args:
        width: D.
        num_heads: H, a divisor of D.
        qkv_bias: whether queries, keys and values have a bias.
        attention_dropout: of the attention weights.
        dropout: of the output.
    """

    def __init__(
        self, width: int, num_heads: int, *, qkv_bias: bool = True, attention_dropout: float = 0.0, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_dropout = attention_dropout
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.proj = nn.Linear(width, width)
        self.proj_drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Attend.

        Args:
            x: tokens (B,N,D).
            bias: None, or what broadcasts to (B,H,N,N): bool (True takes part) or added to the scores.

        Returns:
            (B,N,D), and the keys (B,H,N,d).
        """
        batch, n_tokens, width = x.shape
        qkv = self.qkv(x).view(batch, n_tokens, 3, self.num_heads, width // self.num_heads)
        # In this order the three gradients are joined as the linear layer needs them, without another copy.
        query, key, value = (x.transpose(1, 2) for x in qkv.unbind(2))  # each (B,H,N,d)
        dropout = self.attention_dropout if self.training else 0.0
        if bias is not None and bias.dtype != torch.bool:
            bias = bias.to(query.dtype)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout)
        out = out.transpose(1, 2).reshape(batch, n_tokens, width)
        return self.proj_drop(self.proj(out)), key


class Mlp(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, width: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B,N,D) -> (B,N,D)."""
        return self.drop(self.fc2(self.drop(F.gelu(self.fc1(x)))))


class Block(nn.Module):
    """Pre-norm transformer block: x + attention, then x + MLP.

    Args:
        width: D.
        num_heads: H.
        mlp_ratio: hidden width of the MLP in units of D.
        qkv_bias: whether queries, keys and values have a bias.
        norm_eps: of the layer norms.
        dropout: of projections.
        attention_dropout: of attention weights.
        drop_path: probability that a branch is dropped for a clip.
        init_values: initial layer scale, None for none.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        norm_eps: float = 1e-6,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        drop_path: float = 0.0,
        init_values: float | None = None,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=norm_eps)
        self.attn = Attention(width, num_heads, qkv_bias=qkv_bias, attention_dropout=attention_dropout, dropout=dropout)
        self.ls1 = nn.Identity() if init_values is None else LayerScale(width, init_values)
        self.norm2 = nn.LayerNorm(width, eps=norm_eps)
        self.mlp = Mlp(width, round(width * mlp_ratio), dropout)
        self.ls2 = nn.Identity() if init_values is None else LayerScale(width, init_values)
        self.drop_path = DropPath(drop_path)

    def attend(self, x: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """First half: (B,N,D) -> (B,N,D) and the attention's keys (B,H,N,d); `bias` as in `Attention`."""
        out, keys = self.attn(self.norm1(x), bias)
        return x + self.drop_path(self.ls1(out)), keys

    def feed_forward(self, x: Tensor) -> Tensor:
        """Second half: (B,N,D) -> (B,N,D)."""
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Both halves: (B,N,D) -> (B,N,D)."""
        return self.feed_forward(self.attend(x, bias)[0])


def build_blocks(settings: TransformerSettings, norm_eps: float) -> nn.ModuleList:
    """Build the blocks of a transformer, stochastic depth rising linearly from 0."""
    return nn.ModuleList(
        Block(
            settings.embed_dim,
            settings.num_heads,
            mlp_ratio=settings.mlp_ratio,
            qkv_bias=settings.qkv_bias,
            norm_eps=norm_eps,
            dropout=settings.drop_rate,
            attention_dropout=settings.attn_drop_rate,
            drop_path=settings.drop_path_rate * index / max(settings.depth - 1, 1),
            init_values=settings.init_values,
        )
        for index in range(settings.depth)
    )


def initialise(module: nn.Module) -> None:
    """Give a linear layer the usual start of transformers; for `nn.Module.apply`."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
