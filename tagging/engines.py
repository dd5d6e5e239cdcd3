"""Opens engines: a model in PyTorch, or an exported file in ONNX Runtime.

Letters: B batch, S samples, C classes, E embedding width; T' time steps of an embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common.errors import UserError
from common.samples import as_clips
from tagging.base import MAX_THREADS, ContinuedSound, Engine

if TYPE_CHECKING:
    import torch

    from models.base import AudioTagger
    from models.token_merging import MergingSetting


class TorchEngine:
    """Runs a model in PyTorch; the probabilities of a model without classes are (B,0).

    On a CPU each calling thread computes on a few cores of its own: several batches side by side use the cores better
    than one batch spread over them, which synchronises all threads after every operation.

    Args:
        model: in evaluation mode, on `device`.
        device: the model's device.
        n_threads: number of threads that will call it at once; by default on a CPU the number that PyTorch would use
            for one operation, at most `MAX_THREADS`, else 1.
    """

    max_samples: int | None = None

    def __init__(self, model: AudioTagger, device: str | torch.device = "cpu", n_threads: int | None = None) -> None:
        import torch

        self.model, self.device = model, torch.device(device)
        self.name, self.sample_rate, self.labels = model.name, model.sample_rate, list(model.labels)
        on_cpu = self.device.type == "cpu"
        self.batch_size = 8 if on_cpu else 64
        self.n_threads = n_threads or (min(torch.get_num_threads(), MAX_THREADS) if on_cpu else 1)
        if on_cpu:
            torch.set_num_threads(max(torch.get_num_threads() // self.n_threads, 1))

    def predict(self, clips: Sequence[np.ndarray]) -> np.ndarray:
        """Return the probabilities, float32 (B,C), of clips (S,) of any lengths, see `common.samples.as_clips`.

        Raises:
            UserError: the clips are not valid, or the model's output is NaN.
        """
        import torch

        if not self.labels:
            return np.empty((len(clips), 0), np.float32)
        with torch.inference_mode():
            return self.model.predict_waveform(*self._batch(as_clips(clips))).float().cpu().numpy()

    def embed(self, clips: Sequence[np.ndarray]) -> tuple[np.ndarray, list[np.ndarray]]:
        """Embed clips: one vector a clip, float32 (B,E), and the vectors (T',E) of each clip's time steps.

        Raises:
            UserError: the clips are not valid, or the output of a model without classes is NaN (`predict` checks the
                others).
        """
        import torch

        clips = as_clips(clips)
        with torch.inference_mode():
            whole, steps = self.model.embed_waveform(*self._batch(clips))
        if not self.labels and not bool(whole.isfinite().all()):
            raise UserError(
                f"the output of {self.name} is NaN: a clip has NaN, the weights are damaged, or training diverged"
            )
        frames = steps.float().cpu().numpy()
        valid = [frames[i, : self.model.n_steps(len(clip))] for i, clip in enumerate(clips)]  # without padding
        return whole.float().cpu().numpy(), valid

    @property
    def has_state(self) -> bool:
        """Whether the model continues sounds, see `open_sound`."""
        from models.recurrent import RecurrentTagger

        return bool(self.labels) and isinstance(self.model, RecurrentTagger)

    def open_sound(self) -> ContinuedSound:
        """Start a sound that the model computes while its samples come; only if it `has_state`."""
        return _TorchSound(self.model)

    def _batch(self, clips: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return zero-padded waveforms (B,S) and lengths (B,)."""
        import torch

        batch = np.zeros((len(clips), max(map(len, clips))), np.float32)
        for row, clip in zip(batch, clips, strict=True):
            row[: len(clip)] = clip
        lengths = torch.tensor([len(clip) for clip in clips])
        return torch.from_numpy(batch).to(self.device), lengths.to(self.device)


class _TorchSound:
    """A sound of a recurrent model, from and to NumPy."""

    def __init__(self, model: AudioTagger) -> None:
        from models.recurrent import RecurrentSound, RecurrentTagger

        assert isinstance(model, RecurrentTagger)
        self.sound = RecurrentSound(model)

    def push(self, samples: np.ndarray) -> None:
        import torch

        self.sound.push(torch.from_numpy(np.ascontiguousarray(samples)))

    def predict(self) -> np.ndarray:
        return self.sound.predict().float().cpu().numpy()


def open_engine(
    source: str | Path,
    *,
    engine: str | None = None,
    weights: str | Path | None = None,
    device: str = "auto",
    token_merging: MergingSetting = None,
    head: str | Path | None = None,
) -> Engine:
    """Open a model for tagging.

    Args:
        source: a source of `models.load_model`, or an .onnx file of export_onnx.py.
        engine: "torch" or "onnx"; by default that of the source.
        weights: file or address with the weights of a model given by name.
        device: auto, cpu or cuda; ONNX files run on the CPU.
        token_merging: see `models.token_merging.merging_schedule`; by default the model's own setting.
        head: a source of `models.heads.load_head`: tag with this head on the model's embeddings.

    Raises:
        UserError: source, engine and device cannot be combined, or see `models.load_model`.
    """
    is_onnx = str(source).lower().endswith(".onnx")
    if engine == "onnx" and not is_onnx:
        raise UserError(
            f"--engine onnx expects an .onnx file, not {source}: write one with "
            f"`python export_onnx.py -m {source} --waveform` and give it with -m"
        )
    if engine == "torch" and is_onnx:
        raise UserError(f"{source} runs with --engine onnx; --engine torch expects a model's name or a checkpoint")
    if is_onnx:
        if device == "cuda":
            raise UserError(f"{source}: ONNX files run on the CPU only; remove --device, or tag with a checkpoint")
        if weights is not None:
            raise UserError(f"{source} contains its weights; remove --weights")
        if token_merging is not None:
            raise UserError(f"{source} has the token merging of its export; give --token_merging to export_onnx.py")
        if head is not None:
            raise UserError(f"{source} has no embeddings for --head; give -m a name or a checkpoint")
        # Imported here: ONNX Runtime is slow to import, and not needed for models in PyTorch.
        from tagging.onnx_engine import OnnxEngine

        return OnnxEngine(source)
    from models import load_tagger
    from models.devices import choose_device

    chosen_device = choose_device(device)
    model = load_tagger(source, head=head, weights=weights, device=chosen_device, token_merging=token_merging)
    return TorchEngine(model, chosen_device)
