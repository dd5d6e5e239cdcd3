"""The forward pass of a batch: mixup, spectrograms, the online teacher, and the losses of the objective."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from distill.batch import Batch
from distill.objectives import Needs, Objective
from distill.replay import Replay
from models import AudioTagger, Ensemble
from models.ensemble import ComputeSpectrogram
from models.frontends import FrontEnd
from training.mixup import mix_spectrograms, mix_targets, mix_waveforms
from training.tally import TargetTally


class _CompiledStudent:
    """A student whose forward methods are compiled on first use; other attributes are those of the student."""

    def __init__(self, student: AudioTagger) -> None:
        self._student = student
        for name in ("encode", "forward_spectrogram", "embed_clips", "tag_and_embed"):
            setattr(self, name, torch.compile(getattr(student, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._student, name)


class LossModule(nn.Module):
    """Student and objective as one module, as DistributedDataParallel expects it.

    Args:
        model: the student.
        objective: computes the losses from student and batch; its own parameters are trained as well.
        needs: requirements of the objective.
        replay: applies the augmentation of the batches.
        mixup_on: `spectrogram`, `waveform`, or None for no mixup.
        compiled: compile the student's network with `torch.compile`.
        add_teacher: returns the batch with the online teacher's output, see `add_teacher_output`; None if the batch has
            targets. A function, not a module, since the teacher is not trained.
        targets: collects statistics of the targets.
    """

    def __init__(
        self,
        model: AudioTagger,
        objective: Objective,
        needs: Needs,
        replay: Replay,
        mixup_on: str | None,
        *,
        compiled: bool = False,
        add_teacher: Callable[[Batch, ComputeSpectrogram], Batch] | None = None,
        targets: TargetTally | None = None,
    ) -> None:
        super().__init__()
        self.model, self.objective, self.needs = model, objective, needs
        self.replay, self.mixup_on, self.add_teacher = replay, mixup_on, add_teacher
        self.targets = targets or TargetTally(objective)
        self._compiled = _CompiledStudent(model) if compiled else None

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return the losses of a batch on its device, means over its clips."""
        if self.mixup_on == "waveform":
            batch = mix_waveforms(batch)
        if self.mixup_on is not None:
            batch = mix_targets(batch)
        if self.add_teacher is not None:
            batch = self.add_teacher(batch, self._spectrogram)
        self.targets.add(batch)
        mel, n_frames = self._spectrogram(self.model.front_end, batch)
        student = self.model if self._compiled is None else cast(AudioTagger, self._compiled)
        losses = self.objective(student, replace(batch, mel=mel, n_frames=n_frames))
        if not isinstance(losses, Mapping) or "loss" not in losses:
            found = f"the keys {list(losses)}" if isinstance(losses, Mapping) else type(losses).__name__
            raise TypeError(
                f"{type(self.objective).__name__}.forward: expected a dict with the key 'loss', got {found}"
            )
        return cast(dict[str, Tensor], losses)

    def spectrogram(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Return the student's input for a batch, augmented and mixed: (B, F, T), frames (B,) or None."""
        return self._spectrogram(self.model.front_end, mix_waveforms(batch) if self.mixup_on == "waveform" else batch)

    def _spectrogram(self, front_end: FrontEnd, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Return the masked spectrogram of the clips or their mixtures: (B, F, T), frames (B,) or None."""
        mel, n_frames = self.replay.spectrogram(front_end, batch)
        if self.mixup_on == "spectrogram":
            mel, n_frames = mix_spectrograms(mel, n_frames, batch.mixup_weight)
        return mel, n_frames


def add_teacher_output(teacher: Ensemble, needs: Needs, batch: Batch, spectrogram: ComputeSpectrogram) -> Batch:
    """Return a batch with a teacher's output for the same clips, with the same augmentation and mixup.

    Args:
        teacher: on the batch's device.
        needs: requirements of the objective: probabilities, embeddings or layers of the teacher.
        batch: the batch.
        spectrogram: computes the input of a model with its front-end.
    """
    if needs.targets == "classes":
        batch = replace(batch, target=teacher.probabilities(batch, spectrogram))
    elif needs.targets == "embeddings":
        batch = replace(batch, target=teacher.embeddings(batch, spectrogram))
    if needs.teacher_layers:
        batch = replace(batch, teacher=teacher.encode(batch, spectrogram, needs.teacher_layers))
    return batch
