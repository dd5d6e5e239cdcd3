"""Facts about a run for its report: model, data, targets, duration."""

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from training.checkpoints import FinalWeights
    from training.loop import Run


def describe_run(run: "Run", weights: "FinalWeights") -> dict[str, str]:
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
        "command": " ".join(sys.argv),
    }


def describe_targets(run: "Run") -> str:
    """Return the targets of a run as text: labels, a store, or a teacher."""
    config = run.config
    targets = f"soft targets of {config.logitspath}" if config.logitspath else None
    if config.embeddingspath:
        targets = f"embeddings of {config.embeddingspath}"
    if run.teacher is not None:
        kind = {"classes": "probabilities", "embeddings": "embeddings", "none": "layers"}[run.needs.targets]
        targets = f"{kind} of {run.teacher.name}, computed while training"
    from_labels = run.data.item_labels is not None or (targets is None and run.needs.targets == "classes")
    return " and ".join(filter(None, ("labels" if from_labels else None, targets))) or "only the sounds"
