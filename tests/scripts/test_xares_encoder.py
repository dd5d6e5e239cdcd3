"""X-ARES: its own checker accepts every model."""

import pytest
import torch

from common.errors import UserError
from models import create_model, save_checkpoint
from models.step_times import find_step_seconds
from scripts.xares_encoder import TaggerEncoder
from tests.conftest import ROOT
from tests.models.sounds import noise
from tests.models.test_invariances import build, list_cases

QUICK = {"audiotransformer_pico", "matpac_pico", "dasheng_pico", "passt_pico", "mn01_as", "resnet10_small"}


@pytest.mark.parametrize("name", list_cases(QUICK))
def test_its_checker_accepts_every_model(name):
    checker = pytest.importorskip("xares.audio_encoder_checker")  # of requirements-dev.txt
    encoder = TaggerEncoder(build(name))
    assert checker.check_audio_encoder(encoder)
    seconds = 12.0
    audio = noise(round(seconds * encoder.sampling_rate))[None]
    with torch.inference_mode():
        steps = encoder(audio)
    assert steps.shape[1] == pytest.approx(1000 * seconds / encoder.hop_size_in_ms, abs=2, rel=0.02)


def test_the_time_between_steps_is_an_average_over_chunks():
    assert find_step_seconds(create_model("matpac_pico")) == pytest.approx(0.16)
    assert find_step_seconds(create_model("dasheng_pico")) == pytest.approx(0.04)
    assert find_step_seconds(create_model("mn01_as", num_classes=2)) == pytest.approx(0.32, rel=0.01)
    short = create_model("ast_pico", num_classes=2, depth=1, target_length=128)  # 12 steps of 100 ms each 1280 ms
    assert find_step_seconds(short) == pytest.approx(1.28 / 12, rel=0.01)


@torch.inference_mode()
def test_its_loader_finds_one_encoder_of_the_model_in_the_environment(tmp_path, monkeypatch):
    utils = pytest.importorskip("xares.utils")
    monkeypatch.syspath_prepend(str(ROOT))
    kind = utils.attr_from_py_path("scripts/xares_encoder.py", endswith="Encoder")
    monkeypatch.delenv("CED_MODEL", raising=False)
    with pytest.raises(UserError, match="CED_MODEL is not set: give the model"):
        kind()
    model = create_model("matpac_pico", num_classes=0, depth=1).eval()
    save_checkpoint(tmp_path / "own.pt", model)
    monkeypatch.setenv("CED_MODEL", str(tmp_path / "own.pt"))
    encoder = kind()
    assert type(encoder).__name__.endswith("own_pt_TaggerEncoder")  # of which X-ARES keeps its results
    clip = noise(20_000)[None]
    assert torch.equal(encoder(clip), model.embed(clip)[1])
    assert (encoder.sampling_rate, encoder.output_dim, encoder.hop_size_in_ms) == (16000, 320, 160)
