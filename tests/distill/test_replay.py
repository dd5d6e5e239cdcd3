import json
import math

import numpy as np
import pytest
import torch

from common.errors import UserError
from distill.replay import FrequencyMasking, Replay, Shift, TimeMasking, draw_epoch_seeds
from models import create_model

CED = {
    "wavtransforms": {"Shift": {"min_shift": -0.5, "max_shift": 0.5}},
    "spectransforms": [{"TimeMasking": {"time_mask_param": 192}}, {"FrequencyMasking": {"freq_mask_param": 24}}],
}


@pytest.fixture(scope="module")
def ced_grid():
    return create_model("audiotransformer_pico", num_classes=2).front_end


@pytest.fixture(scope="module")
def efficientat_grid():
    return create_model("mn01_as", num_classes=2).front_end


def slow_reference(seed, n_samples):
    """The published order of draws, step by step, for one clip at 16 kHz."""
    generator = torch.Generator().manual_seed(seed)
    shift = 0
    if torch.bernoulli(torch.tensor([0.5]), generator=generator).item() == 1:
        low, high = round(-0.5 * n_samples), round(0.5 * n_samples)
        shift = torch.randint(low, high + 1, (1,), dtype=torch.int32, generator=generator).item()
    value, min_value = torch.rand(1, generator=generator), torch.rand(1, generator=generator)
    n_frames = n_samples // 160 + 1
    masks = []
    for size, param in ((n_frames, 192), (64, 24)):
        width = value * param
        start = int(min_value * (size - width))
        masks.append((start, start + int(width)))
    return shift, *masks


def masked_ranges(replay, grid, seed, n_samples, bands=64):
    """Return the shift in samples and the masked frames and bands of one clip, read off a spectrogram of ones."""
    draw = replay.draw(seed, n_samples)
    waveform = np.zeros(n_samples, np.float32)
    waveform[0] = 1.0
    shift = int(replay.transform_waveform(waveform, draw, 16000).argmax())
    mel = torch.full((1, bands, n_samples // 160 + 1), 5.0)
    value, min_value = torch.tensor([draw.value]), torch.tensor([draw.min_value])
    out = replay.mask_spectrogram(mel, grid, value, min_value, torch.tensor([n_samples]))[0]
    frames = (out == 0).all(dim=0).nonzero().flatten()
    rows = (out == 0).all(dim=1).nonzero().flatten()
    return shift, span(frames), span(rows)


def span(indices):
    return (int(indices[0]), int(indices[-1]) + 1) if len(indices) else None


def inside(mask, size):
    """A mask wider than a short clip sticks out of it; an empty one masks nothing."""
    start, stop = max(mask[0], 0), min(mask[1], size)
    return (start, stop) if start < stop else None


def test_replay_equals_the_published_code_draw_for_draw(shared, ced_grid):
    reference = json.loads((shared / "fixtures/published_logits_layout/replay.json").read_text())
    replay = Replay(**CED)
    assert len(reference["rows"]) == 60
    for row in reference["rows"]:
        draw = replay.draw(row["seed"], row["n_samples"])
        assert draw.value == row["value"]
        assert draw.min_value == row["min_value"]
        shift, frames, bands = masked_ranges(replay, ced_grid, row["seed"], row["n_samples"])
        assert shift == row["shift"] % row["n_samples"]
        assert frames == inside(row["time_mask"], row["n_frames"])
        assert bands == inside(row["freq_mask"], 64)


def test_batched_masks_equal_the_slow_reference_for_many_seeds_and_lengths(ced_grid):
    replay = Replay(**CED)
    for seed, n_samples in zip(range(1000, 1200), np.linspace(40000, 160000, 200).astype(int), strict=True):
        shift, frames, bands = slow_reference(seed, int(n_samples))
        got = masked_ranges(replay, ced_grid, seed, int(n_samples))
        assert got[0] == shift % n_samples
        assert got[1] == inside(frames, n_samples // 160 + 1)
        assert got[2] == inside(bands, 64)


def test_masks_of_a_batch_equal_those_of_each_clip_alone(ced_grid):
    replay = Replay(**CED)
    mel = torch.randn(5, 64, 501)
    draws = [replay.draw(seed, 80000) for seed in range(5)]
    value = torch.tensor([d.value for d in draws])
    min_value = torch.tensor([d.min_value for d in draws])
    n = torch.full((5,), 80000)
    together = replay.mask_spectrogram(mel, ced_grid, value, min_value, n)
    for i in range(5):
        alone = replay.mask_spectrogram(mel[i : i + 1], ced_grid, value[i : i + 1], min_value[i : i + 1], n[i : i + 1])
        assert torch.equal(together[i], alone[0])
    assert not torch.equal(together, mel)


def test_another_front_end_is_masked_in_the_same_seconds_and_hertz(ced_grid, efficientat_grid):
    """10 ms frames at both rates: the same frames; and the same hertz although bands, rate and scale differ."""
    seed, n_reference = 5, 80000
    replay = Replay(**CED)
    draw = replay.draw(seed, n_reference)
    args = (torch.tensor([draw.value]), torch.tensor([draw.min_value]), torch.tensor([n_reference]))
    ours = replay.mask_spectrogram(torch.full((1, 64, 501), 5.0), ced_grid, *args)[0] == 0
    fill = (math.log(1 + 1e-5) + 4.5) / 5  # 0 dB in EfficientAT's scale
    theirs = replay.mask_spectrogram(torch.full((1, 128, 501), 5.0), efficientat_grid, *args)[0]
    theirs = torch.isclose(theirs, torch.tensor(fill))
    assert torch.equal(ours.all(dim=0), theirs.all(dim=0))
    ours_hz = ced_grid.band_centers_hz[ours.all(dim=1)]
    theirs_hz = efficientat_grid.band_centers_hz[theirs.all(dim=1)]
    # No band of theirs is masked beyond half a band of ours.
    step = float(ced_grid.band_centers_hz.diff().max())
    assert theirs_hz.min() > ours_hz.min() - step
    assert theirs_hz.max() < ours_hz.max() + step
    inside = (efficientat_grid.band_centers_hz >= ours_hz.min()) & (efficientat_grid.band_centers_hz <= ours_hz.max())
    assert theirs.all(dim=1)[inside].all()


def test_shift_moves_the_same_seconds_at_every_rate():
    replay = Replay(**CED)
    seed = next(s for s in range(100) if replay.draw(s, 160000).wave[0] > 0.5)
    draw = replay.draw(seed, 160000)
    click16, click32 = np.zeros(160000, np.float32), np.zeros(320000, np.float32)
    click16[0] = click32[0] = 1.0
    at16 = replay.transform_waveform(click16, draw, 16000).argmax()
    at32 = replay.transform_waveform(click32, draw, 32000).argmax()
    assert at16 > 0
    assert at32 == 2 * at16


def test_shift_of_a_pack_at_another_rate_is_drawn_at_the_reference_rate():
    assert Replay(**CED).draw(17, 80016) == Replay(**CED).draw(17, 80016)
    assert Shift().draw(80016, torch.Generator().manual_seed(1017516298)) == 16449 / 16000


def test_mean_fill_ignores_padding(ced_grid):
    replay = Replay({}, [{"TimeMasking": {"time_mask_param": 50}}], "mean")
    mel = torch.randn(1, 64, 101)
    args = (torch.tensor([0.9]), torch.tensor([0.5]), torch.tensor([16000]))
    alone = replay.mask_spectrogram(mel, ced_grid, *args)
    padded = torch.nn.functional.pad(mel, (0, 60), value=-100.0)
    beside = replay.mask_spectrogram(padded, ced_grid, *args, n_frames=torch.tensor([101]))
    assert torch.allclose(alone, beside[..., :101], atol=1e-5)
    masked = (alone != mel).all(dim=1)[0]
    assert masked.sum() == int(np.float32(0.9) * 50)
    assert torch.allclose(alone[0][:, masked], mel.mean(), atol=1e-5)


def test_what_lies_behind_a_clips_end_stays_silent(ced_grid):
    replay = Replay({}, [{"FrequencyMasking": {"freq_mask_param": 24}}])
    mel = torch.full((1, 64, 100), -100.0)
    args = (torch.tensor([0.9]), torch.tensor([0.5]), torch.tensor([8000]))
    out = replay.mask_spectrogram(mel, ced_grid, *args, n_frames=torch.tensor([51]))
    assert (out[..., :51] == 0).any()
    assert (out[..., 51:] == -100).all()


@pytest.mark.parametrize("shift", [{"p": 1}, {"p": 0}])
def test_a_whole_number_for_a_probability_is_one(shift):
    drawn = [Replay({"Shift": shift}).draw(seed, 16000).wave[0] for seed in range(20)]
    assert sum(seconds != 0 for seconds in drawn) == 20 * shift["p"]


def test_all_faults_of_an_augmentation_are_told_at_once():
    with pytest.raises(UserError, match=r"2 faults(?s:.*)Shft.*did you mean 'Shift'(?s:.*)time_mask"):
        Replay({"Shft": {}}, [{"TimeMasking": {"time_mask": 3}}])
    with pytest.raises(UserError, match=r"3 faults(?s:.*)p is 2(?s:.*)'x'(?s:.*)mask_fill"):
        Replay({"Shift": {"p": 2}}, [{"TimeMasking": {"time_mask_param": "x"}}], "median")


def test_transforms_have_the_published_defaults():
    assert (TimeMasking().param, FrequencyMasking().param, Shift().p) == (192, 24, 0.5)
    assert TimeMasking().max_share is None
    assert FrequencyMasking().max_share is None


SHARED = {
    "wavtransforms": CED["wavtransforms"],
    "spectransforms": [
        {"TimeMasking": {"time_mask_param": 192, "max_share": 0.2}},
        {"FrequencyMasking": {"freq_mask_param": 24, "max_share": 0.25}},
    ],
}


def test_with_a_share_the_same_draws_place_masks_that_leave_most_of_every_clip(ced_grid):
    plain, shared_masks = Replay(**CED), Replay(**SHARED)
    n_narrower = 0
    for seed, n_samples in zip(range(300), np.linspace(2400, 240000, 300).astype(int).tolist(), strict=True):
        assert plain.draw(seed, n_samples) == shared_masks.draw(seed, n_samples)
        n_frames = n_samples // 160 + 1
        draw = shared_masks.draw(seed, n_samples)
        value, min_value = np.float32(draw.value), np.float32(draw.min_value)
        expected = []
        for size, limit in ((n_frames, min(192, 0.2 * n_frames)), (64, 16)):
            width = value * np.float32(limit)
            start = int(min_value * (np.float32(size) - width))
            expected.append(inside((start, start + int(width)), size))
        _, frames, bands = masked_ranges(shared_masks, ced_grid, seed, n_samples)
        assert (frames, bands) == tuple(expected)
        assert frames is None or frames[1] - frames[0] <= 0.2 * n_frames
        n_narrower += 0.2 * n_frames < 192
    assert n_narrower > 150


def test_a_share_that_a_clip_does_not_reach_changes_no_bit(ced_grid):
    seeds, n = range(200), 200 * [160000]  # 1001 frames, of which 192 are less than a fifth
    wide = [{"TimeMasking": {"time_mask_param": 192, "max_share": 0.2}}, {"FrequencyMasking": {"max_share": 0.4}}]
    plain, shared_masks = Replay({}, CED["spectransforms"]), Replay({}, wide)
    draws = [plain.draw(seed, 160000) for seed in seeds]
    args = [torch.tensor([getattr(d, name) for d in draws]) for name in ("value", "min_value")]
    mel = torch.randn(1, 64, 1001).expand(200, 64, 1001)
    one, other = (r.mask_spectrogram(mel, ced_grid, *args, torch.tensor(n)) for r in (plain, shared_masks))
    assert torch.equal(one, other)
    assert not torch.equal(one, mel)


def test_masks_limited_to_a_share_lie_in_the_same_seconds_and_hertz_for_every_front_end(ced_grid, efficientat_grid):
    replay = Replay({}, SHARED["spectransforms"])
    fill = (math.log(1 + 1e-5) + 4.5) / 5  # 0 dB in EfficientAT's scale
    for seed in range(20):
        draw = replay.draw(seed, 6880)  # 0.43 s, 44 frames of 10 ms at either rate
        args = (torch.tensor([draw.value]), torch.tensor([draw.min_value]), torch.tensor([6880]))
        ours = replay.mask_spectrogram(torch.full((1, 64, 44), 5.0), ced_grid, *args)[0] == 0
        theirs = replay.mask_spectrogram(torch.full((1, 128, 44), 5.0), efficientat_grid, *args)[0]
        theirs = torch.isclose(theirs, torch.tensor(fill))
        assert torch.equal(ours.all(dim=0), theirs.all(dim=0))
        assert ours.all(dim=0).sum() == int(np.float32(draw.value) * np.float32(8.8))
        ours_hz = ced_grid.band_centers_hz[ours.all(dim=1)]
        if len(ours_hz):
            hertz = efficientat_grid.band_centers_hz
            assert theirs.all(dim=1)[(hertz > ours_hz.min()) & (hertz < ours_hz.max())].all()


@pytest.mark.parametrize("share", [-0.1, 1.2, "0.2", True, 20])
def test_a_share_is_a_number_from_0_to_1(share):
    with pytest.raises(UserError, match=r"2 faults(?s:.*)TimeMasking: max_share.*from 0 to 1(?s:.*)FrequencyMasking"):
        Replay({}, [{"TimeMasking": {"max_share": share}}, {"FrequencyMasking": {"max_share": share}}])


def test_seeds_are_a_function_of_item_and_epoch_whatever_the_split():
    whole = draw_epoch_seeds(42, 3, 100)
    assert np.array_equal(draw_epoch_seeds(42, 3, 40, first=60), whole[60:])
    assert not np.array_equal(draw_epoch_seeds(42, 4, 100), whole)
    assert whole.dtype == np.int32
    assert (whole >= 0).all()
    assert len(set(whole.tolist())) == 100


def test_drawing_leaves_global_random_state_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    Replay(**CED).draw(3, 16000)
    assert torch.equal(before, torch.get_rng_state())
