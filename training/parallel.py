"""Several processes that train one model: torchrun starts them, DistributedDataParallel joins their gradients.

Whatever is decided (where to write, what to resume, when to stop) is decided alike by all; rank 0 alone writes.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together.

    Attributes:
        rank: its number.
        world_size: how many there are.
    """

    rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def sum(self, value: Tensor) -> Tensor:
        """Return the sum of every rank's `value`, the same on all of them."""
        if self.world_size > 1:
            value = value.clone()
            dist.all_reduce(value)
        return value

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's `value` on every rank; tensors in it arrive on the CPU."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's `value`, in the order of ranks, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values


@contextmanager
def process_group() -> Iterator[Ranks]:
    """Join the processes that torchrun has started; alone where it has not."""
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if world_size == 1:
        yield Ranks()
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    # torchrun's static rendezvous, that of one node unless told otherwise, keeps one store over its restarts: without a
    # prefix of its own, a rank that starts again could read there where a rank of the attempt before used to listen.
    # (Over several nodes the c10d rendezvous makes a store an attempt, and nodes may count attempts differently.)
    store, rank, _ = next(rendezvous("env://"))
    if os.environ.get("GROUP_WORLD_SIZE", "1") == "1":
        store = dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    # Both backends: a tensor goes by the one of its device.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    try:
        yield Ranks(rank, world_size)
        # DistributedDataParallel never lets go of the group's threads. One that still holds tensors of the last
        # exchange when Python ends would take the process with it (SIGABRT): let all come here, and the threads rest.
        dist.barrier()
    finally:
        dist.destroy_process_group()


@lru_cache(maxsize=64)
def split_mirrored(n: int, parts: int) -> tuple[np.ndarray, ...]:
    """Split the positions 0 … n - 1 of a batch into shares that each hold every position together with its mirror.

    Position i and n - 1 - i lie in the same share, mirrored, so that a share reversed is that share of the reversed
    batch: mixup with the mirror gives the same mixtures in parts as in the whole. A batch with fewer pairs than parts
    is not split: every part gets all of it, and counts that much less.

    Returns:
        `parts` arrays of int64.
    """
    if n < parts:
        return (np.arange(n),) * parts
    shares = []
    for lower in np.array_split(np.arange((n + 1) // 2), parts):
        upper = n - 1 - lower[::-1]
        shares.append(np.concatenate([lower, upper[~np.isin(upper, lower)]]))
    if any(len(share) == 0 for share in shares):  # fewer pairs than parts
        return (np.arange(n),) * parts
    return tuple(shares)


class _SharedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm whose statistics are those of all ranks' batches together, on any device.

    PyTorch's own SyncBatchNorm runs on GPUs alone.
    """

    def forward(self, x: Tensor) -> Tensor:
        out = self._normalised(x) if self.training else super().forward(x)
        for behind in self.children():  # timm's norms hold the activation that follows them
            out = behind(out)
        return out

    def _normalised(self, x: Tensor) -> Tensor:
        dims = [d for d in range(x.ndim) if d != 1]
        shape = [1, -1] + [1] * (x.ndim - 2)
        values = x.float()
        count = torch.full((), x.numel() / x.shape[1], device=x.device)  # made there: nothing waits for a copy
        dist.all_reduce(count)
        mean = _sum_of_ranks(values.sum(dims)) / count
        centred = values - mean.view(shape)
        variance = _sum_of_ranks((centred**2).sum(dims)) / count
        self._track(mean.detach(), variance.detach() * (count / (count - 1)))
        out = centred * torch.rsqrt(variance + self.eps).view(shape)
        if self.affine:
            out = out * self.weight.view(shape) + self.bias.view(shape)
        return out.to(x.dtype)

    def _track(self, mean: Tensor, variance: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked += 1
        momentum = 1 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(variance, momentum)

    def _check_input_dim(self, input: Tensor) -> None:
        """Any number of dimensions will do."""


class _SumOfRanks(torch.autograd.Function):
    """Sum over ranks; the gradient of a sum that every rank uses is the sum of what they send back."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        value = value.contiguous().clone()
        dist.all_reduce(value)
        return value

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total)
        return total


def _sum_of_ranks(value: Tensor) -> Tensor:
    return _SumOfRanks.apply(value)


def share_batch_norm(model: nn.Module) -> None:
    """Make every batch norm of `model` use the statistics of all ranks; parameters and names stay.

    One that is frozen looks at no batch and stays as it is.
    """
    for name, module in list(model.named_modules()):
        parameters = list(module.parameters(recurse=False))
        frozen = bool(parameters) and not any(parameter.requires_grad for parameter in parameters)
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not frozen:
            shared = _SharedBatchNorm(
                module.num_features, module.eps, module.momentum, module.affine, module.track_running_stats
            )
            shared._parameters, shared._buffers = module._parameters, module._buffers
            shared._modules = module._modules
            shared.training = module.training
            model.set_submodule(name, shared)
