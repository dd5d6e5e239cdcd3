"""`layout: published`: a reader that follows the published rules, written out slowly, finds in it what ours does."""

import json
import random
import re
import sys
import types
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pyarrow.parquet
import pytest
import torch

from audio.dataset import Pack
from common.errors import Faults, UserError
from distill.dataset import ReplayDataset
from distill.published_layout import check_published, dump, write_published_meta
from distill.published_meta import read_published_meta
from distill.replay import Replay
from distill.targets import SoftTargetStore, StoredTargets
from models import Ensemble, create_model
from tests.conftest import run_command
from training.config import SoftTargetConfig
from training.store_writer import SoftTargetContent, StoreWriter

# --- What the published code brings along: its modules, by the published names ---


class Shift(torch.nn.Module):
    """Circular shift of a share of the clips by a random fraction; attributes as torch_audiomentations has them."""

    def forward(self, samples):
        n = samples.shape[-1]
        if not self.bernoulli_distribution.sample((1,)).bool().item():
            return samples
        assert (self.shift_unit, self.rollover, self.mode, self.p_mode) == (
            "fraction",
            True,
            "per_example",
            "per_example",
        )
        low, high = round(self.min_shift * n), round(self.max_shift * n)
        return torch.roll(samples, int(torch.randint(low, high + 1, (1,), dtype=torch.int32)), dims=-1)


class Masking(torch.nn.Module):
    """One stretch at 0 dB, whose width and place two numbers say."""

    def forward(self, mel, values, min_values):
        size = mel.shape[self.axis]
        start = (min_values * (size - values * self.mask_param)).long()
        stop = start + (values * self.mask_param).long()
        mel = mel.clone()
        mel.transpose(0, self.axis)[start:stop] = 0.0
        return mel


class TimeMasking(Masking):
    pass


class FrequencyMasking(Masking):
    pass


class KwargsSequential(torch.nn.Sequential):
    def forward(self, x, **arguments):
        for module in self:
            x = module(x, **arguments)
        return x


class Config:
    pass


@pytest.fixture
def published_modules(monkeypatch):
    for name, kinds in {
        "torch_audiomentations": [],
        "torch_audiomentations.augmentations": [],
        "torch_audiomentations.augmentations.shift": [Shift],
        "augment": [TimeMasking, FrequencyMasking],
        "utils": [KwargsSequential, Config],
    }.items():
        module = types.ModuleType(name)
        for kind in kinds:
            setattr(module, kind.__name__, kind)
        monkeypatch.setitem(sys.modules, name, module)


class PublishedReader:
    """The published rules: clips by base name, epochs counted by file names, rows by their place in a file."""

    def __init__(self, manifest: Path, folder: Path, epoch: int) -> None:
        table = pd.read_csv(manifest, sep="\t")
        self.shard_of = {Path(row.filename).name: row.hdf5path for row in table.itertuples()}
        self.meta = torch.load(folder / "meta.pt", weights_only=False)
        self.rows = []
        for path in folder.glob(f"*ep{epoch}_*h5"):
            names = pd.read_parquet(str(path).replace(".h5", ".parquet"))
            assert list(names.columns) == ["filename", "start", "end"]
            assert (names.dtypes.iloc[1:] == np.float32).all()
            self.rows += [(path, place, row) for place, row in enumerate(names.itertuples(index=False))]
        found = [re.search(r"ep(\d+)", path.stem) for path in folder.glob("*ep*parquet")]
        self.max_epochs = max(int(match[1]) for match in found if match)

    def __getitem__(self, number: int):
        path, place, row = self.rows[number]
        with h5py.File(self.shard_of[row.filename]) as shard:
            samples = shard[row.filename][round(row.start * 16000) : round(row.end * 16000)]
        assert samples.dtype == np.int16
        with h5py.File(path) as file:
            values, indexes, seed = (file[key][place] for key in ("topk_values", "topk_indexes", "seeds"))
        assert (values.dtype, indexes.dtype, seed.dtype) == (np.float16, np.int16, np.int32)
        torch.manual_seed(int(seed))
        sound = torch.from_numpy((samples / 32768.0).astype(np.float32))
        shifted = self.meta["wavtransforms"](sound.view(1, 1, -1)).view(-1)
        value, min_value = torch.rand(1), torch.rand(1)
        target = torch.zeros(7).scatter_(
            0, torch.from_numpy(indexes.astype(np.int64)), torch.from_numpy(values).float()
        )
        return row.filename, row.start, shifted, value, min_value, target


@pytest.fixture(scope="module")
def published(tmp_path_factory, tone_pack):
    """A pack and a store of two processes and two epochs in the published layout; chunks of 0.4 s, tails of 0.2 s."""
    folder = tmp_path_factory.mktemp("published")
    listed = tone_pack.parent.parent.parent / "tones.tsv"
    packed = run_command("scripts/wavlist_to_hdf5.py", listed, folder / "pack", "--layout", "published", "-n", "0")
    assert packed.returncode == 0, packed.stderr
    pack = Pack.open(folder / "pack/labels/tones.tsv")
    torch.manual_seed(0)
    teacher = Ensemble([create_model("audiotransformer_pico", num_classes=7)])
    settings = {"epochs": 2, "batch_size": 8, "num_workers": 0, "topk": 5, "device": "cpu", "chunk_length": 0.4}
    config = SoftTargetConfig(train_data=str(pack.manifest), model="x", layout="published", **settings)
    for rank in (1, 0):
        StoreWriter(config, pack, SoftTargetContent(teacher, config.topk), folder / "store", rank, 2).save()
    return folder


def test_a_pack_is_one_int16_dataset_a_clip_under_its_base_name(published):
    table = pd.read_csv(published / "pack/labels/tones.tsv", sep="\t")
    assert table["filename"].str.startswith("sounds/").all()
    with h5py.File(published / "pack/hdf5/tones_0.h5") as file:
        assert sorted(file) == sorted(Path(name).name for name in table["filename"])
        assert {(file[name].dtype, file[name].shape) for name in file} == {(np.dtype(np.int16), (16000,))}


def test_the_published_rules_find_what_our_reader_does(published, published_modules):
    pack = Pack.open(published / "pack/labels/tones.tsv")
    for read_as in ("ours", "published"):
        if read_as == "published":
            (published / "store/meta.json").rename(published / "meta.json")  # nothing but what CED writes is left
        ours = StoredTargets(SoftTargetStore(published / "store"), pack, 7, "zero")
        dataset = ReplayDataset(pack, ours, [16000])
        items = {
            (Path(pack.names[clip]).name, round(start / 16000, 3)): item
            for item, (clip, start, _) in enumerate(ours.chunks)
        }
        n_shifted = 0
        for epoch in (1, 2):
            reader = PublishedReader(pack.manifest, published / "store", epoch)
            assert reader.max_epochs == 2
            assert len(reader.rows) == len(items) == 28 * 3
            for number in range(0, 84, 5):
                name, start, sound, value, min_value, target = reader[number]
                shown = dataset[(epoch, items[name, round(float(start), 3)])]
                assert torch.equal(sound, shown["waveforms"][16000])
                assert (float(value), float(min_value)) == pytest.approx((shown["value"], shown["min_value"]), abs=0)
                assert torch.equal(target, shown["target"])
                clip, first, stop = ours.chunks[items[name, round(float(start), 3)]]
                n_shifted += not np.array_equal(sound.numpy(), pack.read(clip, first, stop))
        assert 5 < n_shifted < 29  # of 34: half of them
    (published / "meta.json").rename(published / "store/meta.json")


def test_files_have_the_columns_and_types_that_ced_publishes(published, shared):
    ours, theirs = published / "store", shared / "fixtures/published_logits_layout/chunk_10"
    assert sorted(path.name for path in ours.iterdir()) == [
        *(f"logits_ep{epoch}_{rank}.{kind}" for epoch in (1, 2) for rank in (0, 1) for kind in ("h5", "parquet")),
        *("meta.json", "meta.pt"),
    ]
    schemas = [pyarrow.parquet.read_schema(folder / "logits_ep1_0.parquet") for folder in (ours, theirs)]
    assert schemas[0].names == schemas[1].names == ["filename", "start", "end"]
    assert [str(kind) for kind in schemas[0].types][1:] == [str(kind) for kind in schemas[1].types][1:]
    codec = pyarrow.parquet.ParquetFile(ours / "logits_ep1_0.parquet").metadata.row_group(0).column(0).compression
    assert codec == "BROTLI"
    kinds = []
    for folder in (ours, theirs):
        with h5py.File(folder / "logits_ep1_0.h5") as file:
            kinds.append({name: (file[name].dtype, file[name].ndim) for name in file})
    assert kinds[0] == kinds[1]


def test_meta_pt_masks_as_the_published_modules_do(published, published_modules):
    meta = torch.load(published / "store/meta.pt", weights_only=False)
    assert sorted(meta) == ["config", "spectransforms", "wavtransforms"]
    assert type(meta["wavtransforms"]) is torch.nn.Sequential
    masked = meta["spectransforms"](torch.ones(1, 64, 101), values=torch.tensor([0.5]), min_values=torch.tensor([0.25]))
    time, bands = masked[0].amax(dim=0) == 0, masked[0].amax(dim=1) == 0
    assert bands.nonzero().flatten().tolist() == list(range(13, 25))  # (64 - 12) / 4, half of 24 wide
    assert time.nonzero().flatten().tolist() == list(range(1, 97))  # (101 - 96) / 4, half of 192 wide
    assert meta["config"].topk == 5
    assert meta["config"].chunk_length == 0.4
    assert meta["wavtransforms"].train(False)[0].training is False  # a module that works as one


def test_meta_pt_holds_the_objects_and_attributes_of_the_published_one(published, shared, published_modules):
    ours, theirs = (
        torch.load(folder / "meta.pt", weights_only=False)
        for folder in (published / "store", shared / "fixtures/published_logits_layout/chunk_10")
    )
    for key in ("wavtransforms", "spectransforms"):
        assert type(ours[key]) is type(theirs[key])
        assert [type(module) for module in ours[key]] == [type(module) for module in theirs[key]]
        for one, other in zip(ours[key], theirs[key], strict=True):
            assert set(vars(other)) <= set(vars(one))
            plain = [key for key, value in vars(other).items() if isinstance(value, int | float | str | bool)]
            assert len(plain) >= 5
            assert {key: vars(one)[key] for key in plain} == {key: vars(other)[key] for key in plain}
    assert torch.equal(*(meta["wavtransforms"][0].bernoulli_distribution.probs for meta in (ours, theirs)))
    assert set(vars(ours["config"])) >= set(vars(theirs["config"])) - {"chunk_size"}


def test_meta_pt_needs_none_of_these_packages_to_be_written_or_read_here(published):
    assert not {"torch_audiomentations", "augment", "utils"} & set(sys.modules)
    meta = read_published_meta(published / "store/meta.pt")
    ours = json.loads((published / "store/meta.json").read_text())
    assert meta["wavtransforms"] == {"Shift": {"min_shift": -0.5, "max_shift": 0.5, "p": 0.5}}
    assert meta["spectransforms"] == ours["spectransforms"]
    assert {key: ours["config"][key] for key in meta["config"]} == meta["config"]


def test_other_settings_travel_too(tmp_path, published_modules):
    config = SoftTargetConfig(
        train_data="é.tsv", model=["ced_tiny", "mn04_as"], epochs=100_000, mode="amp"
    ).model_dump()
    replay = Replay({"Shift": {"min_shift": -0.1, "max_shift": 0.3, "p": 0.25}}, [{"FrequencyMasking": None}])
    write_published_meta(tmp_path / "meta.pt", replay, config)
    meta = read_published_meta(tmp_path / "meta.pt")
    assert meta["wavtransforms"] == {"Shift": {"min_shift": -0.1, "max_shift": 0.3, "p": 0.25}}
    assert meta["spectransforms"] == [{"FrequencyMasking": {"freq_mask_param": 24}}]
    assert (meta["config"]["model"], meta["config"]["epochs"]) == (["ced_tiny", "mn04_as"], 100_000)
    loaded = torch.load(tmp_path / "meta.pt", weights_only=False)
    assert loaded["wavtransforms"][0].bernoulli_distribution.probs.item() == 0.25
    write_published_meta(tmp_path / "none.pt", Replay(), config)
    assert len(torch.load(tmp_path / "none.pt", weights_only=False)["wavtransforms"]) == 0


def test_pickles_hold_what_they_were_given():
    import pickle

    random.seed(0)
    value = {
        "numbers": [0, 1, -1, 255, 256, -(2**31), 2**40, *(random.randint(-(2**63), 2**63) for _ in range(20))],
        "floats": [0.0, -0.5, 1e300, float("inf")],
        "nested": ({"é": [None, True, False]}, (), [], {}, {"a", "b"}),
    }
    assert pickle.loads(dump(value)) == value
    with pytest.raises(TypeError, match="bytes cannot be pickled"):
        dump([b"x"])


def test_what_the_published_layout_cannot_hold_is_reported_together(tmp_path):
    from tests.distill.test_targets import pack_of

    pack = pack_of(tmp_path, ["a/x_1.wav", "b/x_1.wav", "y_2.wav"], sample_rate=8000)
    faults = Faults("the configuration")
    check_published(Replay({}, [{"TimeMasking": {"max_share": 0.5}}], "mean"), pack, faults)
    text = " ".join(faults.sentences)
    assert len(faults.sentences) == 4
    for part in ("8000 Hz", "1 base names", "(x_1.wav)", "mask_fill mean", "max_share"):
        assert part in text
    config = SoftTargetConfig(train_data="x.tsv", model="x", targets="embeddings", layout="published")
    assert [sentence for sentence in config.conflicts() if "layout: published is for probabilities" in sentence]


def test_packing_refuses_base_names_that_clips_share_and_another_rate(tmp_path, tone_pack):
    listed = tone_pack.parent.parent.parent / "tones.tsv"
    (tmp_path / "list.tsv").write_text("filename\na/1.wav\nb/2.wav\nb/1.wav\n")
    words = ("scripts/wavlist_to_hdf5.py", tmp_path / "list.tsv", tmp_path / "out", "--layout", "published")
    done = run_command(*words)
    assert done.returncode == 1
    assert "several share: a/1.wav and b/1.wav; rename these files, or choose --layout clips" in done.stderr
    done = run_command("scripts/wavlist_to_hdf5.py", listed, tmp_path / "o", *words[3:], "--sample_rate", "32000")
    assert "assume 16000 Hz; found --sample_rate 32000" in done.stderr
    done = run_command("scripts/wavlist_to_hdf5.py", listed, tmp_path / "o", *words[3:], "--fullname", "-n", "0")
    assert done.returncode == 0
    with h5py.File(tmp_path / "o/hdf5/tones_0.h5") as file:
        assert list(file) == ["sounds"]
        assert len(file["sounds"]) == 28


def test_a_folder_in_one_layout_is_not_continued_in_the_other(published):
    pack = Pack.open(published / "pack/labels/tones.tsv")
    teacher = Ensemble([create_model("audiotransformer_pico", num_classes=7)])
    config = SoftTargetConfig(
        train_data=str(pack.manifest), model="x", epochs=2, topk=5, chunk_length=0.4, device="cpu"
    )
    with pytest.raises(UserError, match="layout"):
        StoreWriter(config, pack, SoftTargetContent(teacher, 5), published / "store", 0, 2)
