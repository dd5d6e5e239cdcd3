"""Whether a run learns anything: its loss beside that of constant answers, its validation beside chance."""

import logging
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from training.chance import Chance
from training.metrics import Metrics
from training.parallel import Ranks
from training.tally import TargetTally

logger = logging.getLogger(__name__)

FIRST_SHARE = 0.2  # of the run, after which it is judged
MIN_FALL = 0.02  # of the constant loss, by which the loss must have fallen
CLEARLY = 1.5  # times the mAP that chance may reach: a model with that has learnt, whatever mixup makes of its loss
MIN_WINDOWS = 4  # readings of the loss in an epoch that give it a standard error


@dataclass
class LearningCheck:
    """Says when a run learns nothing, from a fifth of it on: once, and once more when it does after all.

    It learns nothing while the mean loss of an epoch is less than 2 %, or less than two standard errors, below the loss
    that the best constant answer has on the very targets of this epoch, and the last validation is not far above chance
    (mixtures of soft labels leave a loss little room); or while the figures of a validation are within
    what chance gives. Neither is judged where it is not known. Nothing here changes what is learnt.

    Args:
        targets: of the epoch under way.
        total_steps: of the run.
        total_epochs: likewise.
        causes: returns the likely causes, as sentences; called where there is something to say, given whether the
            loss, too, has not fallen.
        ranks: the processes that train together; all judge alike, rank 0 logs.
        enabled: false for runs too short to learn anything.
    """

    targets: TargetTally
    total_steps: int
    total_epochs: int
    causes: Callable[[bool], list[str]]
    ranks: Ranks
    enabled: bool = True
    losses: list[float] = field(default_factory=list)  # means of a few steps each, of the epoch under way
    constant: bool | None = None  # whether the loss is still that of constant answers; None: not known yet
    by_chance: bool | None = None  # whether the last validation's figures are within chance
    clear: bool = False  # whether they are far above it
    alarmed: bool = False  # whether the last logged change was that nothing is learnt
    figures: str = ""  # of the last judgement

    @property
    def learns(self) -> bool | None:
        """Whether something is learnt; None where nothing was judged yet."""
        known = [stuck for stuck in (self.constant, self.by_chance) if stuck is not None]
        return not any(known) if known else None

    @property
    def postfix(self) -> dict[str, str]:
        """What the progress bar shows beside the loss."""
        return {"learnt": "NOTHING"} if self.alarmed else {}

    def add_loss(self, loss: float) -> None:
        """Take in the mean loss of a few steps."""
        self.losses.append(loss)

    def end_epoch(
        self, entry: Mapping[str, Any], metrics: Metrics | None, chance: Chance | None, *, last: bool = False
    ) -> dict[str, Any]:
        """Judge the epoch that has ended, and begin the next one; all ranks call this.

        Args:
            entry: `step`, `epoch` and `loss`, the mean of the epoch.
            metrics: of a validation after it, if there was one.
            chance: what chance gives there.
            last: whether the run ends here.

        Returns:
            What the journal is to say beside the entry: `constant_loss`, `valid_top1`, the bounds of chance and,
            where it was judged, `learns`.
        """
        constant_loss = self.targets.constant_loss(self.ranks)
        more: dict[str, Any] = {} if constant_loss is None else {"constant_loss": constant_loss}
        if metrics is not None and chance is not None:
            more |= {"valid_chance_mAP": chance.mAP}
            if metrics.top1 is not None and chance.top1 is not None:
                more |= {"valid_top1": metrics.top1, "valid_chance_top1": chance.top1}
        losses, self.losses = self.losses, []
        self.targets.reset()
        if not self.enabled or (entry["step"] < FIRST_SHARE * self.total_steps and not last):
            return more
        figures = []
        if metrics is not None and chance is not None:
            self.clear = metrics.mAP >= CLEARLY * chance.mAP
        if constant_loss is not None:
            margin = 0.0 if self.constant is False else _margin(constant_loss, losses)  # no back and forth at the edge
            self.constant = entry["loss"] > constant_loss - margin and not self.clear
            figures.append(f"loss {entry['loss']:.4g}, that of constant answers {constant_loss:.4g}")
        if metrics is not None and chance is not None:
            self.by_chance = chance.holds(metrics.mAP, metrics.top1)
            figures.append(f"validation mAP {metrics.mAP:.4f}, by chance up to {chance.mAP:.4f}")
            if "valid_top1" in more:
                figures.append(f"accuracy {metrics.top1:.1%}, by chance up to {chance.top1:.1%}")
        self.figures = "; ".join(figures) or self.figures
        self._log_change(entry["epoch"])
        return more if self.learns is None else more | {"learns": self.learns}

    def _log_change(self, epoch: int) -> None:
        if self.learns is None or self.learns is not self.alarmed:
            return
        self.alarmed = not self.learns
        if not self.ranks.is_main:
            return
        if self.learns:
            logger.info("something is learnt from epoch %d on: %s", epoch, self.figures)
        else:
            logger.warning("NOTHING IS LEARNT after epoch %d of %d: %s", epoch, self.total_epochs, self.explanation())

    def explanation(self) -> str:
        """Say what is wrong and what the likely causes are, a line each."""
        if self.constant:
            found = "the loss is not clearly below that of answers which are the same for every clip"
        else:
            found = "the loss falls, but on the validation data the figures are those of chance"
        causes = "".join(f"\n  - {cause}" for cause in self.causes(bool(self.constant)))
        return f"{found} ({self.figures}). Likely causes in this run:{causes}"

    def summary(self) -> str | None:
        """Return what the end of the log and the top of the report say; None where something was learnt."""
        return f"NOTHING WAS LEARNT: {self.explanation()}" if self.alarmed else None

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` takes, of this rank and all."""
        names = ("losses", "constant", "by_chance", "clear", "alarmed", "figures")
        return {name: getattr(self, name) for name in names} | {"targets": self.targets.over_ranks(self.ranks)}

    def load_state_dict(self, state: Mapping[str, Any] | None, device: Any) -> None:
        """Go on from what `state_dict` returned; None, of a state that an earlier version wrote, begins anew."""
        if state is None:
            return
        state = dict(state)
        self.targets.restore(state.pop("targets"), self.ranks, device)
        for name, value in state.items():
            setattr(self, name, value)
        self.losses = list(self.losses)


def _margin(constant_loss: float, losses: list[float]) -> float:
    """Return by how much the mean loss of an epoch must be below the constant one."""
    error = statistics.stdev(losses) / len(losses) ** 0.5 if len(losses) >= MIN_WINDOWS else 0.0
    return max(MIN_FALL * constant_loss, 2 * error)
