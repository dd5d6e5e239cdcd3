"""How much masks hide of clips, and what is said where it is too much."""

import json

import numpy as np
import pytest
import torch
import yaml

from audio.dataset import Pack
from distill.mask_check import check_masks, compute_masked_shares
from distill.replay import Replay
from distill.targets import SoftTargetStore, StoredTargets
from models import create_model, save_checkpoint
from tests.conftest import run_command


def masks(param, share=None, more=()):
    return Replay({}, [{"TimeMasking": {"time_mask_param": param, "max_share": share}}, *more])


def masked_by_drawing(replay, grid, n_samples, n_draws=4000):
    """Return the share of frames that each of many drawn masks hides, read off a spectrogram of ones."""
    n_frames = n_samples // 160 + 1
    draws = torch.rand(2, n_draws, generator=torch.Generator().manual_seed(1))
    out = replay.mask_spectrogram(torch.ones(n_draws, 2, n_frames), grid, *draws, torch.full((n_draws,), n_samples))
    return (out[:, 0] != 1).float().mean(dim=1).numpy()


class Grid:
    sample_rate, hop_size = 16000, 160
    band_centers_hz = torch.tensor([300.0, 3000.0])

    def power_db_to_value(self, db):
        return db


@pytest.mark.parametrize(("param", "share", "n_samples"), [
    (96, None, 6880), (192, None, 16000), (96, None, 80000), (96, 0.2, 6880), (40, 0.9, 6880), (192, 1.0, 16000)
])  # fmt: skip
def test_the_expected_share_is_the_mean_of_many_drawn_masks(param, share, n_samples):
    replay = masks(param, share, more=[{"TimeMasking": {"time_mask_param": 3}}])  # within the wider one
    drawn = masked_by_drawing(replay, Grid(), n_samples)
    found = compute_masked_shares(replay, np.array([n_samples]))
    assert found.mean == pytest.approx(drawn.mean(), abs=0.01 + 0.5 / found.n_frames[0])  # whole frames are masked
    assert found.largest[0] == pytest.approx(drawn.max(), abs=0.03)


def test_masks_that_leave_too_little_of_short_clips_are_a_fault_with_its_numbers():
    lengths = np.array([4800] * 30 + [6880] * 50 + [80000] * 20)  # 0.31, 0.44 and 5.01 s of frames
    found = check_masks(masks(96), lengths)
    assert found.warning is None
    numbers = "up to 0.96 s of 100 clips", "0.44 s long in the median", "0.31 s at least", "of 80 clips", "80 of them"
    for part in numbers:
        assert part in found.fault
    share = compute_masked_shares(masks(96), lengths).mean
    assert f"{share:.0%} of their frames on average" in found.fault
    assert "`TimeMasking: {time_mask_param: 96, max_share: 0.2}`" in found.fault
    assert "at most 8" in found.fault
    mended = Replay({}, yaml.safe_load("[{TimeMasking: {time_mask_param: 96, max_share: 0.2}}]"))
    assert check_masks(mended, lengths) == check_masks(masks(8), np.array([6880])) == check_masks(Replay(), lengths)
    assert check_masks(mended, lengths).fault is check_masks(mended, lengths).warning is None


def test_single_clips_that_can_lose_much_are_warned_of():
    found = check_masks(masks(192), np.array([160000] * 90 + [16000] * 10))
    assert found.fault is None
    assert "more than a third of 10 clips can be masked, 10 of them whole" in found.warning
    assert check_masks(masks(192), np.array([160000] * 90)).warning is None  # as published
    assert check_masks(masks(24, more=[{"FrequencyMasking": {}}]), np.array([160000])).warning is None


def test_masks_of_frequency_that_leave_too_little_are_a_fault():
    found = check_masks(Replay({}, [{"FrequencyMasking": {"freq_mask_param": 64}}]), np.array([160000]))
    assert "up to 100% of the bands, 50% on average" in found.fault
    mended = Replay({}, [{"FrequencyMasking": {"freq_mask_param": 64, "max_share": 0.25}}])
    assert check_masks(mended, np.array([160000])).fault is None


def test_of_stored_targets_nothing_is_a_fault_and_the_store_is_to_be_made_again():
    found = check_masks(masks(96), np.array([6880] * 4), "logits/mine")
    assert found.fault is None
    assert "logits/mine" in found.warning
    assert "save_logits.py" in found.warning
    assert "max_share: 0.2" in found.warning


@pytest.fixture
def soft(tone_pack, tmp_path):
    """A configuration for the soft targets of an untrained teacher of the tones, of one second each."""
    save_checkpoint(tmp_path / "teacher.pt", create_model("audiotransformer_pico", num_classes=7, depth=1))
    settings = {"train_data": str(tone_pack), "model": str(tmp_path / "teacher.pt"), "epochs": 1, "topk": 5}
    settings |= {"outputpath": str(tmp_path / "logits"), "name": "t", "num_workers": 0, "device": "cpu"}
    path = tmp_path / "soft.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def test_soft_targets_are_refused_until_masks_leave_enough_and_a_student_then_gets_the_same_masks(
    soft, tone_pack, tmp_path
):
    refused = run_command("save_logits.py", soft)
    assert refused.returncode == 1
    assert "1.92 s of 28 clips" in refused.stderr
    assert not (tmp_path / "logits").exists()
    spectransforms = [{"TimeMasking": {"max_share": 0.2}}, {"FrequencyMasking": {"max_share": 0.25}}]
    made = run_command("save_logits.py", soft, "--spectransforms", json.dumps(spectransforms))
    assert made.returncode == 0, made.stderr
    store = SoftTargetStore(tmp_path / "logits" / "t" / "tones" / "chunk_10")
    assert store.replay.settings()["spectransforms"] == spectransforms
    source = StoredTargets(store, Pack.open(tone_pack), 7, "zero")
    assert source.n_reference.tolist() == [16000] * 28
    assert compute_masked_shares(source.replay, source.n_reference).largest.max() == pytest.approx(0.2)
    given, grid = Replay({}, spectransforms), create_model("audiotransformer_pico", num_classes=2).front_end
    mel, n = torch.randn(1, 64, 101), torch.tensor([16000])
    n_masked = []
    for item in range(28):
        draw = source.replay.draw(source.seed(1, item), 16000)
        draws = torch.tensor([draw.value]), torch.tensor([draw.min_value])
        of_store = source.replay.mask_spectrogram(mel, grid, *draws, n)
        assert torch.equal(of_store, given.mask_spectrogram(mel, grid, *draws, n))
        n_masked.append(int((of_store == 0).all(dim=1).sum()))
    assert 0 < max(n_masked) <= 20
