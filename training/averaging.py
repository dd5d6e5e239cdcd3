"""Averages of weights: over the steps of a run, over its best checkpoints, and the batch-norm statistics they need."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class MovingAverage:
    """Exponential moving average of a model's weights and statistics (Polyak averaging).

    The decay is min(decay, (1 + n) / (10 + n)) after n steps, so that the start is soon forgotten.

    Args:
        model: whose state is averaged.
        decay: what is kept at each step.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay, self.n = model, decay, 0
        self.average = {name: value.detach().clone() for name, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the model as it is after a step."""
        decay = min(self.decay, (1 + self.n) / (10 + self.n))
        self.n += 1
        state = self.model.state_dict()
        floats = [name for name, value in state.items() if value.is_floating_point()]
        torch._foreach_lerp_([self.average[n] for n in floats], [state[n] for n in floats], 1 - decay)
        for name in state.keys() - set(floats):
            self.average[name].copy_(state[name])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Let the model hold the average inside the block."""
        own = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        self.model.load_state_dict(self.average)
        try:
            yield
        finally:
            self.model.load_state_dict(own)

    def state_dict(self) -> dict[str, object]:
        """Return what `load_state_dict` takes."""
        return {"n": self.n, "average": self.average}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Go on from what `state_dict` returned."""
        self.n = int(state["n"])  # type: ignore[call-overload]
        given = state["average"]
        assert isinstance(given, dict)
        for name, value in given.items():
            self.average[name].copy_(value)


def average_states(states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the element-wise mean of state dicts; integer tensors are those of the first."""
    mean = dict(states[0])
    for key, value in states[0].items():
        if value.is_floating_point():
            mean[key] = torch.stack([state[key].double() for state in states]).mean(dim=0).to(value.dtype)
    return mean


def norms_behind_weights(model: nn.Module) -> list[_BatchNorm]:
    """Return the batch norms whose statistics change with the weights and that are trained.

    A single one normalises the input of a transformer: the sounds alone decide its statistics, which average well.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    trained = [
        norm for norm in norms if not list(norm.parameters()) or any(p.requires_grad for p in norm.parameters(False))
    ]
    return trained if len(trained) > 1 else []


@contextmanager
def recomputed_batch_norm(model: nn.Module) -> Iterator[None]:
    """Give a model new batch-norm statistics: the mean of those of the batches that it computes inside the block.

    As stochastic weight averaging does (Izmailov et al., UAI 2018; `torch.optim.swa_utils.update_bn`), but nothing else
    than `norms_behind_weights` leaves evaluation mode, so that no dropout disturbs them, and frozen norms stay.
    """
    norms = norms_behind_weights(model)
    momenta = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average over all batches
        norm.train()
    try:
        yield
    finally:
        model.eval()
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
