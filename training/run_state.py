"""The state of a run: everything that changes from step to step, for `training.states`; and how it starts from data."""

import logging
from functools import partial
from typing import TYPE_CHECKING, Any

from common.errors import UserError
from training.loss_module import add_teacher_output
from training.student import start_from_data

if TYPE_CHECKING:
    from training.loop import Run

logger = logging.getLogger(__name__)

START_BATCHES = 16  # for init_from_data


def initialise_from_data(run: "Run") -> None:
    """Initialise batch-norm statistics and the bias of the last layer from the first batches."""
    first = [run.batches.batch(i) for i in range(min(START_BATCHES, run.epoch_steps))]
    batches = (batch.to(run.device) for batch in run.loader(first))
    of_classes = run.needs.targets == "classes"
    if run.teacher is not None and of_classes:
        add = partial(add_teacher_output, run.teacher, run.needs)
        batches = (add(batch, run.data.source.replay.spectrogram) for batch in batches)
    start_from_data(run.model, batches, "target" if of_classes else "labels" if run.needs.labels else None)


def save_state(run: "Run") -> None:
    """Write the state that a run is resumed from if it is stopped later; all ranks call this, rank 0 writes."""
    # Never save weights that are not finite; a finite loss may have had a gradient that was not.
    run.finite_check.raise_if_not_finite(run.step)
    weights = [value for value in run.model.state_dict().values() if value.is_floating_point()]
    if not all(bool(value.isfinite().all()) for value in weights):
        raise UserError(
            f"the weights are not finite after step {run.step}; training stops here, and the last checkpoint is "
            "from an earlier step. Lower the learning rate or set grad_clip, which starts a new run"
        )
    tallies = [tally.state_dict(run.ranks) for tally in (run.window, run.epoch_tally)]
    learning = run.learning.state_dict()
    if run.journal is not None:
        state = {
            "step": run.step,
            "epoch_is_open": run.epoch_is_open,
            "trainer": run.trainer.state_dict(),
            "tallies": tallies,
            "best": [list(entry) for entry in run.best.saved],
            "stale": run.validations_without_improvement,
            "learning": learning,
            "seconds": run.seconds,
            "journal": run.journal.position(),
        }
        run.states.save(run.step, state)
    run.saved_step = run.step
    run.best.prune()


def load_state(run: "Run", state: dict[str, Any]) -> None:
    """Give a run the state that `save_state` wrote."""
    run.trainer.load_state_dict(state["trainer"])
    for tally, tally_state in zip((run.window, run.epoch_tally), state["tallies"], strict=True):
        tally.load_state_dict(tally_state, run.ranks, run.device)
    run.best.saved = [(score, name) for score, name in state["best"]]
    run.best.in_last_state = {path.name for path in run.folder.glob("best_epoch=*.pt")}
    run.learning.load_state_dict(state.get("learning"), run.device)
    run.step, run.validations_without_improvement = state["step"], state["stale"]
    run.seconds, run.saved_step = state["seconds"], state["step"]
    run.epoch_is_open = state.get("epoch_is_open", False)  # earlier versions saved only after validation
    logger.info("RESUMING after step %d of %d, in %s", run.step, run.total_steps, run.folder)
