"""Plain implementations: the same weights with the operations of published code, one after another.

Letters: B batch, S samples, F mel bands, T frames, C classes, D width, H heads, N tokens, d width of a head.
"""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill.batch import Batch
from models.audiotransformer import AudioTransformer
from models.ced_mel import CedMel
from models.layers import Attention, Block

TIME_MASK, FREQUENCY_MASK = 192, 24  # widest masks of CED's recipes, in frames and bands


def plain_mel(front_end: CedMel, waveform: Tensor) -> Tensor:
    """(B,S) -> (B,F,T) decibels, as torchaudio's MelSpectrogram and AmplitudeToDB compute them."""
    spectrum = torch.stft(
        waveform,
        front_end.n_fft,
        front_end.hop_size,
        front_end.win_size,
        front_end.window,
        center=front_end.center,
        return_complex=True,
    )
    mel = (spectrum.abs().pow(2).transpose(1, 2) @ front_end.mel_weights).transpose(1, 2)
    decibels = 10 * mel.clamp(min=1e-10).log10()
    return torch.maximum(decibels, decibels.amax((1, 2), keepdim=True) - front_end.TOP_DB)


def plain_masks(mel: Tensor, batch: Batch) -> Tensor:
    """Mask one range of time and one of frequency in each clip: (B,F,T) -> (B,F,T)."""
    mel = mel.clone()
    for i in range(len(mel)):
        for bins, widest in ((mel[i].T, TIME_MASK), (mel[i], FREQUENCY_MASK)):
            width = batch.value[i] * widest
            start = int(batch.min_value[i] * (len(bins) - width))  # negative for a mask that is longer than the clip
            bins[max(start, 0) : start + int(width)] = 0.0
    return mel


def plain_mixup(x: Tensor, weight: Tensor) -> Tensor:
    """Mix each row of `x` (B,...) with its mirror in the batch, by its own weight (B,)."""
    return torch.stack([weight[i] * x[i] + (1 - weight[i]) * x[len(x) - 1 - i] for i in range(len(x))])


def plain_attention(attention: Attention, x: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """softmax(q k^T / sqrt d + bias) v, one operation after the other.

    Args:
        attention: the weights.
        x: tokens (B,N,D).
        bias: None, or what broadcasts to (B,H,N,N).

    Returns:
        (B,N,D), and the keys (B,H,N,d).
    """
    batch, n_tokens, width = x.shape
    qkv = attention.qkv(x).reshape(batch, n_tokens, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
    query, key, value = qkv.unbind(0)  # each (B,H,N,d)
    weights, scale = query @ key.transpose(-2, -1), query.shape[-1] ** -0.5
    # Scale and bias in one operation, so that a bias adds no pass over the weights.
    weights = weights * scale if bias is None else torch.add(bias, weights, alpha=scale)
    out = weights.softmax(dim=-1) @ value
    return attention.proj(out.transpose(1, 2).reshape(batch, n_tokens, width)), key


def plain_logits(model: AudioTransformer, mel: Tensor) -> Tensor:
    """(B,F,T) -> (B,C) with the weights of `model`, in the operations of the published network."""
    x = cast(nn.Module, model.init_bn)(mel[:, :, None]).transpose(1, 2)  # (B,1,F,T)
    patches = model.patch_embed.proj
    x = F.conv2d(x, patches.weight, patches.bias, patches.stride)  # (B,D,f,t)
    x = x + model.time_pos_embed[..., : x.shape[-1]]
    x = x + model.freq_pos_embed
    x = x.flatten(2).transpose(1, 2)
    for block in cast("list[Block]", model.blocks):
        x = x + plain_attention(block.attn, block.norm1(x))[0]
        x = x + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x))))
    return model.outputlayer(model.norm(x).mean(1))
