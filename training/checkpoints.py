"""The best checkpoints of a run, and its final weights: their average, the best one or the last ones."""

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
from models.parametrizations import fit_plain_weights
from models.tensor_files import read_tensors
from training.averaging import average_states
from training.parallel import Ranks

logger = logging.getLogger(__name__)

AVERAGED, BEST, LAST = "averaged.pt", "best.pt", "last.pt"  # a finished run has one of them


@dataclass
class BestCheckpoints:
    """Keeps the best checkpoints on disk: those with the highest mAP, or by another metric (`select_by`).

    Args:
        folder: where they are written.
        n: number of checkpoints to keep.
        select_by: name of a logged value, of which the smallest is best, or the largest with a `-` before the name;
            None for the mAP on validation data.
        writes: whether this process writes the files; the others only keep the list.
        saved: score (higher is better) and file name of each, the best one first.
        in_last_state: names of the files that the last state refers to.
    """

    folder: Path
    n: int
    select_by: str | None = None
    writes: bool = True
    saved: list[tuple[float, str]] = field(default_factory=list)
    in_last_state: set[str] = field(default_factory=set)

    @property
    def metric(self) -> str:
        """The metric that checkpoints are chosen by."""
        return (self.select_by or "mAP").removeprefix("-")

    @property
    def maximize(self) -> bool:
        """Whether a higher value of the metric is better."""
        return self.select_by is None or self.select_by.startswith("-")

    @property
    def best_value(self) -> float:
        """The metric of the best checkpoint."""
        return self.saved[0][0] if self.maximize else -self.saved[0][0]

    def check_logged(self, values: Mapping[str, Any]) -> None:
        """Check that the metric is among the logged values.

        Raises:
            UserError: it is not.
        """
        if self.select_by and self.metric not in values:
            raise UserError(f"select_by is {self.select_by!r}, but this run logs {some(values)}; give one of these")

    def update(self, model: AudioTagger, entry: Mapping[str, Any], epoch: int) -> bool:
        """Save the model if it is among the best n; return whether it is the best so far.

        Args:
            model: with its weights after the epoch.
            entry: the logged values of the epoch: `valid_mAP`, or the value that `select_by` names.
            epoch: from 1.
        """
        metric = float(entry["valid_mAP"] if self.select_by is None else entry[self.metric])
        score = metric if self.maximize else -metric
        is_best = not self.saved or score > self.saved[0][0]
        if len(self.saved) < self.n or score > self.saved[-1][0]:
            # The name of a file has `select_by` with its sign, and the value of which the smallest is best:
            # `models.load_model` chooses among the files of a folder by that.
            key, value = ("mAP", metric) if self.select_by is None else (self.select_by, -score)
            name = f"best_epoch={epoch:04d}_{key}={value:{'.4f' if self.select_by is None else '.6g'}}.pt"
            if self.writes:
                save_checkpoint(self.folder / name, model, {"epoch": epoch, key: value})
            self.saved = sorted([*self.saved, (score, name)], key=lambda saved: -saved[0])[: self.n]
        return is_best

    def prune(self) -> None:
        """Remove checkpoints that are no longer among the best, except those that the previous state refers to."""
        names = {name for _, name in self.saved}
        if self.writes:
            for path in self.folder.glob("best_epoch=*.pt"):
                if path.name not in names | self.in_last_state:
                    path.unlink()
        self.in_last_state = names

    def states(self) -> list[dict[str, Tensor]]:
        """Read the saved weights, those with the highest score first."""
        return [_read_weights(self.folder / name) for _, name in self.saved]


@dataclass(frozen=True)
class FinalWeights:
    """The final weights of a run.

    Attributes:
        path: their file.
        sentence: what they are, and why they were chosen.
        compared: mAP on the validation data of each candidate, by name; empty if nothing was compared.
    """

    path: Path
    sentence: str
    compared: dict[str, float] = field(default_factory=dict)


def choose_final_weights(
    best: BestCheckpoints,
    model: AudioTagger,
    ranks: Ranks,
    validate: Callable[[], float],
    update_batch_norm: Callable[[], None] | None = None,
) -> FinalWeights:
    """Load into `model`, and write, the average of the saved checkpoints or the best one, whichever validates better.

    An average of weights that are far apart is often worse than the best of them. `averaged.pt` is written if the
    average wins, or ties: it depends less on the noise of a single validation. `best.pt` if the best checkpoint wins.
    Running statistics of batch norm do not average well and, in short runs, lag behind the weights; with
    `update_batch_norm`, the average gets new ones, and the best checkpoint with new ones is a candidate beside the
    unchanged one. A single checkpoint, or several with the same weights, is kept as `averaged.pt` without another
    validation.

    Args:
        best: the saved checkpoints, one or more, chosen by mAP.
        model: gets the weights, on every rank.
        ranks: the processes of the run; all call this, rank 0 decides and writes.
        validate: returns the mAP of `model` on the validation data.
        update_batch_norm: gives `model` the statistics of training batches; None if that is not needed.
    """
    saved = best.states() if ranks.is_main else None
    n = len(best.saved)
    are_equal = ranks.broadcast(all(_equal(saved[0], state) for state in saved[1:]) if saved else None)
    _load(model, average_states(saved) if saved else None, ranks)
    if are_equal:
        sentence = "the only checkpoint saved" if n == 1 else f"the weights that all {n} checkpoints have"
        return _write(best, AVERAGED, model, ranks, sentence)
    top_score, top_name = best.saved[0]
    if update_batch_norm:
        update_batch_norm()
    names = {"average": f"the average of {n} checkpoints", "best": f"the best checkpoint ({_epoch(top_name)})"}
    compared = {"average": validate(), "best": top_score}
    states = {"average": copy_weights(model), "best": saved[0] if saved else None}
    if update_batch_norm:
        _load(model, states["best"], ranks)
        update_batch_norm()
        names["best_recomputed"] = f"{names['best']} with recomputed batch-norm statistics"
        compared["best_recomputed"], states["best_recomputed"] = validate(), copy_weights(model)
    winner = ranks.broadcast(max(compared, key=lambda name: compared[name]))  # the first of equals: the average
    _load(model, states[winner], ranks)
    others = ", ".join(f"{compared[name]:.4f} for {names[name]}" for name in compared if name != winner)
    sentence = f"{names[winner]}, mAP {compared[winner]:.4f} on the validation data, against {others}"
    return _write(best, AVERAGED if winner == "average" else BEST, model, ranks, sentence, compared)


def keep_best(best: BestCheckpoints, model: AudioTagger, ranks: Ranks) -> FinalWeights:
    """Load into `model`, and write as `best.pt`, the best checkpoint by `select_by`."""
    path = _load_best(best, model, ranks)
    sentence = f"the best checkpoint ({_epoch(path.name)}), {best.metric} {best.best_value:.6g} on the training clips"
    return _write(best, BEST, model, ranks, sentence)


def keep_last(best: BestCheckpoints, model: AudioTagger, weights: dict[str, Tensor], ranks: Ranks) -> FinalWeights:
    """Load into `model`, and write as `last.pt`, the weights after the last step: nothing selects a checkpoint."""
    _load(model, weights, ranks)
    return _write(best, LAST, model, ranks, "the last weights: without validation data or select_by, none are selected")


def restore_best(best: BestCheckpoints, model: AudioTagger, ranks: Ranks) -> FinalWeights:
    """Load the best checkpoint into `model`, on every rank; its file is not copied."""
    path = _load_best(best, model, ranks)
    return FinalWeights(path, f"the best checkpoint ({_epoch(path.name)})")


def copy_weights(model: AudioTagger) -> dict[str, Tensor]:
    """Return a copy of the state dict on the CPU."""
    return {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}


def _write(
    best: BestCheckpoints,
    name: str,
    model: AudioTagger,
    ranks: Ranks,
    sentence: str,
    compared: dict[str, float] | None = None,
) -> FinalWeights:
    """Write the final weights, and remove those under another name, left by an attempt that was killed."""
    if ranks.is_main:
        save_checkpoint(best.folder / name, model, {"checkpoints": [file for _, file in best.saved], "kept": sentence})
        for other in {AVERAGED, BEST, LAST} - {name}:
            (best.folder / other).unlink(missing_ok=True)
        logger.info("final weights: %s, %s", name, sentence)
    return FinalWeights(best.folder / name, sentence, compared or {})


def _load_best(best: BestCheckpoints, model: AudioTagger, ranks: Ranks) -> Path:
    path = best.folder / best.saved[0][1]
    _load(model, _read_weights(path) if ranks.is_main else None, ranks)
    return path


def _load(model: AudioTagger, state: dict[str, Tensor] | None, ranks: Ranks) -> None:
    """Load rank 0's state on every rank: they may have different disks."""
    model.load_state_dict(fit_plain_weights(model, ranks.broadcast(state)))


def _equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items() if value.is_floating_point())


def _epoch(name: str) -> str:
    match = re.search(r"epoch=0*(\d+)", name)
    return f"epoch {match[1]}" if match else name


def _read_weights(path: Path) -> dict[str, Any]:
    return read_tensors(path)["model"]
