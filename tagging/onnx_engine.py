"""Exported models in ONNX Runtime.

Files that take waveforms need NumPy alone; for files that take spectrograms PyTorch and our front-end are imported.

Letters: B batch, S samples, F mel bands, T frames, C classes.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import onnxruntime

from common.class_names import find_label_fault
from common.errors import UserError, some
from common.onnx_runtime import create_options
from common.parsing import parse_json
from common.samples import as_clips
from tagging.base import MAX_THREADS

if TYPE_CHECKING:
    from models.frontends import FrontEnd

# As in models.settings, which imports PyTorch.
SAMPLE_RATES = (1000, 768_000)
FRAMES = (1, 1_000_000)
# The metadata that published exports of CED lack.
_PUBLISHED = {
    "sample_rate": "16000",
    "input": "feats",
    "front_end": json.dumps({"class": "CedMel", "sample_rate": 16000, "min_frames": 16}),
    "max_frames": "1012",
}


_Value = tuple[str, list[Any]]  # name and shape of an input or output


class OnnxEngine:
    """Runs a file of export_onnx.py, or a published export of CED. Safe to call from several threads at once.

    Sigmoid or softmax are in the graph. A clip's probabilities depend on that clip alone: eight-bit graphs compute
    their scales from the whole batch, and are therefore run for one clip at a time.

    Args:
        path: the .onnx file.
        n_threads: number of threads that will call it at once, among which the cores are divided; by default one a
            core, at most `MAX_THREADS`.

    Attributes:
        name: of the model.
        sample_rate: of the clips, in hertz.
        labels: names of the C classes.
        max_samples: length of the longest clip supported, None for any length.
        batch_size: clips per call that use it well.
        precision: "fp32", "fp16", "int8" or "quantized".
        takes: "waveform" or "feats".
        front_end: class and arguments of the front-end, also where it is in the graph.

    Raises:
        UserError: the file cannot be read, or export_onnx.py has not written it.
    """

    def __init__(self, path: str | Path, n_threads: int | None = None) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            what = "is no regular file" if self.path.exists() else "there is no such file"
            raise UserError(f"{path}: {what}; export_onnx.py writes one")
        n_cores = _n_cores()
        self.n_threads = n_threads or min(n_cores, MAX_THREADS)
        options = create_options()
        options.intra_op_num_threads = max(n_cores // self.n_threads, 1)
        options.inter_op_num_threads = 1
        options.log_severity_level = 4  # errors are in the exceptions
        options.add_session_config_entry(
            "session.intra_op.allow_spinning", "0"
        )  # it would take the cores from the decoders
        try:
            self.session = onnxruntime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"], enable_fallback=0
            )
            facts = self.session.get_modelmeta().custom_metadata_map
            inputs = [(each.name, each.shape) for each in self.session.get_inputs()]
            outputs = [(each.name, each.shape) for each in self.session.get_outputs()]
        except Exception as error:  # the runtime's exceptions have no common base class
            raise UserError(
                f"{path}: ONNX Runtime cannot read it ({_first_line(error)}); is the file whole?"
            ) from error
        self._read_facts(facts, inputs, outputs)
        # Published files do not have their precision; they are as fast one by one.
        self._one_by_one = facts.get("precision") not in ("fp32", "fp16", "quantized")
        self.batch_size = 1 if self._one_by_one else 8
        self._features: FrontEnd | None = None
        self.max_samples: int | None = None
        if self.takes == "feats":
            from models.argument_checks import restore_front_end

            try:
                self._features = restore_front_end(self.front_end)
            except UserError as error:
                raise UserError(f"{path}: its metadata: {error}; export it again") from error
            if self._features.sample_rate != self.sample_rate:
                raise UserError(
                    f"{path}: its metadata has sample_rate {self.sample_rate}, and a front-end for "
                    f"{self._features.sample_rate}; export it again"
                )
            if self._max_frames is not None:
                self.max_samples = _longest(self._features, self._max_frames)
                if not self.max_samples:
                    raise UserError(
                        f"{path}: its metadata has max_frames {self._max_frames}, fewer than the "
                        f"{self._features.n_frames(1)} of the shortest clip; export it again"
                    )

    def predict(self, clips: Sequence[np.ndarray]) -> np.ndarray:
        """Compute the probabilities of clips.

        Args:
            clips: (S,) of any lengths, see `common.samples.as_clips`; those of one length are computed together where
                the precision allows it.

        Returns:
            Probabilities, float32 (B,C).

        Raises:
            UserError: the clips are not valid, or one is longer than `max_samples` or not finite.
        """
        clips = as_clips(clips)
        lengths = np.array([len(clip) for clip in clips], np.int64)
        result = np.empty((len(clips), len(self.labels)), np.float32)
        for length in np.unique(lengths):
            if length < 1 or (self.max_samples is not None and length > self.max_samples):
                raise UserError(
                    f"{self.path} takes clips of 1 to {self.max_samples or 'any number of'} samples at "
                    f"{self.sample_rate} Hz, not {length}: cut them, or export with a larger --max-frames"
                )
            rows = np.flatnonzero(lengths == length)
            waveform = np.stack([clips[int(row)] for row in rows]).astype(np.float32, copy=False)
            result[rows] = self._run(waveform if self._features is None else self._spectrogram(waveform))
        if not np.isfinite(result).all():
            rows = np.flatnonzero(~np.isfinite(result).all(1))
            if any(np.isfinite(clips[int(row)]).all() for row in rows):
                raise UserError(f"the output of {self.path} is NaN: its weights are damaged or its training diverged")
            raise UserError(f"clips {some(map(str, rows))} of the batch hold NaN or infinite samples")
        return result

    def predict_spectrogram(self, mel: np.ndarray) -> np.ndarray:
        """Compute the probabilities of spectrograms, for files that take them.

        Args:
            mel: float32 (B,F,T) in the scale of `front_end`.

        Returns:
            Probabilities, float32 (B,C).

        Raises:
            UserError: the file takes waveforms, or spectrograms of another shape.
        """
        if self.takes != "feats":
            raise UserError(f"{self.path} takes waveforms and contains its front-end; export without --waveform")
        return self._run(mel)

    def _spectrogram(self, waveform: np.ndarray) -> np.ndarray:
        import torch

        assert self._features is not None
        with torch.inference_mode():
            return cast(np.ndarray, self._features(torch.from_numpy(waveform)).numpy())

    def _run(self, batch: np.ndarray) -> np.ndarray:
        if self._one_by_one and len(batch) > 1:
            return np.concatenate([self._run(batch[row : row + 1]) for row in range(len(batch))])
        try:
            result = cast(np.ndarray, self.session.run([self._output], {self._input: batch})[0])
            if result.shape != (len(batch), len(self.labels)):
                raise ValueError(f"its output has the shape {result.shape}")
            return result
        except Exception as error:
            raise UserError(
                f"{self.path}: ONNX Runtime failed for an input of shape {batch.shape} ({_first_line(error)}); files "
                "of other programs may support fewer frames only: give shorter clips, or export the model again"
            ) from error

    def _read_facts(self, facts: dict[str, str], inputs: list[_Value], outputs: list[_Value]) -> None:
        """Read the metadata of the file; that of published exports of CED is completed from `_PUBLISHED`."""
        self._input, self._output = (each[0][0] if each else "" for each in (inputs, outputs))
        shape = outputs[0][1] if outputs else []
        n_classes = shape[-1] if len(shape) == 2 else None
        published = "labels" not in facts and facts.get("model_type") == "CED" and self._input == "feats"
        if published and isinstance(n_classes, int):
            from models.labels import labels_for

            facts = {"labels": json.dumps(labels_for(n_classes, None))} | _PUBLISHED
        missing = [key for key in ("labels", "sample_rate", "input", "front_end") if key not in facts]
        takes = {"feats": 3, "waveform": 2}.get(self._input)
        if missing or len(inputs) != 1 or facts["input"] != self._input or takes != len(inputs[0][1]):
            raise UserError(
                f"{self.path} is an ONNX model that export_onnx.py has not written: found inputs "
                f"{some(name for name, _ in inputs)} and no {some(missing)} in its metadata; export its checkpoint"
            )
        origin = f"{self.path}: its metadata"
        try:
            self.labels: list[str] = parse_json(facts["labels"], list)
            self.front_end: dict[str, Any] = parse_json(facts["front_end"])
        except ValueError as error:
            raise UserError(f"{origin}: labels or front_end cannot be read ({error}); export it again") from None
        if not isinstance(self.front_end.get("class"), str):
            raise UserError(f"{origin}: its front_end has no class; export it again")
        self.sample_rate = _read_number(facts["sample_rate"], SAMPLE_RATES, f"{origin}, sample_rate")
        self._max_frames = None
        if facts.get("max_frames"):
            self._max_frames = _read_number(facts["max_frames"], FRAMES, f"{origin}, max_frames")
        if not isinstance(n_classes, int):
            raise UserError(f"{origin}: the number of classes is not fixed; export it again")
        if fault := find_label_fault(n_classes, self.labels):
            raise UserError(f"{origin}: {fault}; export it again")
        self.takes, self.precision = facts["input"], facts.get("precision", "fp32")
        self.name = facts.get("name") or self.path.stem


def _read_number(text: str, limits: tuple[int, int], origin: str) -> int:
    low, high = limits
    if not re.fullmatch(r"[0-9]{1,9}", text) or not low <= int(text) <= high:
        raise UserError(f"{origin}: found {text!r:.80}; expected a whole number from {low} to {high}; export it again")
    return int(text)


def _longest(front_end: FrontEnd, max_frames: int) -> int:
    """Return the samples of the longest clip that has `max_frames` frames; 0 where none has so few."""
    if front_end.n_frames(1) > max_frames:  # every clip is padded to more
        return 0
    n_samples = max_frames * front_end.hop_size + front_end.n_fft
    while front_end.n_frames(n_samples) > max_frames:
        n_samples -= 1
    return n_samples


def _n_cores() -> int:
    """Return the number of cores that this process may use, or OMP_NUM_THREADS."""
    n_threads = os.environ.get("OMP_NUM_THREADS", "")
    if n_threads.isdigit() and int(n_threads) > 0:
        return int(n_threads)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
