"""Training with quantized weights: what is evaluated, saved and loaded is quantized, and a stop changes nothing."""

import copy
from pathlib import Path

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from common.errors import Faults, UserError
from distill.objectives import Needs
from models import load_model, load_tagger
from models.quantization import quantized_weights
from models.weight_sources import read_weights
from run import Runner
from tests.conftest import run_command, torchrun
from tests.objectives import define_objective
from tests.training.test_loop import CPU, settings, train
from tests.training.test_ranks import configure
from tests.training.test_resume import StoppedError, assert_same, stop_after, the_run, weights_of
from training.config import TrainConfig
from training.evaluate import evaluate
from training.labelled import open_labelled
from training.precision import Precision


def arguments(**recipe):
    return {"pooling": "logit", "depth": 1, "quantize": {"weights": 3} | recipe}


@pytest.mark.parametrize(
    "recipe",
    [{}, {"clip": "learned", "activations": 8}, {"scheme": "levels", "start": 0.5}],
    ids=["mse", "learned", "levels"],
)
def test_what_is_trained_is_evaluated_saved_and_loaded_as_quantized_values(recipe, tone_pack, tmp_path):
    config = settings(
        tone_pack, model_args=arguments(**recipe), epochs=8, valid_every=2, ema=0.5, n_saved=2, init_from_data=True
    )
    result, run = train(tmp_path, config)
    model = load_tagger(result["weights"])
    sound = torch.randn(2, 16000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model.predict(sound), run.model.eval().predict(sound))
    weights = [getattr(module, name) for _, module, name, _ in quantized_weights(model)]
    assert len(weights) == 6  # patches, four of a block, the last layer
    assert all(len(row.unique()) <= 8 for weight in weights for row in weight.flatten(1))
    state, _ = read_weights(result["weights"])
    assert len(state["blocks.0.mlp.fc1.weight"].unique()) > 1000  # latent weights
    data = open_labelled(str(tone_pack), model.labels, Faults("the test"))
    found = evaluate(model, data, batch_size=8, num_workers=0, precision=Precision("fp32", CPU))
    assert found.mAP == result["mAP"]


@pytest.mark.parametrize("bits", [2, 4])
def test_a_quantized_student_learns(bits, tone_pack, tmp_path):
    result, _ = train(tmp_path, settings(tone_pack, model_args=arguments(weights=bits)))
    assert result["mAP"] > 0.9


def test_scales_are_trained_and_have_no_weight_decay(tone_pack, tmp_path):
    _, run = train(tmp_path, settings(tone_pack, model_args=arguments(clip="learned", scheme="minmax"), epochs=2))
    scale = run.model.blocks[0].mlp.fc1.parametrizations.weight[0].log_scale
    groups = run.trainer.optimizer.param_groups
    (group,) = [each for each in groups if any(parameter is scale for parameter in each["params"])]
    assert group["weight_decay"] == 0
    assert scale in run.trainer.optimizer.state


@pytest.mark.parametrize("recipe", [{"start": 0.4}, {"clip": "learned", "activations": 8}], ids=["mse", "learned"])
def test_a_run_that_was_stopped_ends_with_the_same_weights(recipe, tone_pack, tmp_path, monkeypatch):
    path = configure(tmp_path, tone_pack, model_args=arguments(**recipe) | {"drop_rate": 0.1}, epochs=3)
    Runner(7).train(str(path), outputpath=str(tmp_path / "whole"))
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        with pytest.raises(StoppedError):
            Runner(7).train(str(path), outputpath=str(tmp_path / "parts"))
    Runner(7).train(str(path), outputpath=str(tmp_path / "parts"))
    assert_same(the_run(tmp_path / "whole"), the_run(tmp_path / "parts"))


@pytest.mark.long
def test_two_processes_train_the_weights_of_one(tone_pack, tmp_path):
    path = configure(tmp_path, tone_pack, model_args=arguments(clip="learned"), epochs=2, ema=None)
    Runner(1).train(str(path), outputpath=str(tmp_path / "one"))
    words = ["run.py", "train", path, "--outputpath", tmp_path / "two", "--seed", "1"]
    result = run_command(*torchrun(), *words)
    assert result.returncode == 0, result.stderr
    one, two = weights_of(the_run(tmp_path / "one")), weights_of(the_run(tmp_path / "two"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=2e-3, msg=name)


def test_training_goes_on_from_a_float_and_from_a_quantized_run(tone_pack, tmp_path):
    first, run = train(tmp_path / "float", settings(tone_pack, model_args={"pooling": "logit", "depth": 1}, epochs=1))
    config = settings(
        tone_pack, model_args=arguments(), epochs=1, optimizer_args={"lr": 1e-9}, pretrained=first["weights"]
    )
    second, run = train(tmp_path / "joint", config)
    original = run.model.blocks[0].mlp.fc1.parametrizations.weight.original
    torch.testing.assert_close(original, load_model(first["weights"]).blocks[0].mlp.fc1.weight)
    config = config.model_copy(update={"pretrained": second["weights"]})
    _, run = train(tmp_path / "again", config)
    torch.testing.assert_close(original, run.model.blocks[0].mlp.fc1.parametrizations.weight.original)


def test_objectives_may_copy_a_quantized_student(tone_pack, tmp_path):
    """As a moving-average teacher does."""

    def compute(objective, student, batch):
        output = student.forward_spectrogram(batch.mel, batch.n_frames)
        with torch.no_grad():
            other = copy.deepcopy(student).eval().forward_spectrogram(batch.mel, batch.n_frames)
        return {"loss": binary_cross_entropy_with_logits(output, other.sigmoid())}

    needs = Needs("classes", output="logits", activation="sigmoid")
    define_objective("test_copying", needs, compute)
    config = settings(tone_pack, model_args=arguments(), objective="test_copying", epochs=1)
    result, _ = train(tmp_path, TrainConfig(**config.model_dump(exclude_unset=True, exclude={"loss"})))
    assert Path(result["weights"]).exists()


def test_batch_norms_are_not_folded_in_training(tone_pack, tmp_path):
    config = settings(tone_pack, model="resnet10_small", model_args={"quantize": {"fold_batch_norm": True}})
    with pytest.raises(UserError, match="fold_batch_norm is for quantization after training"):
        train(tmp_path, config)
