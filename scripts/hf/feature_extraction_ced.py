"""CED's front-end as a feature extractor of Hugging Face's transformers: waveforms to log-mel spectrograms.

Frames come first, (T,F): the pipelines of transformers put clips of several lengths together along that axis alone.

Letters: B batch, S samples, F mel bands, T frames.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from transformers import BatchFeature, SequenceFeatureExtractor
from transformers.utils import logging

from models.ced_mel import CedMel
from models.frontends import SILENCE_DB

logger = logging.get_logger(__name__)


class CedFeatureExtractor(SequenceFeatureExtractor):
    """Turns waveforms into what CED models take: mel power in decibels, (T,F), each clip by itself.

    Args:
        feature_size: mel bands F.
        sampling_rate: of the waveforms, in hertz.
        f_min: lower edge of the bands in hertz.
        f_max: upper edge in hertz, None for half the sampling rate.
        n_fft: samples of a Fourier transform.
        win_size: samples of the window.
        hop_size: samples between frames.
        center: whether frames are centred.
        min_frames: shorter clips are extended with zeros until they have this many frames.
        padding_value: decibels after a clip's end; models ignore them if they get the mask.
        band_limit: hertz above which whatever a sound holds is ignored, None for no limit.
    """

    model_input_names: ClassVar[list[str]] = ["input_values"]

    def __init__(
        self,
        feature_size: int = 64,
        sampling_rate: int = 16000,
        f_min: float = 0.0,
        f_max: float | None = None,
        n_fft: int = 512,
        win_size: int = 512,
        hop_size: int = 160,
        center: bool = True,
        min_frames: int = 16,
        padding_value: float = SILENCE_DB,
        band_limit: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(feature_size, sampling_rate, padding_value, **kwargs)
        self.f_min, self.f_max = f_min, f_max
        self.n_fft, self.win_size, self.hop_size = n_fft, win_size, hop_size
        self.center, self.min_frames, self.band_limit = center, min_frames, band_limit
        with torch.device("cpu"):
            self._front_end = CedMel(
                sample_rate=sampling_rate,
                n_mels=feature_size,
                n_fft=n_fft,
                win_size=win_size,
                hop_size=hop_size,
                f_min=f_min,
                f_max=f_max,
                center=center,
                min_frames=min_frames,
            )
            if band_limit is not None:
                self._front_end.limit_band(band_limit)

    def __call__(
        self,
        raw_speech: Any,
        sampling_rate: int | None = None,
        padding: bool | str = True,
        max_length: int | None = None,
        truncation: bool = False,
        return_tensors: str | None = None,
        return_attention_mask: bool | None = None,
    ) -> BatchFeature:
        """Compute spectrograms.

        Args:
            raw_speech: a waveform (S,) of floats in [-1, 1], or several: a list of them or an array (B,S).
            sampling_rate: of the waveforms in hertz; give it, so that a wrong one is noticed.
            padding: True for the longest clip's length, "max_length" for that of `max_length`, False for a list of
                spectrograms of their own lengths.
            max_length: in samples.
            truncation: cut longer clips to `max_length`.
            return_tensors: "pt", "np", or None for NumPy as well.
            return_attention_mask: whether to return the mask of a clip's own frames; true by default.

        Returns:
            `input_values` (B,T,F) float32 in decibels, and `attention_mask` (B,T) int32.

        Raises:
            ValueError: another sampling rate, or a clip that is none: several channels, empty, integers, NaN.
        """
        if sampling_rate is None:
            logger.warning_once("give the feature extractor `sampling_rate`, so that a wrong one is noticed")
        elif sampling_rate != self.sampling_rate:
            raise ValueError(
                f"the waveforms have {sampling_rate} Hz, this model takes {self.sampling_rate} Hz: resample them first"
            )
        clips = [self._check_waveform(clip, index) for index, clip in enumerate(_as_list(raw_speech))]
        if truncation and max_length is not None:
            clips = [clip[:max_length] for clip in clips]
        features = [{"input_values": self._front_end(clip[None])[0].T.contiguous().numpy()} for clip in clips]
        return self.pad(
            features,
            padding=padding,
            max_length=None if max_length is None else self._front_end.n_frames(max_length),
            return_tensors=return_tensors,
            return_attention_mask=return_attention_mask,
        )

    def pad(
        self,
        processed_features: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        padding: bool | str = True,
        max_length: int | None = None,
        truncation: bool = False,
        pad_to_multiple_of: int | None = None,
        return_attention_mask: bool | None = None,
        return_tensors: str | None = None,
    ) -> BatchFeature:
        """Put spectrograms of several lengths into one batch; a collator of `Trainer` calls it.

        Args:
            processed_features: what `__call__` returned for each clip or for several, perhaps with labels and more,
                which are stacked.
            padding: as in `__call__`.
            max_length: in frames.
            truncation: cut longer spectrograms to `max_length`.
            pad_to_multiple_of: make the length a multiple of this many frames.
            return_attention_mask: whether to return the mask of a clip's own frames; true by default.
            return_tensors: "pt", "np", or None for NumPy as well.

        Returns:
            `input_values` (B,T,F), `attention_mask` (B,T), and the rest.
        """
        if not isinstance(processed_features, Mapping):
            keys = processed_features[0]
            processed_features = {key: [example[key] for example in processed_features] for key in keys}
        features = dict(processed_features)
        mels = [np.asarray(mel, np.float32) for mel in features.pop("input_values")]
        masks = features.pop("attention_mask", None)
        lengths = [len(mel) for mel in mels] if masks is None else [int(np.asarray(mask).sum()) for mask in masks]
        if truncation and max_length is not None:
            lengths = [min(length, max_length) for length in lengths]
        mels = [mel[:length] for mel, length in zip(mels, lengths, strict=True)]
        if padding and padding != "do_not_pad":
            n_frames = max(lengths)
            if padding == "max_length" and max_length is not None:
                n_frames = max(n_frames, max_length)
            n_frames = -(-n_frames // (pad_to_multiple_of or 1)) * (pad_to_multiple_of or 1)
            behind = [(0, n_frames - length) for length in lengths]
            mels = [
                np.pad(mel, (more, (0, 0)), constant_values=self.padding_value)
                for mel, more in zip(mels, behind, strict=True)
            ]
        features["input_values"] = mels
        if self.return_attention_mask if return_attention_mask is None else return_attention_mask:
            features["attention_mask"] = [
                (np.arange(len(mel)) < length).astype(np.int32) for mel, length in zip(mels, lengths, strict=True)
            ]
        if return_tensors is None and len({mel.shape for mel in mels}) == 1:
            return_tensors = "np"
        return BatchFeature(features, tensor_type=return_tensors)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings, without what is computed from them."""
        settings = super().to_dict()
        del settings["_front_end"]
        return settings

    def _check_waveform(self, clip: Any, index: int) -> torch.Tensor:
        """A waveform (S,) float32, or a sentence about what is wrong with it."""
        wave = torch.as_tensor(clip)
        if wave.ndim != 1 or len(wave) == 0:
            raise ValueError(f"clip {index} is {tuple(wave.shape)}; expected one channel of at least one sample, (S,)")
        if not wave.is_floating_point():
            raise ValueError(f"clip {index} holds {wave.dtype}; expected floats in [-1, 1] (int16: divide by 32768)")
        if not bool(wave.isfinite().all()):
            raise ValueError(f"clip {index} holds NaN or infinite samples")
        return wave.detach().cpu().float()


def _as_list(clips: Any) -> list[Any]:
    """One clip or several, as a list of clips."""
    if hasattr(clips, "ndim"):
        return list(clips) if clips.ndim > 1 else [clips]
    return list(clips) if len(clips) > 0 and np.ndim(clips[0]) > 0 else [clips]
