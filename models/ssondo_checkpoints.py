"""Checkpoints of S-SONDO's training as published, with their settings converted to those of this project.

They are Lightning's: a "state_dict" whose names begin with `student_model.`, and the "training_config" of the run.
"""

import logging
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from common.errors import Faults, UserError, some
from models.description import ModelDescription, check_description
from models.headed import SEGMENT_SECONDS

logger = logging.getLogger(__name__)

_PREFIX = "student_model."


def is_ssondo(content: Mapping[str, Any]) -> bool:
    """Whether a file's content is a checkpoint of S-SONDO's training."""
    return isinstance(content.get("training_config"), Mapping) and isinstance(content.get("state_dict"), Mapping)


def read_ssondo(content: Mapping[str, Any], origin: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the student's weights and settings.

    Args:
        content: of the file, see `is_ssondo`.
        origin: the file, for messages.

    Returns:
        The state dict, and {"model", "model_args", "num_classes", and "projection": width of the teacher's space}. A
        student that was distilled has no classes (0): its head projects into the teacher's space.

    Raises:
        UserError: it describes itself otherwise, or its student is none that can be built here.
    """
    tensors = content["state_dict"]
    state = {key.removeprefix(_PREFIX): value for key, value in tensors.items() if str(key).startswith(_PREFIX)}
    if not state:
        raise UserError(f"{origin}: found names such as {some(map(str, tensors))}; expected {_PREFIX}* of S-SONDO")
    if not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{origin}: its state_dict holds values that are no tensors")
    try:
        config = _read_config(content["training_config"], origin)
    # RuntimeError: of a tensor in place of a number
    except (AttributeError, IndexError, KeyError, OverflowError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(
            f"{origin}: its training_config is not as S-SONDO writes it ({type(error).__name__}: {error!s:.200}); give "
            f"`-m NAME --weights FILE` with a file that holds the weights alone"
        ) from error
    check_description(ModelDescription, config, f"{origin}: its training_config")
    return state, config


def _read_config(config: Mapping[str, Any], origin: str) -> dict[str, Any]:
    student, mel, head = config["student_model"], config["preprocess"]["logmelspec"], config["classification_head"]
    name, rate = str(student["model_name"]).lower(), int(student["sr"])
    n_fft, high = round(rate * mel["win_len"]), mel.get("f_max")
    arguments: dict[str, Any] = {
        "sample_rate": rate,
        "n_mels": int(mel["n_mels"]),
        "n_fft": n_fft,
        "win_size": n_fft,
        "hop_size": round(rate * mel["hop_len"]) if mel.get("hop_len") is not None else n_fft // 2,
        "f_min": float(mel["f_min"]),
        "f_max": float(rate // 2 if high is None else high),
    }
    slices = config["preprocess"].get("slice_audio") or {}
    seconds = float(slices.get("win_len", SEGMENT_SECONDS))
    if seconds != SEGMENT_SECONDS:  # else it goes without saying, as in files that were written before
        arguments["segment_seconds"] = seconds
    step = float(slices.get("step_size") or seconds)
    if step != seconds:
        logger.warning("%s: its segments of %g s began every %g s; here they lie side by side", origin, seconds, step)
    expected: dict[str, tuple[Any, Any]] = {"classification_head.head_type": (head["head_type"], "mlp")}
    normal = config["preprocess"].get("normalize") or {}
    expected["preprocess.normalize.mean"] = (float(normal.get("mean", 0)), 0.0)
    expected["preprocess.normalize.std"] = (float(normal.get("std", 1)), 1.0)
    if "eres" in name:
        model = "eres2net"
        n_stages = 5 if student["add_layer"] else 4
        blocks = [int(number) for number in student["num_blocks"]][:n_stages]
        arguments |= {"m_channels": int(student["m_channels"]), "num_blocks": blocks}
        expected["student_model.pooling_func"] = (student["pooling_func"], "TSTP")
        expected["student_model.feat_dim"] = (int(student["feat_dim"]), arguments["n_mels"])
    elif "dymn" in name or "mn" in name:
        model = "dymn" if "dy" in name else "mobilenetv3"
        arguments["width"] = float(student["width_mult"])
        expected["student_model.strides"] = (tuple(student.get("strides", (2, 2, 2, 2))), (2, 2, 2, 2))
        if model == "dymn":
            arguments["temperature"] = float(student.get("pretrain_final_temp", 1.0))
        for key, plain in (("reduced_tail", False), ("dilated", False), ("relu_only", False), ("se_dims", "c")):
            expected[f"student_model.{key}"] = (student.get(key, plain), plain)
    else:
        raise UserError(f"{origin}: found a student {name!r}; expected one of mn*, dymn* and ERes2Net")
    faults = Faults(f"{origin}: its student cannot be built here; it")
    for key, (found, known) in expected.items():
        if found != known:
            faults.add(f"{key} is {found!r}, expected {known!r}")
    faults.raise_if_any()
    width = int(head["n_classes"])
    distilled = bool((config.get("knowledge_distillation") or {"loss": True}).get("loss"))
    return {
        "model": model,
        "model_args": arguments,
        "num_classes": 0 if distilled else width,
        "projection": width if distilled else None,
    }
