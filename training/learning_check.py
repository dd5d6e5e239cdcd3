"""Detects runs that learn nothing: compares the loss with that of a constant output, validation with chance."""

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

FIRST_SHARE = 0.2  # of the run, before which nothing is checked
MIN_FALL = 0.02  # of the constant loss, by which the loss must be lower
CLEARLY = 1.5  # times the upper bound of chance: with that mAP the training works, even if mixup keeps the loss high
MIN_WINDOWS = 4  # readings of the loss in an epoch, for a standard error


@dataclass
class LearningCheck:
    """Logs a warning if a run learns nothing after a fifth of its steps, and a message if it learns later.

    A run learns nothing if the mean loss of an epoch is less than 2 %, or less than two standard errors, below the loss
    of the best constant output for the targets of this epoch, and the last validation is not far above chance (the loss
    of mixtures of soft labels cannot fall far); if the metrics of a validation are within chance; or if the objective
    reports that the embeddings have collapsed. Unknown values are not checked. The check has no effect on training.

    Args:
        targets: statistics of the targets of the current epoch.
        total_steps: number of steps of the run.
        total_epochs: number of epochs of the run.
        causes: returns the likely causes, as sentences, given whether the loss has not fallen either.
        ranks: the processes of the run; all get the same result, rank 0 logs.
        describe_collapse: see `Objective.describe_collapse`.
        enabled: false for runs that are too short to learn anything.
        losses: means over a few steps each, of the current epoch.
        constant: whether the loss is still that of a constant output; None if unknown.
        by_chance: whether the metrics of the last validation are within chance; None if unknown.
        clear: whether they are far above chance.
        collapse: what the objective reported of the last epoch, see `Objective.describe_collapse`.
        alarmed: whether the warning was logged, and no improvement after it.
        figures: the values of the last check, as text.
    """

    targets: TargetTally
    total_steps: int
    total_epochs: int
    causes: Callable[[bool], list[str]]
    ranks: Ranks
    describe_collapse: Callable[[Mapping[str, float]], str | None] = lambda means: None
    enabled: bool = True
    losses: list[float] = field(default_factory=list)
    constant: bool | None = None
    by_chance: bool | None = None
    clear: bool = False
    collapse: str | None = None
    alarmed: bool = False
    figures: str = ""

    @property
    def learns(self) -> bool | None:
        """Whether the run learns; None if that is unknown."""
        if self.collapse is not None:
            return False
        failures = [failure for failure in (self.constant, self.by_chance) if failure is not None]
        return not any(failures) if failures else None

    @property
    def postfix(self) -> dict[str, str]:
        """Values for the progress bar."""
        return {"learnt": "COLLAPSED" if self.collapse else "NOTHING"} if self.alarmed else {}

    def add_loss(self, loss: float) -> None:
        """Add the mean loss of a few steps."""
        self.losses.append(loss)

    def end_epoch(
        self, entry: Mapping[str, Any], metrics: Metrics | None, chance: Chance | None, *, last: bool = False
    ) -> dict[str, Any]:
        """Check the epoch that has ended, and reset the statistics for the next one; all ranks call this.

        Args:
            entry: `step`, `epoch` and `loss`, the mean over the epoch.
            metrics: metrics of a validation after it, if there was one.
            chance: the chance level of that validation.
            last: whether the run ends here.

        Returns:
            Further values for the journal: `constant_loss`, `valid_top1`, the bounds of chance and, if it is known,
            `learns`.
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
        self.collapse = self.describe_collapse(entry)
        if metrics is not None and chance is not None:
            self.clear = metrics.mAP >= CLEARLY * chance.mAP
        if constant_loss is not None:
            margin = 0.0 if self.constant is False else _margin(constant_loss, losses)  # hysteresis
            self.constant = entry["loss"] > constant_loss - margin and not self.clear
            figures.append(f"loss {entry['loss']:.4g}, of a constant output {constant_loss:.4g}")
        if metrics is not None and chance is not None:
            self.by_chance = chance.holds(metrics.mAP, metrics.top1)
            figures.append(f"validation mAP {metrics.mAP:.4f}, by chance up to {chance.mAP:.4f}")
            if "valid_top1" in more:
                figures.append(f"accuracy {metrics.top1:.1%}, by chance up to {chance.top1:.1%}")
        self.figures = "; ".join(figures) or self.figures
        self._log_change(entry["epoch"])
        return more if self.learns is None else more | {"learns": self.learns}

    def _log_change(self, epoch: int) -> None:
        has_failed = self.learns is False
        if has_failed is self.alarmed:
            return
        self.alarmed = has_failed
        if not self.ranks.is_main:
            return
        if not has_failed:
            logger.info("the run learns from epoch %d on: %s", epoch, self.figures or "no collapse")
        else:
            what = "COLLAPSED" if self.collapse else "NOTHING IS LEARNT"
            logger.warning("%s after epoch %d of %d: %s", what, epoch, self.total_epochs, self.explanation())

    def explanation(self) -> str:
        """Return what was found and the likely causes, a line each."""
        if self.collapse:
            return (
                f"{self.collapse}. The weights are of no use; start again with a lower learning rate, a longer warm-up "
                "or a larger batch_size"
            )
        if self.constant:
            found = "the loss is not clearly below that of a constant output"
        else:
            found = "the loss falls, but the validation metrics are those of chance"
        causes = "".join(f"\n  - {cause}" for cause in self.causes(bool(self.constant)))
        return f"{found} ({self.figures}). Likely causes in this run:{causes}"

    def summary(self) -> str | None:
        """Return the warning for the end of the log and the report; None if the training works."""
        if not self.alarmed:
            return None
        return f"{'THE RUN HAS COLLAPSED' if self.collapse else 'NOTHING WAS LEARNT'}: {self.explanation()}"

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the check, and the sums of targets over all ranks."""
        names = ("losses", "constant", "by_chance", "clear", "collapse", "alarmed", "figures")
        return {name: getattr(self, name) for name in names} | {"targets": self.targets.over_ranks(self.ranks)}

    def load_state_dict(self, state: Mapping[str, Any] | None, device: Any) -> None:
        """Restore what `state_dict` returned; None, in states of earlier versions, is ignored."""
        if state is None:
            return
        state = dict(state)
        self.targets.restore(state.pop("targets"), self.ranks, device)
        for name, value in state.items():
            setattr(self, name, value)
        self.losses = list(self.losses)


def _margin(constant_loss: float, losses: list[float]) -> float:
    """Return the required difference of the mean loss of an epoch to the constant loss."""
    error = statistics.stdev(losses) / len(losses) ** 0.5 if len(losses) >= MIN_WINDOWS else 0.0
    return max(MIN_FALL * constant_loss, 2 * error)
