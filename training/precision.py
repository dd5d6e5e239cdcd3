"""Numerical precision of forward passes: fp32, tf32, bf16 or fp16."""

import logging
from contextlib import AbstractContextManager, nullcontext

import torch

logger = logging.getLogger(__name__)


class Precision:
    """The autocast context and the gradient scaler of a precision on a device.

    Args:
        mode: `fp32`; `tf32` (float32 with matrix products of 10-bit mantissas on GPUs that support it); `bf16`; or
            `fp16` with a scaled loss, on GPUs only, otherwise float32. CED's names `noamp`, `amp` and `amp_bf16` mean
            fp32, fp16 and bf16.
        device: device of the model.
    """

    def __init__(self, mode: str, device: torch.device) -> None:
        self.device = device
        mode = {"noamp": "fp32", "amp": "fp16", "amp_bf16": "bf16"}.get(mode, mode)
        if mode == "fp16" and device.type != "cuda":
            logger.info("mode: float16 needs a GPU; using float32")
            mode = "fp32"
        torch.set_float32_matmul_precision("high" if mode == "tf32" else "highest")
        self.dtype = {"fp32": None, "tf32": None, "fp16": torch.float16, "bf16": torch.bfloat16}[mode]
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype is torch.float16)

    def context(self) -> AbstractContextManager[object]:
        """Return a new context for one forward pass."""
        return nullcontext() if self.dtype is None else torch.autocast(self.device.type, dtype=self.dtype)
