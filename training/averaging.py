"""Averages of weights, over steps or checkpoints, and batch-norm statistics for them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class MovingAverage:
    """Exponential moving average of a model's weights and statistics (Polyak averaging).

    The decay is min(decay, (1 + n) / (10 + n)) after n steps, so that the initial weights lose influence quickly.

    Args:
        model: the model whose state is averaged.
        decay: weight of the previous average in each step.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay, self.n = model, decay, 0
        self.average = {name: value.detach().clone() for name, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self) -> None:
        """Update the average with the weights after a step."""
        decay = min(self.decay, (1 + self.n) / (10 + self.n))
        self.n += 1
        state = self.model.state_dict()
        floats = [name for name, value in state.items() if value.is_floating_point()]
        torch._foreach_lerp_([self.average[n] for n in floats], [state[n] for n in floats], 1 - decay)
        for name in state.keys() - set(floats):
            self.average[name].copy_(state[name])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Give the model the averaged weights inside the block."""
        original = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        self.model.load_state_dict(self.average)
        try:
            yield
        finally:
            self.model.load_state_dict(original)

    def state_dict(self) -> dict[str, object]:
        """Return the average and the number of steps."""
        return {"n": self.n, "average": self.average}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Restore what `state_dict` returned."""
        self.n = int(state["n"])  # type: ignore[call-overload]
        average = state["average"]
        assert isinstance(average, dict)
        for name, value in average.items():
            self.average[name].copy_(value)


def average_states(states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the element-wise mean of state dicts; integer tensors are those of the first."""
    mean = dict(states[0])
    for key, value in states[0].items():
        if value.is_floating_point():
            mean[key] = torch.stack([state[key].double() for state in states]).mean(dim=0).to(value.dtype)
    return mean


def find_trained_norms(model: nn.Module) -> list[_BatchNorm]:
    """Return the batch norms that are trained and whose statistics depend on weights.

    A single one normalises the input of a transformer: its statistics depend on the data alone and average well.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    trained = [
        norm for norm in norms if not list(norm.parameters()) or any(p.requires_grad for p in norm.parameters(False))
    ]
    return trained if len(trained) > 1 else []


@contextmanager
def recompute_batch_norm(model: nn.Module) -> Iterator[None]:
    """Recompute a model's batch-norm statistics as the mean over the batches that it computes inside the block.

    As in stochastic weight averaging (Izmailov et al., UAI 2018; `torch.optim.swa_utils.update_bn`), but all other
    modules stay in evaluation mode, so that dropout does not affect the statistics, and frozen norms do not change.
    """
    norms = find_trained_norms(model)
    model.eval()
    for norm in norms:
        norm.train()
    try:
        with cumulative_statistics(norms):
            yield
    finally:
        model.eval()


@contextmanager
def cumulative_statistics(norms: Sequence[_BatchNorm]) -> Iterator[None]:
    """Reset the running statistics of `norms`; inside the block they are plain means over all batches."""
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
