"""Objectives of training; every file in this folder is imported and registers one or several."""

import importlib
import pkgutil

from distill.objectives.base import (
    Needs,
    Objective,
    ObjectivePlan,
    TrainingFacts,
    list_objectives,
    plan_objective,
    register_objective,
)

for _file in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_file.name}")

__all__ = [
    "Needs",
    "Objective",
    "ObjectivePlan",
    "TrainingFacts",
    "list_objectives",
    "plan_objective",
    "register_objective",
]
