"""Precision as a context: one training step for every mode."""

import logging
from contextlib import AbstractContextManager, nullcontext

import torch

logger = logging.getLogger(__name__)


class Precision:
    """A mode on a device: the context to compute in and the scaler to step with.

    Args:
        mode: `fp32`; `tf32` (float32 whose matrix products are rounded to 10 bits on GPUs that can); `bf16`; or `fp16`
            with a scaled loss, which needs a GPU and is float32 elsewhere, with a notice. CED's names `noamp`, `amp`
            and `amp_bf16` mean fp32, fp16 and bf16.
        device: where the model is.
    """

    def __init__(self, mode: str, device: torch.device) -> None:
        self.device = device
        mode = {"noamp": "fp32", "amp": "fp16", "amp_bf16": "bf16"}.get(mode, mode)
        if mode == "fp16" and device.type != "cuda":
            logger.info("mode: float16 needs a GPU; computing in float32")
            mode = "fp32"
        torch.set_float32_matmul_precision("high" if mode == "tf32" else "highest")
        self.dtype = {"fp32": None, "tf32": None, "fp16": torch.float16, "bf16": torch.bfloat16}[mode]
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype is torch.float16)

    def context(self) -> AbstractContextManager[object]:
        """Return a fresh context for one forward pass."""
        return nullcontext() if self.dtype is None else torch.autocast(self.device.type, dtype=self.dtype)
