"""The end of a run: final weights, their evaluation and the report."""

import logging
import shlex
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from distill.objectives.collapse import WATCHED
from training.averaging import find_trained_norms, recompute_batch_norm
from training.baseline import add_baseline
from training.checkpoints import (
    FinalWeights,
    choose_final_weights,
    copy_weights,
    keep_best,
    keep_last,
    restore_best,
)
from training.evaluate import write_results
from training.report import draw_curves, write_report

if TYPE_CHECKING:
    from training.loop import Run

logger = logging.getLogger(__name__)

STATISTICS_BATCHES = 256  # at most, for the batch-norm statistics of the final weights


def finish_run(run: "Run") -> dict[str, Any]:
    """Choose the final weights, evaluate them and write the report; every rank calls this after the last step.

    Returns:
        `weights` (their path), `weights_are` (a sentence), `valid_mAP_*` of the candidates, `learns`, and the metrics
        on the evaluation data.
    """
    weights = _choose_weights(run)
    result: dict[str, Any] = {"weights": str(weights.path), "weights_are": weights.sentence}
    result |= {f"valid_mAP_{name}": score for name, score in weights.compared.items()}
    result["learns"] = run.learning.learns
    config, data = run.config, run.data
    metrics = run.evaluate(data.evaluation) if data.evaluation else None
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
            facts=describe_run(run, weights) | describe_last_epoch(run.journal.entries()),
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


def _choose_weights(run: "Run") -> FinalWeights:
    best, model, ranks, valid = run.best, run.model, run.ranks, run.data.valid
    if not best.saved:
        with run.averaged():
            last = copy_weights(model)
        return keep_last(best, model, last, ranks)
    best.prune()
    if not run.config.average:
        return restore_best(best, model, ranks)
    if best.select_by or valid is None:
        return keep_best(best, model, ranks)
    update = partial(update_batch_norm, run) if find_trained_norms(model) else None
    return choose_final_weights(best, model, ranks, lambda: run.evaluate(valid).mAP, update)


@torch.no_grad()
def update_batch_norm(run: "Run") -> None:
    """Recompute batch-norm statistics over the last training batches; every rank computes all of them."""
    first = run.step - min(run.epoch_steps, run.step, STATISTICS_BATCHES)
    batches = [run.batches.batch(step) for step in range(first, run.step)]
    with recompute_batch_norm(run.model), run.precision.context():
        for batch in run.loader(batches):
            run.model.forward_spectrogram(*run.trainer.loss_module.spectrogram(batch.to(run.device)))


def describe_run(run: "Run", weights: FinalWeights) -> dict[str, str]:
    """Return the facts of a finished run.

    Args:
        run: the run.
        weights: its final weights.
    """
    config, data = run.config, run.data
    return {
        "model": f"{config.model}, {sum(p.numel() for p in run.model.parameters()) / 1e6:.2f} M parameters",
        "weights": f"{weights.path.name}: {weights.sentence}",
        "training data": f"{config.train_data}: {len(data.items)} chunks of {len(data.pack)} clips",
        "targets": describe_targets(run),
        "steps": f"{run.step} of {run.total_steps}, {config.batch_size} clips each",
        "training time": f"{run.seconds:.0f} s on {run.device}, {run.ranks.world_size} process(es)",
        "seed": str(run.seed),
        "command": shlex.join(sys.argv),
    }


def describe_last_epoch(entries: list[dict[str, Any]]) -> dict[str, str]:
    """Return the losses of the last epoch as a fact; empty without a complete epoch."""
    last = next((entry for entry in reversed(entries) if entry["kind"] == "epoch"), None)
    if last is None:
        return {}
    values = [f"{name} {value:.4g}" for name, value in last.items() if name.startswith("loss") or name in WATCHED]
    return {"last epoch": ", ".join(values)}


def describe_targets(run: "Run") -> str:
    """Return the targets of a run as text: labels, a store, or a teacher."""
    config = run.config
    targets = f"soft targets of {config.logitspath}" if config.logitspath else None
    if config.embeddingspath:
        targets = f"embeddings of {' and '.join(config.stores)}"
    if run.teacher is not None:
        kind = {"classes": "probabilities", "embeddings": "embeddings", "none": "layers"}[run.needs.targets]
        targets = f"{kind} of {run.teacher.name}, computed while training"
    from_labels = run.data.item_labels is not None or (targets is None and run.needs.targets == "classes")
    return " and ".join(filter(None, ("labels" if from_labels else None, targets))) or "only the sounds"
