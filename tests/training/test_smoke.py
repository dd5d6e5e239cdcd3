"""`--smoke true`: what is shortened, what replaces missing data, what stays as it is."""

import json
import logging
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from audio.dataset import Pack
from common.errors import Faults, UserError
from distill.targets import SoftTargetStore, StoredTargets
from models import Ensemble, create_model, save_checkpoint
from models.labels import audioset_labels
from training.config import SoftTargetConfig, TrainConfig
from training.data import open_training
from training.needs import plan_run
from training.prepare import prepare_run
from training.smoke import smoke
from training.store_writer import SoftTargetContent, StoreWriter
from training.teacher import load_teacher

# What a smoke run may change; everything else is what is being tried.
CHANGED = {
    *("train_data", "valid_data", "eval_data", "logitspath", "labels_csv", "valid_fraction", "pretrained", "device"),
    *("teacher", "teacher_weights"),
    *("epochs", "epoch_length", "batch_size", "eval_batch_size", "accumulate", "num_workers", "warmup_iters"),
    *("warmup_epochs", "max_aug_epochs", "valid_every", "n_saved", "checkpoint_every", "log_every", "compile"),
    "baseline",
}


def settings(**changes):
    return TrainConfig(
        **{
            "train_data": "data/x.tsv",
            "eval_data": "data/eval.tsv",
            "model": "audiotransformer_pico",
            "model_args": {"pooling": "logit"},
            "loss": "BCEWithLogitsLoss",
        }
        | changes
    )


def opened(config, teacher_labels=None):
    faults = Faults("the test")
    data = open_training(config, 1, faults, plan_run(config, faults).needs, teacher_labels)
    faults.raise_if_any()
    assert data is not None
    return data


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # relative paths of these tests lead nowhere


@pytest.fixture
def store(tone_pack, tmp_path):
    """Soft targets of an untrained teacher for the 28 tones in 7 classes, in three epochs."""
    config = SoftTargetConfig(
        train_data=str(tone_pack), model="audiotransformer_pico", epochs=3, topk=3, num_workers=0, device="cpu"
    )
    teacher = create_model("audiotransformer_pico", labels=[f"tone {i}" for i in range(7)], num_classes=7, depth=1)
    return StoreWriter(
        config, Pack.open(tone_pack), SoftTargetContent(Ensemble([teacher]), config.topk), tmp_path / "store"
    ).save()


def test_objective_and_model_stay_and_only_its_amount_shrinks(tmp_path):
    config = settings(
        mixup=0.4, mixup_on="waveform", ema=0.9, layer_decay=0.8, freeze=["blocks.0.*"], grad_clip=1.0,
        sampler="balanced", schedule="linear", optimizer="AdamW", mode="amp", average=False, label_smoothing=0.1,
        smoke=True, compile=True,
        accumulate=8, checkpoint_every=500, batch_size=64, warmup_iters=900, n_saved=9, valid_every=7, early_stop=3,
        pretrained=False,
    )  # fmt: skip
    short = smoke(config, tmp_path / "smoke")
    before, after = config.model_dump(), short.model_dump()
    assert {key for key in before if before[key] != after[key]} <= CHANGED
    assert (short.epochs, short.epoch_length, short.valid_every, short.n_saved) == (2, 2, 1, 2)
    assert (short.batch_size, short.eval_batch_size, short.accumulate, short.num_workers) == (4, 4, 2, 1)
    assert (short.warmup_iters, short.warmup_epochs, short.checkpoint_every) == (1, None, 2)
    assert (short.device, short.compile, short.max_aug_epochs) == ("cpu", False, 2)
    assert TrainConfig(**after) == short
    small = smoke(settings(batch_size=2, eval_batch_size=1, num_workers=0, n_saved=1, warmup_epochs=3), tmp_path / "s")
    assert (small.batch_size, small.eval_batch_size, small.num_workers, small.n_saved) == (2, 1, 0, 1)
    assert small.warmup_epochs == 1


def test_made_up_sounds_with_ten_named_classes_are_generated_by_default(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    data = opened(smoke(settings(valid_data="data/valid.tsv"), tmp_path / "smoke"))
    assert data.labels == [f"sound {i}" for i in range(10)]
    assert len(data.pack) == len(data.valid.pack) == len(data.evaluation.pack) == 16
    assert (data.pack.sample_rate, set(data.pack.n_samples)) == (16000, {32000})
    assert np.array_equal(data.source.target(1, 11), np.eye(10)[1])
    assert [int(i[0]) for i in data.evaluation.labels] == [*range(10), *range(6)]
    sounds = np.stack([pack.read(3) for pack in (data.pack, data.valid.pack, data.evaluation.pack)])
    assert 0.2 < np.abs(sounds).max() < 1
    assert len({sound.tobytes() for sound in sounds}) == 3
    assert "not found: data/x.tsv, data/valid.tsv, data/eval.tsv; generated sounds replace all data" in caplog.text


@pytest.mark.parametrize(
    ("changes", "labels"),
    [
        ({}, audioset_labels()),
        ({"num_classes": 3}, ["0", "1", "2"]),
        ({"labels_csv": "names.csv"}, ["a", "b, c"]),
        ({"labels_csv": "gone.csv"}, audioset_labels()),
    ],
    ids=["nothing said", "num_classes", "labels_csv", "labels_csv that is not there"],
)
def test_made_up_targets_are_over_the_classes_that_are_requested(tmp_path, changes, labels, caplog):
    Path("names.csv").write_text('index,mid,display_name\n0,"","a"\n1,"","b, c"\n')
    short = smoke(settings(logitspath="logits/gone", **changes), tmp_path / "smoke")
    store = SoftTargetStore(short.logitspath)
    assert (store.epochs, store.labels, store.num_classes) == ([1, 2], labels, len(labels))
    assert store.meta["config"]["topk"] == 5
    data = opened(short)
    assert data.labels == labels
    assert isinstance(data.source, StoredTargets)
    assert (len(data.source.chunks), data.source.n_unmatched, data.source.n_misfits) == (16, 0, 0)
    targets = np.stack([data.source.target(epoch, item) for epoch in (1, 2) for item in range(16)])
    assert targets.shape == (32, len(labels))
    assert ((targets > 0).sum(axis=1) == min(5, len(labels))).all()
    assert len({data.source.seed(epoch, 3) for epoch in (1, 2)}) == 2
    assert "logits/gone" in caplog.text
    assert ("gone.csv" in caplog.text) == ("gone.csv" in changes.values())


def test_real_data_are_used_and_evaluated_on_sixteen_clips(tone_pack, store, tmp_path, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    config = settings(
        train_data=str(tone_pack), eval_data=str(tone_pack), valid_data=str(tone_pack), logitspath=str(store)
    )
    short = smoke(config, tmp_path / "smoke")
    assert (short.train_data, short.logitspath) == (config.train_data, config.logitspath)
    assert short.eval_data == short.valid_data != config.eval_data
    monkeypatch.chdir("/")
    data = opened(short)
    names = Pack.open(tone_pack).names
    assert (len(data.pack), len(data.evaluation.pack), data.source.epochs) == (28, 16, [1, 2])
    assert (data.evaluation.pack.names[0], data.evaluation.pack.names[-1]) == (names[0], names[-1])
    where = [names.index(name) for name in data.evaluation.pack.names]
    assert max(np.diff(where)) == 2
    assert [int(i[0]) for i in data.evaluation.labels] == [clip % 7 for clip in where]
    assert np.array_equal(data.evaluation.pack.read(5), data.pack.read(where[5]))
    assert "16 of the 28 clips" in caplog.text
    assert "generated" not in caplog.text


def test_a_short_list_is_left_as_it_is_and_a_cut_one_finds_shards_named_relative_to_it(tone_pack, tmp_path):
    table = pd.read_csv(tone_pack, sep="\t", dtype=str)
    few, many = tmp_path / "few.tsv", tmp_path / "pack" / "labels" / "many.tsv"
    table[:16].to_csv(few, sep="\t", index=False)
    (tmp_path / "pack" / "hdf5").mkdir(parents=True)
    many.parent.mkdir()
    shard = Path(table["hdf5path"][0])
    (tmp_path / "pack" / "hdf5" / shard.name).symlink_to(shard)
    table.assign(hdf5path=f"once/elsewhere/{shard.name}").to_csv(many, sep="\t", index=False)
    config = settings(train_data=str(tone_pack), valid_data=str(few), eval_data=str(many))
    short = smoke(config, tmp_path / "smoke")
    assert short.valid_data == str(few)
    assert len(opened(short).evaluation.pack) == 16


@pytest.mark.parametrize("gone", ["train_data", "logitspath", "eval_data"])
def test_all_data_are_replaced_where_any_is_missing(tone_pack, store, tmp_path, caplog, gone):
    paths = {"train_data": str(tone_pack), "logitspath": str(store), "eval_data": str(tone_pack)}
    data = opened(smoke(settings(**paths | {gone: "gone/x"}), tmp_path / "smoke"))
    assert (len(data.pack), len(data.evaluation.pack)) == (16, 16)
    assert data.labels == audioset_labels()
    assert "not found: gone/x" in caplog.text
    assert not set(data.pack.names) & {*data.evaluation.pack.names, *Pack.open(tone_pack).names}


def test_few_clips_are_held_out_of_a_long_list(tone_pack, tmp_path):
    table = pd.read_csv(tone_pack, sep="\t", dtype=str)
    table["hdf5path"] = [str(Path(path).resolve()) for path in table["hdf5path"]]
    config = settings(train_data=str(tone_pack), eval_data=None, valid_fraction=0.9, select_on="valid")
    short = smoke(config, tmp_path / "smoke")
    assert short.valid_fraction == 16 / 28
    data = opened(short)
    assert (len(data.valid.pack), len(data.items)) == (16, 12)
    assert smoke(config.model_copy(update={"valid_fraction": 0.1}), tmp_path / "smoke").valid_fraction == 0.1


def test_faults_of_data_that_exist_are_left_for_the_run_to_tell(tone_pack, tmp_path):
    table = pd.read_csv(tone_pack, sep="\t", dtype=str)
    table.drop(columns="labels").to_csv("bare.tsv", sep="\t", index=False)
    for paths in (
        {"train_data": "bare.tsv", "eval_data": str(tone_pack)},
        {"train_data": str(tone_pack), "eval_data": "bare.tsv"},
    ):
        config = settings(**paths)
        short = smoke(config, tmp_path / "smoke")
        assert short.train_data == config.train_data
        with pytest.raises(UserError, match="'labels'"):
            opened(short)


@pytest.mark.parametrize("model", ["audiotransformer_pico", "audiotransformer_tiny"])
@pytest.mark.parametrize("pretrained", [None, True, "ced_tiny", "https://example.org/x.pt", "gone.pt", False], ids=str)
def test_nothing_is_downloaded_and_that_is_logged(tmp_path, caplog, model, pretrained):
    caplog.set_level(logging.INFO)
    assert smoke(settings(model=model, pretrained=pretrained), tmp_path / "smoke").pretrained is False
    wanted = isinstance(pretrained, str) or (pretrained is not False and model.endswith("tiny"))
    assert ("random weights in place of" in caplog.text) == wanted


def test_a_checkpoint_that_is_there_is_kept(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    Path("own.pt").touch()
    assert smoke(settings(pretrained="own.pt"), tmp_path / "smoke").pretrained == "own.pt"
    assert "random weights" not in caplog.text


def test_it_gives_the_same_again_whatever_was_there_and_draws_nothing_from_the_global_state(tmp_path):
    def made(folder):
        data = opened(smoke(settings(logitspath="logits/gone", num_classes=7), folder))
        targets = np.stack([data.source.target(epoch, item) for epoch in (1, 2) for item in range(16)])
        seeds = [data.source.seed(epoch, item) for epoch in (1, 2) for item in range(16)]
        return targets, np.stack([data.pack.read(i) for i in range(16)]), np.array(seeds)

    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = made(tmp_path / "a")
    assert torch.equal(torch.get_rng_state(), before)
    smoke(settings(logitspath="logits/gone", num_classes=9), tmp_path / "b")  # an earlier run over other classes
    torch.manual_seed(4)
    for one, other in zip(first, made(tmp_path / "b"), strict=True):
        assert np.array_equal(one, other)
    assert not list(tmp_path.rglob("*.partial"))


def test_a_label_table_that_cannot_be_read_is_reported(tmp_path):
    Path("names.csv").write_text("index,mid\n")
    with pytest.raises(UserError, match=r"names\.csv"):
        smoke(settings(labels_csv="names.csv"), tmp_path / "smoke")


@pytest.fixture
def checkpoint(tmp_path):
    """A teacher that knows the tones."""
    path = tmp_path / "own_teacher.pt"
    labels = [f"tone {i}" for i in range(7)]
    save_checkpoint(path, create_model("audiotransformer_pico", num_classes=7, labels=labels, depth=1))
    return str(path)


@pytest.mark.parametrize("teacher", ["gone.pt", "ced_base", ["ced_base", "own_teacher.pt"]], ids=str)
@pytest.mark.parametrize("loss", ["BCEWithLogitsLoss", "CrossEntropyLoss"])
def test_a_missing_teacher_is_replaced_with_the_data(tone_pack, checkpoint, tmp_path, caplog, teacher, loss):
    config = settings(teacher=teacher, objective="cmkd", loss=loss, eval_data=str(tone_pack), train_data=str(tone_pack))
    short = smoke(config, tmp_path / "smoke")
    teacher = load_teacher(short.teacher, short.teacher_weights)
    assert teacher.labels == [f"sound {i}" for i in range(10)]
    assert teacher.activations == {"softmax" if loss == "CrossEntropyLoss" else "sigmoid"}
    data = opened(short, teacher.labels)
    assert data.labels == teacher.labels
    assert np.array_equal(data.item_labels.target(1, 3), np.eye(10)[3])
    assert "generated sounds replace all data" in caplog.text


def test_weights_that_are_here_make_a_named_teacher_one_that_is_here(checkpoint, tone_pack, tmp_path):
    config = settings(
        teacher="audiotransformer_pico", teacher_weights=checkpoint, train_data=str(tone_pack), eval_data=None
    )
    short = smoke(config, tmp_path / "smoke")
    assert (short.teacher, short.teacher_weights) == (config.teacher, config.teacher_weights)


def test_a_small_run_with_a_stand_in_learns_from_it_and_from_labels(tmp_path, monkeypatch):
    for name in ("loop.draw_curves", "finish.draw_curves", "finish.write_report"):
        monkeypatch.setattr(f"training.{name}", lambda *_, **__: None)
    config = settings(
        teacher="gone.pt", objective="cmkd", smoke=True, mixup=0.5, outputpath=str(tmp_path / "runs"), num_workers=0,
        model_args={"pooling": "logit", "depth": 1}, warmup_iters=1,
    )  # fmt: skip
    Path("c.yaml").write_text(yaml.safe_dump(config.model_dump()))
    torch.manual_seed(0)
    prepared = prepare_run("c.yaml", {}, 0)
    assert prepared.fit()["mAP"] > 0
    lines = [json.loads(line) for line in (prepared.folder.path / "metrics.jsonl").read_text().splitlines()]
    assert {"loss", "loss_labels", "loss_teacher"} <= lines[0].keys()
