"""Traps of the published training code: wrong epochs, divisions by zero, drifting steps, files half written."""

import random

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.data import DataLoader

from audio.cutting import Chunks
from audio.dataset import Pack
from common.errors import Faults
from distill.dataset import EpochBatches, ReplayDataset, collate
from distill.objectives import plan_objective
from distill.replay import Replay
from distill.sources import SeededItems
from distill.targets import SoftTargetStore, StoredTargets, rebuild_target
from models import Ensemble, create_model
from tests.distill.stores import write_epoch
from tests.distill.test_targets import pack_of, store_of
from training.config import SoftTargetConfig, TrainConfig
from training.loss_module import LossModule
from training.optim import create_optimizer
from training.precision import Precision
from training.settings import read_config
from training.store_writer import SoftTargetContent, StoreWriter
from training.trainer import Trainer

CPU = torch.device("cpu")


def test_every_stored_epoch_is_used_in_order_and_wraps(tmp_path):
    names = ["clip_0.wav"]
    folder = store_of(tmp_path / "store", [[names]] * 3)
    targets = StoredTargets(SoftTargetStore(folder), pack_of(tmp_path / "pack", names), 4, "zero")
    assert [targets.seed(epoch, 0) for epoch in range(1, 8)] == [1000, 2000, 3000, 1000, 2000, 3000, 1000]


@pytest.mark.parametrize("n_workers", [0, 1, 2])
def test_the_stored_epoch_is_right_with_workers_that_outlive_an_epoch(tmp_path, n_workers):
    names = [f"clip_{k}.wav" for k in range(6)]
    folder = store_of(tmp_path / "store", [[names]] * 3)
    pack = pack_of(tmp_path / "pack", names)
    dataset = ReplayDataset(pack, StoredTargets(SoftTargetStore(folder), pack, 4, "zero"), [16000])
    loader = DataLoader(
        dataset, batch_sampler=EpochBatches(np.arange(6), 4, 0), num_workers=n_workers, collate_fn=collate
    )
    stream = iter(loader)
    for epoch in (1, 2, 3, 1):
        batches = [next(stream), next(stream)]
        items, values = (torch.cat([getattr(b, name) for b in batches]) for name in ("item", "target"))
        assert sorted(items.tolist()) == list(range(6))
        assert torch.allclose(values[:, 3], 0.1 * epoch + items / 100, atol=1e-3)


@pytest.mark.parametrize("label_type", ["last_mean", "last_half", "last_random", "527", "zero"])
def test_storing_every_class_is_no_division_by_zero(label_type):
    values = np.array([0.8, 0.4, 0.2], np.float16)
    target = rebuild_target(values, np.array([0, 1, 2]), 3, label_type)
    assert np.array_equal(target, values.astype(np.float32))


def test_a_misspelt_label_type_is_reported_before_training(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("train_data: a.tsv\nmodel: m\nlabel_type: last_men\n")
    faults = Faults("c.yaml")
    read_config(TrainConfig, path, {}, faults)
    assert "did you mean 'last_mean'?" in faults.sentences[0]


def test_seeding_takes_stored_integers_and_leaves_every_random_state_alone():
    random.seed(1)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002
    Replay({"Shift": {}}, [{"TimeMasking": {}}]).draw(np.int32(1017516298), 80016)
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())  # noqa: NPY002


def test_more_workers_and_larger_batches_than_there_are_clips_store_every_chunk(tone_pack, tmp_path):
    config = SoftTargetConfig(
        train_data=str(tone_pack), model="audiotransformer_pico", epochs=1, num_workers=8, batch_size=128, device="cpu"
    )
    teacher = Ensemble([create_model("audiotransformer_pico", num_classes=50)])
    StoreWriter(config, Pack.open(tone_pack), SoftTargetContent(teacher, config.topk), tmp_path).save()
    with h5py.File(tmp_path / "logits_ep1_0.h5") as file:
        assert file["topk_values"].shape == (28, 20)
        assert (file["topk_values"][()].max(axis=1) > 0).all()


def test_an_interrupted_writer_leaves_no_finished_file(tmp_path, monkeypatch):
    monkeypatch.setattr(h5py.File, "create_dataset", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_epoch(tmp_path, 1, 0, pd.DataFrame({"filename": ["a"]}), np.ones((1, 1)), np.zeros((1, 1)), np.array([1]))
    assert not list(tmp_path.glob("*.h5"))
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("mode", ["noamp", "amp", "amp_bf16"])
@pytest.mark.parametrize("consistent", [True, False])
@pytest.mark.parametrize("mixup", [None, 0.5])
def test_one_step_serves_every_mode(tone_pack, mode, consistent, mixup):
    """The published code had three copies of its step; inconsistent masks worked in one of them, mixup in two."""
    torch.manual_seed(0)
    replay = Replay({}, [{"TimeMasking": {"time_mask_param": 20}}])
    source = SeededItems(Chunks.whole(np.full(4, 16000), 16000), replay, seed=3)
    source.target = lambda epoch, item: np.eye(7, dtype=np.float32)[item]
    dataset = ReplayDataset(Pack.open(tone_pack), source, [16000], consistent=consistent, mixup=mixup)
    plan = plan_objective("target", loss="BCEWithLogitsLoss", loss_args={"reduction": "none"})
    model = create_model("audiotransformer_pico", num_classes=7, pooling="logit").train()
    optimizer = create_optimizer("AdamW", model.parameters(), {"lr": 1e-3}, CPU)
    losses = LossModule(model, plan.build(model), plan.needs, replay, "spectrogram" if mixup else None)
    trainer = Trainer(losses, optimizer, None, Precision(mode, CPU), seed=0, total_steps=12)
    batch = collate([dataset[(1, i)] for i in range(4)]).to(CPU)
    losses = [trainer.step([batch], [1.0], step)["loss"].item() for step in range(12)]
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]
