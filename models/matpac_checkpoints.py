"""Checkpoints of MATPAC, MATPAC++ and M2D as published, with the settings that follow from their tensors.

MATPAC's hold `student_encoder.*` beside the patch projection and positions, M2D's the same names without that prefix.
Those of training hold a decoder and a teacher as well. Names of MATPAC's fine-tuned classifier (`head_norm.*`,
`head.*`) and of M2D (`norm_stats`, `target_*`, `decoder*`) are those of the published code.
"""

import csv
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from common.errors import UserError, some
from models.labels import AUDIOSET_LABELS
from models.matpac_mel import MatpacMel

logger = logging.getLogger(__name__)

_STUDENT = "student_encoder."
_FRONT_END = "log_mel."
# of training alone: predictor, teachers (tables of tensors in fairseq's files), class heads and their centre
_TRAINING_PARTS = (
    *("decoder", "mask_token", "mcl_heads.", "teacher_encoder.", "cls_student_head.", "cls_teacher_head."),
    *("cls_head_loss.", "_ema", "_cls_head_ema", "target_"),
)
_M2D = {"cls_token", "pos_embed", "patch_embed.proj.weight", "norm.weight"}
_M2D_FINE_TUNED = "ar.runtime.backbone."
_M2D_STATISTICS = (-7.1, 4.2)  # of files without `norm_stats`
_PATCH, _N_BANDS, _TARGET_LENGTH, _CLASSES = 16, 80, 608, 527


def is_matpac(state: Mapping[str, Any]) -> bool:
    """Whether a state dict is one of MATPAC's, MATPAC++'s or M2D's published ones."""
    if any(name.startswith(_STUDENT) or _M2D_FINE_TUNED in name for name in state):
        return True
    patches = state.get("patch_embed.proj.weight")
    is_spectral = isinstance(patches, Tensor) and patches.ndim == 4 and patches.shape[1] == 1
    return is_spectral and state.keys() >= _M2D and "dist_token" not in state


def read_matpac(state: Mapping[str, Any], origin: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the encoder's weights, in this project's names, and its settings.

    Args:
        state: see `is_matpac`.
        origin: the file, for messages.

    Returns:
        The state dict, and {"model", "model_args", "num_classes"}, with "labels" of a classifier of AudioSet. An
        encoder has no classes.

    Raises:
        UserError: M2D fine-tuned in EVAR, another front-end, or tensors of other shapes.
    """
    if fine_tuned := [name for name in state if _M2D_FINE_TUNED in name]:
        raise UserError(
            f"{origin} is M2D fine-tuned in EVAR (found {fine_tuned[0]}), which is not read: give an M2D encoder "
            "(m2d_vit_base-80x608p16x16-*, names such as blocks.0.norm1.weight)"
        )
    is_student = any(name.startswith(_STUDENT) for name in state)
    dropped = [name for name in state if name.startswith(_TRAINING_PARTS)]
    if dropped:
        logger.warning("%s: %d entries of its training are dropped: %s", origin, len(dropped), some(dropped))
    kept = {name.removeprefix(_STUDENT): value for name, value in state.items() if name not in dropped}
    if not all(isinstance(value, Tensor) for value in kept.values()):
        raise UserError(f"{origin}: its state dict holds values that are no tensors")
    _take_front_end(kept, origin)
    try:
        arguments = _find_arguments(kept, is_student)
        config = {"model": "matpac" if is_student else "m2d", "model_args": arguments} | _take_head(kept, arguments)
    except (IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(
            f"{origin}: its tensors are not those of MATPAC or M2D ({type(error).__name__}: {error!s:.200})"
        ) from error
    return kept, config


def _take_front_end(state: dict[str, Tensor], origin: str) -> None:
    """Remove the tensors of MATPAC's front-end, which must be those of `MatpacMel`."""
    front_end = MatpacMel()
    own = {"spectrogram.window": front_end.window, "mel_scale.fb": front_end.mel_weights}
    for name in [name for name in state if name.startswith(_FRONT_END)]:
        value = state.pop(name)
        expected = next((tensor for ending, tensor in own.items() if name.endswith(ending)), None)
        if expected is None or value.shape != expected.shape or not torch.allclose(value.float(), expected, atol=1e-5):
            raise UserError(
                f"{origin}: its front-end ({name} of shape {tuple(value.shape)}) is not MATPAC's for 16 kHz; expected "
                "n_fft 400 and 80 mel bands from 50 to 8000 Hz"
            )


def _find_arguments(state: dict[str, Tensor], is_student: bool) -> dict[str, Any]:
    """Return settings of the network; `norm_stats` of M2D is removed."""
    front_end = MatpacMel()
    statistics = [front_end.mean, front_end.std]
    if not is_student:
        statistics = state.pop("norm_stats", torch.tensor(_M2D_STATISTICS)).double().round(decimals=6).tolist()
    arguments: dict[str, Any] = dict(zip(("mean", "std"), statistics, strict=True)) | {"center": not is_student}
    n_columns, rest = divmod(state["pos_embed"].shape[1] - 1, _N_BANDS // _PATCH)
    if not rest and n_columns * _PATCH != _TARGET_LENGTH:
        arguments["target_length"] = n_columns * _PATCH
    return arguments


def _take_head(state: dict[str, Tensor], arguments: dict[str, Any]) -> dict[str, Any]:
    """Rename the classifier's tensors, or add those of one without classes; return what describes its classes."""
    width = state["patch_embed.proj.weight"].shape[0]
    n_rows = _N_BANDS // _PATCH
    # 0: a new head takes its statistics from data (training.student.start_from_data)
    n_batches = state.pop("head_norm.num_batches_tracked", torch.tensor(int("head_norm.running_mean" in state)))
    weight, bias = state.pop("head.weight", None), state.pop("head.bias", None)
    if weight is None or bias is None:
        weight, bias = torch.zeros(0, n_rows * width), torch.zeros(0)
    elif weight.shape[1] == width:
        arguments["pooling"] = "mean"
    state |= {"head.1.weight": weight, "head.1.bias": bias}
    state["head.0.running_mean"] = state.pop("head_norm.running_mean", torch.zeros(weight.shape[1]))
    state["head.0.running_var"] = state.pop("head_norm.running_var", torch.ones(weight.shape[1]))
    state["head.0.num_batches_tracked"] = n_batches
    labels = {"labels": list_sorted_labels()} if len(weight) == _CLASSES else {}
    return {"num_classes": len(weight)} | labels


def list_sorted_labels() -> list[str]:
    """Return AudioSet's labels in the order of their identifiers (mid), the order of MATPAC's published classifier."""
    with open(AUDIOSET_LABELS, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [row["display_name"] for row in sorted(rows, key=lambda row: row["mid"])]
