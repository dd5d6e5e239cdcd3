"""A small network that has learnt something, in seconds: what exports, runtimes and quantisation are judged on."""

import functools

import numpy as np
import torch
from torch.nn import functional as F

from models import AudioTagger, create_model

LABELS = ["Low hum", "Hum, higher", 'A "buzz"', "Speech", "Whistle, low", "Whistle, high"]
RATE = 16000


def chord(kind: int, seconds: float, rng: np.random.Generator) -> np.ndarray:
    """Six tones about the pitch of one of six kinds, float64 (S,) at 16 kHz, about as loud as full scale."""
    time = np.arange(round(seconds * RATE)) / RATE
    pitches = (150, 400, 1000, 2200, 4200, 7000)[kind] * rng.uniform(0.9, 1.1, 6)
    return np.sin(2 * np.pi * (pitches[:, None] * time + rng.uniform(size=(6, 1)))).sum(0) / 3


def mixture(
    seconds: float, rng: np.random.Generator, n_kinds: int, noise: float = 0.02
) -> tuple[np.ndarray, np.ndarray]:
    """Some kinds at once over noise, float32 (S,), and which they are, float32 (6,)."""
    kinds = rng.choice(len(LABELS), n_kinds, replace=False)
    wave = sum(chord(kind, seconds, rng) for kind in kinds)
    wave = 10 ** rng.uniform(-1.7, -0.5) * (wave + noise * rng.standard_normal(round(seconds * RATE)))
    return wave.astype(np.float32), np.isin(range(len(LABELS)), kinds).astype(np.float32)


def unheard(n_clips: int, seconds: float, noise: float = 0.02) -> tuple[list[np.ndarray], np.ndarray]:
    """Clips of one to three kinds that the network has not seen, and their labels (N,6)."""
    rng = np.random.default_rng(100)
    clips, targets = zip(*(mixture(seconds, rng, 1 + index % 3, noise) for index in range(n_clips)), strict=True)
    return list(clips), np.stack(targets)


@functools.cache
def trained_tagger() -> AudioTagger:
    """A pico-sized CED that tells six kinds of sound apart."""
    rng = np.random.default_rng(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = create_model("audiotransformer_pico", labels=LABELS, pooling="logit", depth=1)
        examples = [mixture(1.0, rng, 1 + index % 3) for index in range(384)]
        with torch.no_grad():
            mel = model.front_end(torch.from_numpy(np.stack([clip for clip, _ in examples])))
        targets = torch.from_numpy(np.stack([target for _, target in examples]))
        model.init_bn[1](mel.unsqueeze(2))
        n_steps = 250
        optimiser = torch.optim.AdamW(model.parameters(), 4e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, n_steps)
        for _ in range(n_steps):
            rows = torch.randint(len(mel), (32,))
            loss = F.binary_cross_entropy_with_logits(model.forward_spectrogram(mel[rows]), targets[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    return model.eval()
