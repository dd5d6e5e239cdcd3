"""Training in several processes: started by torchrun, gradients are averaged by DistributedDataParallel.

All ranks take the same decisions (output folder, resume, stop); only rank 0 writes files.
"""

import os
import re
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

from common.errors import UserError
from training.heartbeat import Heartbeat

RANK_TIMEOUT = 120.0  # seconds until the configuration is read
_TRANSFER = re.compile("gloo|nccl|ProcessGroup|TCPStore|Connection", re.IGNORECASE)  # in errors of transfers


@dataclass(frozen=True)
class Ranks:
    """The rank of this process, and collective operations.

    Attributes:
        rank: rank of this process.
        world_size: number of processes.
        heartbeat: finds ranks that are missing; None for a single process.
    """

    rank: int = 0
    world_size: int = 1
    heartbeat: Heartbeat | None = None

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes files."""
        return self.rank == 0

    def sum(self, value: Tensor) -> Tensor:
        """Return the sum of `value` over all ranks, on every rank."""
        if self.world_size > 1:
            value = value.clone()
            dist.all_reduce(value)
        return value

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's `value` on every rank; tensors in it must be on the CPU."""
        values = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(values, src=0)
        return values[0]

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all ranks, in their order, on every rank."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Wait until all ranks are here, and no transfer is under way."""
        if self.world_size > 1:
            dist.barrier()


@contextmanager
def process_group() -> Iterator[Ranks]:
    """Initialise the process group of torchrun, if there is one; yield the ranks."""
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if world_size == 1:
        yield Ranks()
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    # torchrun's static rendezvous, the default on one node, uses one store for all restarts: without a prefix, a
    # restarted rank could read addresses of the previous attempt. (On several nodes the c10d rendezvous creates a store
    # for each attempt, and nodes may count attempts differently.)
    store, rank, _ = next(rendezvous("env://"))
    if os.environ.get("GROUP_WORLD_SIZE", "1") == "1":
        store = dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    # Both backends: the device of a tensor selects one.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    heartbeat = Heartbeat(store, rank, world_size, RANK_TIMEOUT)
    heartbeat.start()
    has_failed = True
    try:
        yield Ranks(rank, world_size, heartbeat)
        # DistributedDataParallel never stops the threads of the group. A thread that still has tensors of the last
        # collective when Python exits aborts the process (SIGABRT): wait until all ranks are here and threads are idle.
        dist.barrier()
        has_failed = False
    except RuntimeError as error:
        if not _TRANSFER.search(str(error)):
            raise
        raise UserError(f"{heartbeat.explain()}; {heartbeat.hint}") from error
    finally:
        heartbeat.stop(failed=has_failed)
        dist.destroy_process_group()


@lru_cache(maxsize=64)
def split_mirrored(n: int, parts: int) -> tuple[np.ndarray, ...]:
    """Split the positions 0 … n - 1 of a batch into shares that have every position together with its mirror.

    Positions i and n - 1 - i are in the same share, mirrored, so that a reversed share is that share of the reversed
    batch: mixup with the mirror gives the same mixtures in parts as in the whole batch. A batch with fewer pairs than
    parts is not split: every part is the whole batch, with a smaller weight.

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
    """Batch norm with statistics over all ranks, on any device; PyTorch's SyncBatchNorm supports only GPUs."""

    def forward(self, x: Tensor) -> Tensor:
        out = self._normalize(x) if self.training else super().forward(x)
        for activation in self.children():  # timm's norms include the activation after them
            out = activation(out)
        return out

    def _normalize(self, x: Tensor) -> Tensor:
        dims = [d for d in range(x.ndim) if d != 1]
        shape = [1, -1] + [1] * (x.ndim - 2)
        values = x.float()
        count = torch.full((), x.numel() / x.shape[1], device=x.device)  # created on the device, which avoids a copy
        dist.all_reduce(count)
        mean = _sum_of_ranks(values.sum(dims)) / count
        centred = values - mean.view(shape)
        variance = _sum_of_ranks((centred**2).sum(dims)) / count
        self._update_running_stats(mean.detach(), variance.detach() * (count / (count - 1)))
        out = centred * torch.rsqrt(variance + self.eps).view(shape)
        if self.affine:
            out = out * self.weight.view(shape) + self.bias.view(shape)
        return out.to(x.dtype)

    def _update_running_stats(self, mean: Tensor, variance: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked += 1
        momentum = 1 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(variance, momentum)

    def _check_input_dim(self, input: Tensor) -> None:
        """Accept any number of dimensions."""


class _SumOfRanks(torch.autograd.Function):
    """Sum over ranks; since every rank uses the sum, its gradient is the sum of the gradients of all ranks."""

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
    """Replace every batch norm of `model`, except frozen ones, by one with statistics over all ranks.

    Parameters, buffers and names do not change.
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
