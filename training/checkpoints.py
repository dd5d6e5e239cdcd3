"""The best checkpoints of a run, their average, and which of these a run ends with."""

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.errors import UserError, some
from models import AudioTagger, save_checkpoint
from training.averaging import average_states
from training.parallel import Ranks

logger = logging.getLogger(__name__)

AVERAGED, BEST = "averaged.pt", "best.pt"  # of which a finished run has one


@dataclass
class BestCheckpoints:
    """Keeps the best checkpoints on disk: those with the highest mAP, or as `select_by` says.

    Args:
        folder: where they are written.
        n: how many.
        select_by: a logged value, of which the smallest is best, or the largest with a `-` before its name; None for
            the mAP on validation data.
        writes: whether this process does; the others keep count only.
    """

    folder: Path
    n: int
    select_by: str | None = None
    writes: bool = True
    saved: list[tuple[float, str]] = field(default_factory=list)  # highest score first, and the name of the file
    needed: set[str] = field(default_factory=set)  # by the states that a run may go on from

    @property
    def by(self) -> str:
        """What chooses, as it stands in the files' names."""
        return self.select_by or "mAP"

    def check_logged(self, values: Mapping[str, Any]) -> None:
        """See that what chooses is among the logged values.

        Raises:
            UserError: it is not.
        """
        name = self.by.removeprefix("-")
        if self.select_by and name not in values:
            raise UserError(f"select_by is {self.select_by!r}, but this run logs {some(values)}; give one of these")

    def update(self, model: AudioTagger, entry: Mapping[str, Any], epoch: int) -> bool:
        """Save the model if it is among the best n; return whether it is the best so far.

        Args:
            model: as it is after the epoch.
            entry: the figures of the epoch; `valid_mAP`, or what `select_by` names.
            epoch: from 1.
        """
        if self.select_by is None:
            value = score = float(entry.get("valid_mAP", 0.0))
        else:
            value = entry[self.by.removeprefix("-")] * (-1 if self.by.startswith("-") else 1)
            score = -value
        best = not self.saved or score > self.saved[0][0]
        if len(self.saved) < self.n or score > self.saved[-1][0]:
            shown = f"{value:.4f}" if self.select_by is None else f"{value:.6g}"
            name = f"best_epoch={epoch:04d}_{self.by}={shown}.pt"
            if self.writes:
                save_checkpoint(self.folder / name, model, {"epoch": epoch, self.by: value})
            self.saved = sorted([*self.saved, (score, name)], key=lambda saved: -saved[0])[: self.n]
        return best

    def prune(self) -> None:
        """Remove what is no longer among the best, save what the state before this one still speaks of."""
        names = {name for _, name in self.saved}
        if self.writes:
            for path in self.folder.glob("best_epoch=*.pt"):
                if path.name not in names | self.needed:
                    path.unlink()
        self.needed = names

    def states(self) -> list[dict[str, Tensor]]:
        """Read the saved weights, those with the highest score first."""
        return [_weights(self.folder / name) for _, name in self.saved]

    def write(self, name: str, model: AudioTagger, facts: dict[str, Any]) -> Path:
        """Write `model` to the file that the run ends with, `name`, and remove the other one; return its path."""
        save_checkpoint(self.folder / name, model, facts)
        for other in {AVERAGED, BEST} - {name}:
            (self.folder / other).unlink(missing_ok=True)  # of an attempt that was killed before it was finished
        return self.folder / name


@dataclass(frozen=True)
class FinalWeights:
    """The weights that a run ends with.

    Attributes:
        path: of their file.
        sentence: what they are, and why these.
        compared: mAP on the validation data of each candidate, by name; empty where nothing was compared.
    """

    path: Path
    sentence: str
    compared: dict[str, float] = field(default_factory=dict)


def choose_final_weights(
    best: BestCheckpoints,
    model: AudioTagger,
    ranks: Ranks,
    validate: Callable[[], float] | None,
    recompute_batch_norm: Callable[[], None] | None = None,
) -> FinalWeights:
    """Load into `model`, and write, the average of the saved checkpoints or the best one, whichever validates better.

    An average of weights that lie far apart is often worse than the best of them. `averaged.pt` is written where the
    average wins, or ties: it hangs less on the luck of a single validation. `best.pt` where the best checkpoint wins.
    Running statistics of batch norm do not average well and, in short runs, lag behind the weights; where
    `recompute_batch_norm` is given, the average gets new ones, and the best checkpoint with new ones is a candidate
    beside the best checkpoint as it is. A single checkpoint, or several with the same weights, is kept as
    `averaged.pt` without another validation, and so it is where there is no validation data.

    Args:
        best: the saved checkpoints, one or more.
        model: gets the weights, on every rank.
        ranks: the processes that train together; all call this, rank 0 decides and writes.
        validate: returns the mAP of `model` as it is on the validation data; None where there is none.
        recompute_batch_norm: gives `model` the statistics of training batches; None where its norms need no new ones.
    """
    saved = best.states() if ranks.is_main else None
    n = len(best.saved)
    average = average_states(saved) if saved else None
    alike = ranks.from_main(all(_equal(saved[0], state) for state in saved[1:]) if saved else None)
    _load(model, average, ranks)
    if best.select_by:
        _load(model, saved[0] if saved else None, ranks)
        name = best.saved[0][1]
        sentence = f"the best checkpoint ({_epoch(name)}), {best.by} {-best.saved[0][0]:.6g} on the training clips"
        return _written(best, BEST, model, ranks, sentence, {})
    if validate is None or alike:
        sentence = "the only checkpoint saved" if n == 1 else f"the weights that all {n} checkpoints have"
        if validate is None:
            sentence = "the last weights, since without validation data nothing chooses among checkpoints"
        return _written(best, AVERAGED, model, ranks, sentence, {})
    top_score, top_name = best.saved[0]
    if recompute_batch_norm:
        recompute_batch_norm()
    names = {"average": f"the average of {n} checkpoints", "best": f"the best checkpoint ({_epoch(top_name)})"}
    compared = {"average": validate(), "best": top_score}
    states = {"average": _copy(model), "best": saved[0] if saved else None}
    if recompute_batch_norm:
        _load(model, states["best"], ranks)
        recompute_batch_norm()
        names["best_recomputed"] = f"{names['best']} with recomputed batch-norm statistics"
        compared["best_recomputed"], states["best_recomputed"] = validate(), _copy(model)
    kept = ranks.from_main(max(compared, key=lambda name: compared[name]))  # the first of equals: the average
    _load(model, states[kept], ranks)
    others = ", ".join(f"{compared[name]:.4f} for {names[name]}" for name in compared if name != kept)
    sentence = f"{names[kept]}, mAP {compared[kept]:.4f} on the validation data, against {others}"
    return _written(best, AVERAGED if kept == "average" else BEST, model, ranks, sentence, compared)


def restore_best(best: BestCheckpoints, model: AudioTagger, ranks: Ranks) -> FinalWeights:
    """Load the best saved weights into `model`, on every rank; they stay where they are."""
    name = best.saved[0][1]
    _load(model, _weights(best.folder / name) if ranks.is_main else None, ranks)
    return FinalWeights(best.folder / name, f"the best checkpoint ({_epoch(name)})")


def _written(
    best: BestCheckpoints, name: str, model: AudioTagger, ranks: Ranks, sentence: str, compared: dict[str, float]
) -> FinalWeights:
    if ranks.is_main:
        best.write(name, model, {"checkpoints": [file for _, file in best.saved], "kept": sentence})
        logger.info("kept as %s: %s", name, sentence)
    return FinalWeights(best.folder / name, sentence, compared)


def _load(model: AudioTagger, state: dict[str, Tensor] | None, ranks: Ranks) -> None:
    """Load rank 0's state on every rank: their disks may be others."""
    model.load_state_dict(ranks.from_main(state))


def _copy(model: AudioTagger) -> dict[str, Tensor]:
    return {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}


def _equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items() if value.is_floating_point())


def _epoch(name: str) -> str:
    found = re.search(r"epoch=0*(\d+)", name)
    return f"epoch {found[1]}" if found else name


def _weights(path: Path) -> dict[str, Any]:
    return torch.load(path, map_location="cpu", weights_only=True)["model"]
