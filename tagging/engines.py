"""What computes: a model in PyTorch or an exported file in ONNX Runtime, behind one face.

Letters: B batch, S samples, C classes, E embedding width; T' time steps of an embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from common.errors import UserError
from common.samples import as_clips

if TYPE_CHECKING:
    import torch

    from models.base import AudioTagger
    from models.token_merging import MergingSetting


MOST_THREADS = 8  # side by side; with more cores each takes several


class Engine(Protocol):
    """Gives clips their probabilities. Safe to call from several threads at once.

    Attributes:
        name: of the model or its file.
        sample_rate: of the clips it takes, in hertz.
        labels: names of the C classes.
        max_samples: the longest clip it takes, None where any length will do.
        n_threads: threads that may call it at once with profit.
        batch_size: clips a call that use it well.
    """

    name: str
    sample_rate: int
    labels: list[str]
    max_samples: int | None
    n_threads: int
    batch_size: int

    def predict(self, clips: Sequence[np.ndarray]) -> np.ndarray:
        """Tag clips, (S,) each and of any length, as `common.samples.as_clips` takes them: float32 (B,C)."""
        ...


class TorchEngine:
    """A model in PyTorch; one without classes gives no probabilities, (B,0), and embeds.

    On a CPU each calling thread computes alone, on one core of a few: several batches side by side keep them busier
    than one batch spread over them, whose every operation ends in a wait.

    Args:
        model: in evaluation mode, on `device`.
        device: where the model is.
        n_threads: threads that will call it at once; by default as many as PyTorch would use for one operation on a
            CPU, at most `MOST_THREADS`, and one on another device.
    """

    max_samples: int | None = None

    def __init__(self, model: AudioTagger, device: str | torch.device = "cpu", n_threads: int | None = None) -> None:
        import torch

        self.model, self.device = model, torch.device(device)
        self.name, self.sample_rate, self.labels = model.name, model.sample_rate, list(model.labels)
        on_cpu = self.device.type == "cpu"
        self.batch_size = 8 if on_cpu else 64
        self.n_threads = n_threads or (min(torch.get_num_threads(), MOST_THREADS) if on_cpu else 1)
        if on_cpu:
            torch.set_num_threads(max(torch.get_num_threads() // self.n_threads, 1))

    def predict(self, clips: Sequence[np.ndarray]) -> np.ndarray:
        """Tag clips, (S,) each and of any length, as `common.samples.as_clips` takes them: probabilities (B,C).

        Raises:
            UserError: they are no clips, or the weights give NaN.
        """
        import torch

        if not self.labels:
            return np.empty((len(clips), 0), np.float32)
        with torch.inference_mode():
            return self.model.predict_waveform(*self._batch(as_clips(clips))).float().cpu().numpy()

    def embed(self, clips: Sequence[np.ndarray]) -> tuple[np.ndarray, list[np.ndarray]]:
        """Embed clips: one vector a clip, float32 (B,E), and the vectors (T',E) of each clip's own time steps.

        Raises:
            UserError: they are no clips, or a model without classes gives NaN, which `predict` tells of others.
        """
        import torch

        clips = as_clips(clips)
        with torch.inference_mode():
            whole, steps = self.model.embed_waveform(*self._batch(clips))
        if not self.labels and not bool(whole.isfinite().all()):
            raise UserError(f"the model {self.name} gives NaN: a clip does, its weights are damaged, or it diverged")
        frames = steps.float().cpu().numpy()
        own = [frames[i, : self.model.n_steps(len(clip))] for i, clip in enumerate(clips)]
        return whole.float().cpu().numpy(), own

    def _batch(self, clips: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
        """Waveforms (B,S), zero behind each clip's end, and lengths (B,)."""
        import torch

        batch = np.zeros((len(clips), max(map(len, clips))), np.float32)
        for row, clip in zip(batch, clips, strict=True):
            row[: len(clip)] = clip
        lengths = torch.tensor([len(clip) for clip in clips])
        return torch.from_numpy(batch).to(self.device), lengths.to(self.device)


def describe_head(head: str | Path | None) -> dict[str, str]:
    """Return what must be the same where tags are added to: the head as it was given, and a hash of its tensors."""
    if head is None:
        return {}
    from models.heads import load_head
    from models.loading import weights_hash

    return {"head": str(head), "head_sha256": weights_hash(load_head(head))[:16]}


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
        source: what `models.load_model` takes, or an .onnx file that export_onnx.py wrote.
        engine: "torch" or "onnx"; by default what the source is.
        weights: file or address with the weights of a model given by name.
        device: auto, cpu or cuda; ONNX files run on the CPU.
        token_merging: see `models.token_merging.merging_schedule`; by default what the model says itself.
        head: what `models.heads.load_head` takes: tag with this head on the model's embeddings.

    Raises:
        UserError: source, engine and device do not go together, or see `models.load_model`.
    """
    is_onnx = str(source).lower().endswith(".onnx")
    if engine == "onnx" and not is_onnx:
        raise UserError(
            f"--engine onnx wants an .onnx file, not {source}: write one with "
            f"`python export_onnx.py -m {source} --waveform` and give it with -m"
        )
    if engine == "torch" and is_onnx:
        raise UserError(f"{source} runs with --engine onnx; --engine torch wants a model's name or a checkpoint")
    if is_onnx:
        if device == "cuda":
            raise UserError(f"{source}: ONNX files run on the CPU here; leave --device out, or tag with a checkpoint")
        if weights is not None:
            raise UserError(f"{source} holds its weights; leave --weights out")
        if token_merging is not None:
            raise UserError(f"{source} merges what it was exported with; give --token_merging to export_onnx.py")
        if head is not None:
            raise UserError(f"{source} gives no embeddings that --head could read; give -m a name or a checkpoint")
        from tagging.onnx_engine import OnnxEngine

        return OnnxEngine(source)
    from models import load_tagger
    from models.devices import choose_device

    where = choose_device(device)
    model = load_tagger(source, head=head, weights=weights, device=where, token_merging=token_merging)
    return TorchEngine(model, where)
