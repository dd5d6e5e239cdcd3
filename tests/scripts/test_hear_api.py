"""HEAR's common API: every model has its attributes, shapes and times."""

import math
import sys

import pytest
import torch

from common.errors import UserError
from models import create_model, save_checkpoint
from scripts.hear_api import get_scene_embeddings, get_timestamp_embeddings, load_model
from tests.conftest import ROOT, run_command
from tests.models.sounds import noise
from tests.models.test_invariances import build, list_cases
from tests.scripts.test_xares_encoder import QUICK

SECONDS = 1.3


@pytest.mark.parametrize("name", list_cases(QUICK))
def test_every_model_embeds_clips_and_steps_through_it(name, tmp_path):
    save_checkpoint(tmp_path / "model.pt", build(name))
    model = load_model(str(tmp_path / "model.pt"))
    assert isinstance(model, torch.nn.Module)
    assert not model.training
    audio = torch.stack([noise(round(SECONDS * model.sample_rate), seed) for seed in range(2)])
    clips = get_scene_embeddings(audio, model)
    steps, times = get_timestamp_embeddings(audio, model)
    assert clips.shape == (2, model.scene_embedding_size)
    assert steps.shape == (2, model.n_steps(audio.shape[1]), model.timestamp_embedding_size)
    assert times.shape == steps.shape[:2]
    assert clips.dtype == steps.dtype == times.dtype == torch.float32
    assert not clips.requires_grad
    with torch.inference_mode():
        torch.testing.assert_close(clips[0], build(name).embed(audio[:1])[0][0], atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(steps[1], build(name).embed(audio[1:])[1][0], atol=1e-3, rtol=1e-3)
    assert torch.equal(times[0], times[1])
    assert (times[0].diff() > 0).all()
    assert 0 < times[0, 0] < 1000 * SECONDS


@pytest.mark.parametrize(
    ("name", "arguments", "hop", "patch", "offset"),
    [
        ("audiotransformer_pico", {"target_length": 96}, 16, 16, 0.0),
        ("dasheng_pico", {"target_length": 96}, 4, 4, 0.0),
        ("matpac_pico", {"target_length": 96}, 16, 16, 12.5),  # frames begin with their first sample
    ],
)
def test_times_of_a_transformer_are_the_centres_of_its_patches(name, arguments, hop, patch, offset):
    model = create_model(name, num_classes=0, depth=1, **arguments).eval()
    _, times = get_timestamp_embeddings(torch.zeros(1, 40_000), model)
    frames = [model.front_end.n_frames(40_000)]
    expected = [10 * (start + (patch - 1) / 2) + offset for start in range(0, frames[0] - hop + 1, hop)]
    assert times[0].tolist()[: len(expected)] == pytest.approx(expected)
    assert times.shape[1] == model.n_steps(40_000)


@pytest.mark.parametrize("name", ["mn01_as", "resnet10_small"])
def test_times_of_a_cnn_divide_the_clip_evenly(name):
    model = create_model(name, num_classes=2).eval()
    _, times = get_timestamp_embeddings(torch.zeros(1, 2 * model.sample_rate), model)
    step = 2000 / times.shape[1]
    assert times[0].tolist() == pytest.approx([step * (index + 0.5) for index in range(times.shape[1])])


@torch.inference_mode()
def test_a_click_changes_the_step_of_its_time_most():
    """Beyond the positions of frames: what the times promise to a user."""
    for name, n_steps in (("matpac_pico", 1), ("dasheng_pico", 1), ("mn01_as", 1.5)):  # a CNN's fields reach far
        model = build(name)
        silence = noise(3 * model.sample_rate, 0, 0.001)
        for second in (0.5, 1.3, 2.6):
            click = silence.clone()
            click[round(second * model.sample_rate) :][:200] += 0.5
            before, after = (get_timestamp_embeddings(clip[None], model) for clip in (silence, click))
            changed = (after[0] - before[0])[0].norm(dim=1)
            place = int(changed.argmax())
            step = float(before[1][0].diff().max())
            assert abs(float(before[1][0, place]) - 1000 * second) <= n_steps * step, (name, second)


def test_weights_whose_file_does_not_name_their_model_are_given_one(tmp_path):
    torch.save(create_model("audiotransformer_pico", num_classes=3).state_dict(), tmp_path / "weights.pt")
    with pytest.raises(UserError, match="does not name its model"):
        load_model(str(tmp_path / "weights.pt"))
    assert load_model(str(tmp_path / "weights.pt"), "audiotransformer_pico").scene_embedding_size == 64
    model = load_model(str(tmp_path / "weights.pt"), model_hub="audiotransformer_pico")
    for wrong in (torch.zeros(1, 0), torch.full((1, 1000), math.nan)):
        with pytest.raises(UserError):
            get_scene_embeddings(wrong, model)


@pytest.mark.long
def test_it_is_imported_from_any_folder(tmp_path):
    save_checkpoint(tmp_path / "model.pt", create_model("audiotransformer_pico", num_classes=0, depth=1))
    code = "import hear_api; print(hear_api.load_model('model.pt').timestamp_embedding_size)"
    done = run_command("-c", code, cwd=tmp_path, env={"PYTHONPATH": str(ROOT / "scripts")})
    assert done.stdout == "64\n", done.stderr
    assert "hear_api" not in sys.modules
