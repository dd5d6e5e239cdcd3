"""The end of a run: the weights it keeps, their results, the report, and whether anything was learnt."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from training.averaging import norms_behind_weights, recomputed_batch_norm
from training.baseline import add_baseline
from training.checkpoints import FinalWeights, choose_final_weights, restore_best
from training.evaluate import write_results
from training.report import draw_curves, write_report
from training.run_facts import describe_run

if TYPE_CHECKING:
    from training.loop import Run

logger = logging.getLogger(__name__)

STATISTICS_BATCHES = 256  # at most, for the batch norm of the final weights


def finish_run(run: "Run") -> dict[str, Any]:
    """Choose the final weights, evaluate them and write the report; every rank calls this after the last step.

    Returns:
        The path of the weights, what they are, the figures they were chosen by, whether anything was learnt, and the
        figures on the evaluation data.
    """
    with run.averaged():
        if not run.best.saved:
            run.best.update(run.model, {}, run.epoch)
        run.best.prune()
    weights = _final_weights(run)
    result: dict[str, Any] = {"weights": str(weights.path), "weights_are": weights.sentence}
    result |= {f"valid_mAP_{name}": score for name, score in weights.compared.items()}
    result["learns"] = run.learning.learns
    config, data = run.config, run.data
    metrics = run.evaluate("evaluation") if data.evaluation else None
    if run.journal is not None:
        baseline = None
        if metrics is not None and data.evaluation:
            write_results(run.folder, "results", metrics, data.evaluation)
            logger.info("%s on %s:\n%s", weights.path.name, config.eval_data, metrics.summary())
            baseline = add_baseline(data, metrics, run.folder) if config.baseline else None
        summary = run.learning.summary()
        draw_curves(run.folder, run.journal.entries())
        report = write_report(
            run.folder,
            title=f"{config.model} trained on {Path(config.train_data).name}",
            facts=describe_run(run, weights),
            config=config.model_dump(),
            entries=run.journal.entries(),
            results=metrics,
            results_name=str(config.eval_data),
            selection=data.selection,
            baseline=baseline,
            alert=summary,
        )
        logger.info("report: %s", report)
        if summary:
            logger.warning("%s", summary)
    return result | (metrics.as_dict() if metrics else {})


def _final_weights(run: "Run") -> FinalWeights:
    if not run.config.average:
        return restore_best(run.best, run.model, run.ranks)
    return choose_final_weights(
        run.best,
        run.model,
        run.ranks,
        (lambda: run.evaluate("valid").mAP) if run.data.valid else None,
        (lambda: recompute_batch_norm(run)) if norms_behind_weights(run.model) else None,
    )


@torch.no_grad()
def recompute_batch_norm(run: "Run") -> None:
    """Give the model the batch-norm statistics of the batches trained on last; every rank computes all of them."""
    first = run.step - min(run.epoch_steps, run.step, STATISTICS_BATCHES)
    batches = [run.batches.batch(step) for step in range(first, run.step)]
    with recomputed_batch_norm(run.model), run.precision.context():
        for batch in run.loader(batches):
            run.model.forward_spectrogram(*run.trainer.loss_module.spectrogram(batch.to(run.device)))
