"""Soft targets: what the teacher answers, how the work is split, where it starts again."""

import json
import multiprocessing
import os
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from audio.dataset import Pack
from common import locks
from common.errors import UserError
from common.locks import lock_shares
from distill.replay import Replay
from distill.targets import SoftTargetStore, StoredTargets
from models import Ensemble, create_model
from tests.batches import make_batch
from training.config import SoftTargetConfig
from training.store_writer import SoftTargetContent, StoreWriter


def teaching(config, pack, teacher, folder, rank=0, world_size=1):
    return StoreWriter(config, pack, SoftTargetContent(teacher, config.topk), folder, rank, world_size)


@pytest.fixture
def pack(tone_pack):
    return Pack.open(tone_pack)


def config(tone_pack, **changes):
    settings = {"epochs": 2, "batch_size": 8, "num_workers": 0, "topk": 5, "device": "cpu"} | changes
    return SoftTargetConfig(train_data=str(tone_pack), model="audiotransformer_pico", **settings)


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    return Ensemble([create_model("audiotransformer_pico", num_classes=7)])


@pytest.fixture(scope="module")
def other_teacher():
    torch.manual_seed(1)
    return Ensemble([create_model("mn01_as", num_classes=7)])


def files(folder: Path):
    return {p.name: p.read_bytes() for p in sorted(folder.glob("logits_ep*.h5"))}


def arrays(folder, epoch=1, rank=0):
    with h5py.File(folder / f"logits_ep{epoch}_{rank}.h5") as file:
        return {k: file[k][()] for k in file}


def test_stored_values_are_the_teachers_outputs_to_each_augmented_chunk(tone_pack, pack, teacher, tmp_path):
    """One chunk at a time, by hand: seed, roll, mel, masks, probabilities, top k."""
    making = teaching(config(tone_pack), pack, teacher, tmp_path)
    making.save()
    stored = arrays(tmp_path, epoch=2)
    (model,) = teacher.members
    for item in (0, 9, 27):
        seed = int(stored["seeds"][item])
        draw = making.replay.draw(seed, 16000)
        waveform = np.roll(pack.read(item), round(draw.wave[0] * 16000))
        with torch.inference_mode():
            mel = model.front_end(torch.from_numpy(waveform)[None])
            mel = making.replay.mask_spectrogram(
                mel,
                model.front_end,
                torch.tensor([draw.value]),
                torch.tensor([draw.min_value]),
                torch.tensor([16000]),
            )
            top = model.probabilities(model.forward_spectrogram(mel))[0].topk(5)
        assert np.allclose(stored["topk_values"][item], top.values, atol=1e-3)
        assert stored["topk_indexes"][item].tolist() == top.indices.tolist()


def test_the_layout_is_the_published_one_with_a_readable_meta(tone_pack, pack, teacher, tmp_path):
    teaching(config(tone_pack), pack, teacher, tmp_path).save()
    stored = arrays(tmp_path)
    assert {k: (v.dtype, v.shape) for k, v in stored.items()} == {
        "topk_values": (np.float16, (28, 5)),
        "topk_indexes": (np.int16, (28, 5)),
        "seeds": (np.int32, (28,)),
    }
    rows = SoftTargetStore(tmp_path).read_rows(1)
    assert rows["filename"].tolist() == pack.names
    assert rows["end"].tolist() == [1.0] * 28
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert meta["labels"] == [str(i) for i in range(7)]
    assert meta["reference_rate"] == 16000
    assert len(meta["teacher"][0]["sha256"]) == 64
    assert meta["versions"]["torch"] == torch.__version__.split("+")[0]
    assert not list(tmp_path.glob("*.pt"))


def test_two_ranks_store_what_one_process_stores(tone_pack, pack, teacher, tmp_path):
    teaching(config(tone_pack), pack, teacher, tmp_path / "one").save()
    for rank in (0, 1):
        teaching(config(tone_pack), pack, teacher, tmp_path / "two", rank, 2).save()
    one, two = (StoredTargets(SoftTargetStore(tmp_path / n), pack, 7, "zero") for n in ("one", "two"))
    assert list(one.chunks) == list(two.chunks)
    for epoch in (1, 2):
        for item in range(28):
            assert one.seed(epoch, item) == two.seed(epoch, item)
            assert np.allclose(one.target(epoch, item), two.target(epoch, item), atol=2e-3)


def test_finished_files_are_kept_and_missing_ones_made_alike(tone_pack, pack, teacher, tmp_path):
    teaching(config(tone_pack), pack, teacher, tmp_path).save()
    before = arrays(tmp_path, 2)
    kept = (tmp_path / "logits_ep1_0.h5").stat().st_mtime_ns
    (tmp_path / "logits_ep2_0.h5").unlink()
    teaching(config(tone_pack), pack, teacher, tmp_path).save()
    assert (tmp_path / "logits_ep1_0.h5").stat().st_mtime_ns == kept
    after = arrays(tmp_path, 2)
    assert all(np.array_equal(before[k], after[k]) for k in before)


def test_a_finished_store_is_read_only_for_the_same_command(tone_pack, pack, teacher, tmp_path, monkeypatch):
    teaching(config(tone_pack), pack, teacher, tmp_path).save()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(locks, "open", refuse, raising=False)
    monkeypatch.setattr(os, "replace", refuse)
    assert teaching(config(tone_pack), pack, teacher, tmp_path).save() == tmp_path
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_more_epochs_can_be_added_but_other_settings_not_mixed_in(tone_pack, pack, teacher, other_teacher, tmp_path):
    teaching(config(tone_pack), pack, teacher, tmp_path).save()
    teaching(config(tone_pack, epochs=3), pack, teacher, tmp_path).save()
    assert SoftTargetStore(tmp_path).epochs == [1, 2, 3]
    for asked, changes, what in (
        (teacher, {"seed": 1}, "seed"),
        (teacher, {"chunk_length": 5.0}, "chunk_length"),
        (other_teacher, {}, "teacher"),
        (teacher, {"spectransforms": []}, "spectransforms"),
        (teacher, {"mode": "amp_bf16"}, "mode"),
    ):
        with pytest.raises(UserError, match=f"made with another {what}"):
            teaching(config(tone_pack, **changes), pack, asked, tmp_path)


def test_an_ensemble_averages_probabilities_over_front_ends_and_rates(
    tone_pack, pack, teacher, other_teacher, tmp_path
):
    both = Ensemble([*teacher.taggers, *other_teacher.taggers])
    for name, asked in (("a", teacher), ("b", other_teacher), ("ab", both)):
        teaching(config(tone_pack, topk=7, epochs=1), pack, asked, tmp_path / name).save()
    dense = {n: StoredTargets(SoftTargetStore(tmp_path / n), pack, 7, "zero") for n in ("a", "b", "ab")}
    for item in range(28):
        a, b, ab = (dense[n].target(1, item) for n in ("a", "b", "ab"))
        assert np.allclose(ab, (a + b) / 2, atol=1e-3)
        assert np.abs(a - b).max() > 1e-3


def test_a_chunks_targets_do_not_depend_on_its_batch(tone_pack, pack, other_teacher, tmp_path):
    for size in (1, 8):
        teaching(config(tone_pack, batch_size=size, epochs=1), pack, other_teacher, tmp_path / str(size)).save()
    one, eight = arrays(tmp_path / "1"), arrays(tmp_path / "8")
    assert np.allclose(one["topk_values"], eight["topk_values"], atol=1e-3)


def test_topk_above_the_number_of_classes_stores_them_all(tone_pack, pack, teacher, tmp_path):
    teaching(config(tone_pack, topk=20, epochs=1), pack, teacher, tmp_path).save()
    assert arrays(tmp_path)["topk_values"].shape == (28, 7)


def test_a_teacher_that_outputs_nan_stops_with_the_clips_name(tone_pack, pack, tmp_path):
    broken = create_model("audiotransformer_pico", num_classes=7)
    torch.nn.init.constant_(broken.outputlayer[1].bias, float("nan"))
    with pytest.raises(UserError, match=r"sounds/tone_.*is not finite"):
        teaching(config(tone_pack, epochs=1), pack, Ensemble([broken]), tmp_path).save()
    assert not list(tmp_path.glob("*.h5"))


def test_probabilities_are_never_squashed_twice(teacher):
    logits = create_model("audiotransformer_pico", num_classes=7, pooling="logit")
    logits.load_state_dict(teacher.members[0].state_dict())
    batch = make_batch(waveforms={16000: torch.randn(2, 16000)})
    answers = [asked.probabilities(batch, Replay().spectrogram) for asked in (teacher, Ensemble([logits]))]
    assert torch.allclose(*answers, atol=1e-6)


def test_a_second_process_waits_and_saves_nothing_twice(tone_pack, pack, teacher, tmp_path, caplog):
    """A process that is at work on the parts of this one: they are awaited, and what it has written is not redone."""
    caplog.set_level("INFO")
    second = teaching(config(tone_pack), pack, teacher, tmp_path)
    context, at_work = multiprocessing.get_context("fork"), multiprocessing.Event()

    def write_first() -> None:
        torch.set_num_threads(1)
        with lock_shares(tmp_path, [0], "soft targets"):
            at_work.set()
            teaching(config(tone_pack), pack, teacher, tmp_path)._save()

    first = context.Process(target=write_first)
    first.start()
    assert at_work.wait(60)
    second.save()
    first.join(60)
    assert first.exitcode == 0
    assert "another process is at work on the soft targets" in caplog.text
    assert "2 of 2 files exist already" in caplog.text
    assert not (tmp_path / ".shares.lock").exists()
