"""Methods that are no part of the project, each in one file: what a reader would write to add one."""

from tests.training.methods import bad_gradient, layer_distillation, masked_reconstruction

__all__ = ["bad_gradient", "layer_distillation", "masked_reconstruction"]
