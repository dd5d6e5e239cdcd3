"""A batch holds what its items hold, and moves as a whole."""

from collections.abc import Iterator
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from audio.cutting import Chunks
from audio.dataset import Pack
from distill.batch import Batch
from distill.dataset import EpochBatches, ReplayDataset, collate
from distill.replay import Replay
from distill.sources import LabelTargets
from tests.batches import make_batch

RATES = (16000, 8000)


@pytest.fixture
def dataset(tone_pack) -> ReplayDataset:
    """Ten items of six lengths, with all that may come beside the targets."""
    pack = Pack.open(tone_pack)
    chunks = Chunks.whole(16000 - 500 * (np.arange(10) % 6), 16000)
    labels = LabelTargets(chunks, [np.array([i % 3]) for i in range(10)], 3, Replay({"Shift": {}}), seed=3)
    return ReplayDataset(pack, labels, RATES, labels=labels, clusters=np.arange(10) + 70, mixup=0.5, hash_sounds=True)


def loader(dataset: ReplayDataset, **more) -> DataLoader:
    batches = EpochBatches(np.arange(10), 4, seed=1, cut_passes=False)
    return DataLoader(dataset, batch_sampler=batches, collate_fn=collate, **more)


def tensors(batch: Batch) -> Iterator[Tensor]:
    for field in fields(batch):
        value = getattr(batch, field.name)
        yield from (value.values() if isinstance(value, dict) else [] if value is None else [value])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_rows_are_the_items_as_their_epoch_shows_them_also_where_a_pass_ends(dataset, num_workers):
    seen = []
    for batch, _ in zip(loader(dataset, num_workers=num_workers), range(5), strict=False):
        assert len(batch) == 4
        for row, key in enumerate(zip(batch.epoch.tolist(), batch.item.tolist(), strict=True)):
            item = dataset[key]
            for rate in RATES:
                n = len(item["waveforms"][rate])
                assert batch.lengths[rate][row] == n
                assert torch.equal(batch.waveforms[rate][row, :n], item["waveforms"][rate])
                assert not batch.waveforms[rate][row, n:].any()
            for name in ("value", "min_value", "mixup_weight"):
                assert getattr(batch, name)[row] == np.float32(item[name])
            for name in ("n_reference", "cluster", "sound_hash"):
                assert getattr(batch, name)[row] == item[name]
            assert torch.equal(batch.target[row], item["target"])
            assert torch.equal(batch.labels[row], item["labels"])
            seen.append(key)
    assert [epoch for epoch, _ in seen] == [1] * 10 + [2] * 10  # the third batch holds both
    assert sorted(seen) == [(epoch, item) for epoch in (1, 2) for item in range(10)]
    assert batch.n_frames is batch.teacher is None
    assert not batch.mel.numel()


def test_types_are_those_that_are_promised(dataset):
    batch = collate([dataset[1, item] for item in range(3)])
    for name in ("item", "epoch", "n_reference", "cluster", "sound_hash"):
        assert (getattr(batch, name).dtype, getattr(batch, name).shape) == (torch.int64, (3,))
    for name in ("value", "min_value", "mixup_weight"):
        assert (getattr(batch, name).dtype, getattr(batch, name).shape) == (torch.float32, (3,))
    assert {x.dtype for x in (batch.target, batch.labels, *batch.waveforms.values())} == {torch.float32}
    assert batch.lengths[8000].dtype == torch.int64


def test_a_move_takes_every_tensor_along(dataset):
    batch = replace(collate([dataset[1, item] for item in range(3)]), mel=torch.zeros(3, 64, 9), n_frames=torch.ones(3))
    moved = batch.to(torch.device("meta"))
    assert len(list(tensors(moved))) == len(list(tensors(batch))) == 16
    assert all(tensor.is_meta for tensor in tensors(moved))
    assert not any(tensor.is_meta for tensor in tensors(batch))


def test_lengths_are_dropped_where_nothing_is_padded():
    waveforms, cpu = {16000: torch.zeros(2, 6), 8000: torch.zeros(2, 3)}, torch.device("cpu")
    lengths = {16000: torch.tensor([6, 5]), 8000: torch.tensor([3, 3])}
    moved = make_batch(waveforms=waveforms, lengths=lengths).to(cpu)
    assert moved.lengths[8000] is None
    assert moved.lengths[16000].tolist() == [6, 5]
    again = moved.to(cpu)
    assert again.lengths[8000] is None
    assert again.lengths[16000].tolist() == [6, 5]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="memory is pinned for a GPU")
def test_a_loader_pins_every_tensor(dataset):
    batch = next(iter(loader(dataset, pin_memory=True)))
    assert isinstance(batch, Batch)
    for pinned in (batch, next(iter(loader(dataset))).pin_memory()):
        assert all(tensor.is_pinned() for tensor in tensors(pinned) if len(tensor))  # empty ones never are


def test_processes_that_train_together_are_given_the_batch_as_it_is(tmp_path):
    """DistributedDataParallel moves the tensors of known containers; a batch, which is on its device, it leaves."""

    class Keeps(nn.Linear):
        def forward(self, batch):
            self.kept = batch
            return {"loss": super().forward(batch.target).mean()}

    batch, model = make_batch(target=torch.randn(3, 2)), Keeps(2, 1)
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/ranks", rank=0, world_size=1)
    try:
        DistributedDataParallel(model)(batch)["loss"].backward()
    finally:
        distributed.destroy_process_group()
    assert model.kept is batch
    assert torch.allclose(model.weight.grad, batch.target.mean(0))
