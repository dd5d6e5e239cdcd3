"""Whether a configuration brings what its objective needs, and nothing that the objective has no use for."""

from common.errors import Faults, UserError, some
from distill.objectives import Needs, ObjectivePlan, list_objectives, plan_objective
from models import Ensemble
from training.config import TrainConfig
from training.teacher import load_teacher

_LEARNT = {"classes": "probabilities", "embeddings": "embeddings", "none": "without targets"}


def plan_run(config: TrainConfig, faults: Faults) -> ObjectivePlan | None:
    """Choose the objective of a configuration; note in `faults` where the configuration does not go with it."""
    with faults.noted():
        offered = {name: getattr(config, name) for name in ("loss", "loss_args", "label_smoothing")}
        plan = plan_objective(config.objective, offered, **config.objective_args)
        _check_targets(config, plan.needs, faults)
        _check_the_rest(config, plan, faults)
        return plan
    return None


def _check_targets(config: TrainConfig, needs: Needs, faults: Faults) -> None:
    """Compare where targets come from with those that are needed."""
    name, learnt = config.objective, _LEARNT[needs.targets]
    if config.embeddingspath and needs.targets != "embeddings":
        others = list_objectives("embeddings")
        faults.add(
            f"embeddingspath is given, but objective {name} learns {learnt}; set objective: {others[0]} (or "
            f"{', '.join(others[1:])})"
        )
    stored = {"classes": config.logitspath, "embeddings": config.embeddingspath, "none": None}[needs.targets]
    unused = [key for key in ("logitspath", "teacher") if getattr(config, key)]
    if needs.teacher == "no" and unused:
        faults.add(f"{' and '.join(unused)} are given, but objective {name} learns {learnt}, from no teacher; drop it")
    elif needs.teacher == "online" and not config.teacher:
        faults.add(f"objective {name} learns from what a teacher computes; give teacher, a model's name or checkpoint")
    elif needs.teacher == "required" and not (stored or config.teacher):
        if needs.targets == "embeddings":
            faults.add(
                f"objective {name} learns a teacher's embeddings; give embeddingspath (stored ones, see save_logits.py "
                "with targets: embeddings) or teacher (a model that computes them while the student learns)"
                + ("; logitspath holds probabilities: drop it" if config.logitspath else "")
            )
        else:
            beside = " beside the labels" if needs.labels else ""
            faults.add(
                f"objective {name} learns from a teacher{beside}; give teacher (a model) or logitspath (its stored "
                "soft targets), or drop objective"
            )
    if needs.targets == "embeddings" and config.mixup is not None and config.embeddingspath:
        faults.add(
            "mixup wants the embeddings of mixtures, which are not stored; drop mixup, or give a teacher in place of "
            "embeddingspath"
        )


def _check_the_rest(config: TrainConfig, plan: ObjectivePlan, faults: Faults) -> None:
    """Compare validation, clusters and mixup with what is needed."""
    name, needs = plan.name, plan.needs
    judges = [key for key in ("valid_data", "valid_fraction", "eval_data") if getattr(config, key)]
    if needs.output is None and judges:
        share = ", or give the labels a share: --objective_args.lambda 0.1" if hasattr(plan.settings, "lambda_") else ""
        faults.add(
            f"{' and '.join(judges)} would judge a model's classes, but objective {name} learns none without labels; "
            f"drop that and judge the embeddings by `python run.py probe`{share}"
        )
    if needs.clusters and not config.clusters:
        faults.add(f"objective {name} needs clusters, a file that scripts/cluster_embeddings.py wrote; add it")
    if config.clusters and config.sampler != "clusters" and not needs.clusters:
        users = [each for each in list_objectives() if plan_objective(each).needs.clusters]
        faults.add(
            f"clusters are given and nothing uses them; set sampler: clusters, or objective: {some(users)}, or drop "
            "them"
        )
    if config.mixup is not None and not needs.mixup:
        why = "wants clips of one cluster each, which mixtures are not" if needs.clusters else "cannot use mixtures"
        faults.add(f"objective {name} {why}; drop mixup")


def load_online_teacher(config: TrainConfig, needs: Needs) -> Ensemble:
    """Load the teacher whose output is computed while the student learns.

    Raises:
        UserError: it cannot be loaded, or has not what the objective needs.
    """
    assert config.teacher
    try:
        teacher = load_teacher(config.teacher, config.teacher_weights, heads=config.teacher_head)
    except UserError as error:
        raise UserError(f"teacher: {error}") from None
    if needs.targets != "classes" and config.teacher_head:
        raise UserError(
            f"teacher_head is for probabilities, but objective {config.objective} learns what the teacher computes "
            "below, which is the same with any head; drop it"
        )
    if needs.targets == "embeddings" or needs.teacher_layers:
        teacher.single  # noqa: B018 - raises for several models
    if needs.targets != "classes":
        return teacher
    teacher.check_classes()
    if needs.activation and teacher.activations != {needs.activation}:
        raise UserError(
            f"teacher {config.teacher} answers by {' and '.join(sorted(teacher.activations))}, but loss {config.loss} "
            f"is for {needs.activation}; set loss: "
            + ("CrossEntropyLoss" if needs.activation == "sigmoid" else "BCEWithLogitsLoss")
            + ", or give a teacher that was trained with this loss"
        )
    return teacher
