"""Checks that a configuration has what its objective needs, and no settings that the objective ignores."""

from collections.abc import Collection
from dataclasses import fields

from common.errors import Faults, UserError, some
from distill.objectives import Needs, ObjectivePlan, list_objectives, plan_objective
from models import Ensemble
from training.config import TrainConfig
from training.teacher import load_teacher

_TARGETS = {"classes": "probabilities", "embeddings": "embeddings", "none": "none"}


def plan_run(config: TrainConfig, faults: Faults, chosen: Collection[str] = ()) -> ObjectivePlan | None:
    """Choose the objective of a configuration, and check that the configuration fits it.

    Args:
        config: configuration of the run.
        faults: gets what does not fit.
        chosen: keys whose values were chosen automatically; the objective may ignore them.
    """
    with faults.noted():
        shared = {name: getattr(config, name) for name in ("loss", "loss_args", "label_smoothing")}
        plan = plan_objective(config.objective, shared, **config.objective_args)
        supported = {field.name for field in fields(plan.settings)}
        given = [key for key, value in shared.items() if value != TrainConfig.model_fields[key].default]
        if ignored := [key for key in given if key not in supported and key not in chosen]:
            faults.add(f"objective {config.objective} does not use {' and '.join(ignored)}; remove this key")
        _check_targets(config, plan.needs, faults)
        _check_data(config, plan, faults)
        return plan
    return None


def _check_targets(config: TrainConfig, needs: Needs, faults: Faults) -> None:
    """Check where the targets come from."""
    name, targets = config.objective, _TARGETS[needs.targets]
    if config.embeddingspath and needs.targets != "embeddings":
        others = list_objectives("embeddings")
        faults.add(
            f"embeddingspath is given, but the targets of objective {name} are {targets}; set objective: "
            f"{others[0]} (or {', '.join(others[1:])})"
        )
    stored = {"classes": config.logitspath, "embeddings": config.embeddingspath, "none": None}[needs.targets]
    unused = [key for key in ("logitspath", "teacher") if getattr(config, key)]
    if needs.teacher == "no" and unused:
        faults.add(f"the targets of objective {name} are {targets}, without a teacher; drop {' and '.join(unused)}")
    elif needs.teacher == "online" and not config.teacher:
        faults.add(f"objective {name} learns from what a teacher computes; give teacher, a model's name or checkpoint")
    elif needs.teacher == "required" and not (stored or config.teacher):
        if needs.targets == "embeddings":
            faults.add(
                f"objective {name} learns a teacher's embeddings; give embeddingspath (stored ones, see save_logits.py "
                "with targets: embeddings) or teacher (a model that computes them while the student learns), "
                "a list of several" + ("; logitspath holds probabilities: drop it" if config.logitspath else "")
            )
        else:
            beside = " beside the labels" if needs.labels else ""
            faults.add(
                f"objective {name} learns from a teacher{beside}; give teacher (a model) or logitspath (its stored "
                "soft targets), or drop objective"
            )
    if needs.targets == "embeddings" and config.mixup is not None and config.embeddingspath:
        faults.add(
            "mixup needs the embeddings of mixtures, which are not stored; drop mixup, or give a teacher instead of "
            "embeddingspath"
        )


def _check_data(config: TrainConfig, plan: ObjectivePlan, faults: Faults) -> None:
    """Check evaluation data, clusters and mixup."""
    name, needs = plan.name, plan.needs
    labelled = [key for key in ("valid_data", "valid_fraction", "eval_data") if getattr(config, key)]
    if needs.output is None and labelled:
        share = ", or give the labels a share: --objective_args.lambda 0.1" if hasattr(plan.settings, "lambda_") else ""
        faults.add(
            f"{' and '.join(labelled)} is for models with classes, but objective {name} learns none without labels; "
            f"drop it and evaluate the embeddings with `python run.py probe`{share}"
        )
    if needs.clusters and not config.clusters:
        faults.add(f"objective {name} needs clusters, a file that scripts/cluster_embeddings.py wrote; add it")
    if config.clusters and config.sampler != "clusters" and not needs.clusters:
        users = [each for each in list_objectives() if plan_objective(each).needs.clusters]
        faults.add(f"clusters are given but not used; set sampler: clusters, or objective: {some(users)}, or drop them")
    if config.mixup is not None and not needs.mixup:
        why = "needs clips of one cluster each, not mixtures" if needs.clusters else "does not support mixtures"
        faults.add(f"objective {name} {why}; drop mixup")


def load_online_teacher(config: TrainConfig, needs: Needs) -> Ensemble:
    """Load the online teacher.

    Raises:
        UserError: it cannot be loaded, or does not provide what the objective needs.
    """
    assert config.teacher
    try:
        averaged = needs.targets == "classes"
        heads = config.teacher_head
        teacher = load_teacher(config.teacher, config.teacher_weights, heads=heads, same_labels=averaged)
    except UserError as error:
        raise UserError(f"teacher: {error}") from None
    if needs.targets != "classes" and config.teacher_head:
        raise UserError(
            f"teacher_head is for probabilities, but objective {config.objective} learns from the teacher's "
            "embeddings or layers, which do not depend on a head; drop it"
        )
    if needs.teacher_layers:
        teacher.single  # noqa: B018 - raises for several models
    if needs.targets != "classes":
        return teacher
    teacher.check_classes()
    if needs.activation and teacher.activations != {needs.activation}:
        raise UserError(
            f"teacher {config.teacher} has {' and '.join(sorted(teacher.activations))} outputs, but loss "
            f"{config.loss} is for {needs.activation}; set loss: "
            + ("CrossEntropyLoss" if needs.activation == "sigmoid" else "BCEWithLogitsLoss")
            + ", or give a teacher that was trained with this loss"
        )
    return teacher
