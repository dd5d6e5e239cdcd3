"""Students that learn from embeddings alone: what is learnt, what is kept, what is told, and going on."""

import json

import numpy as np
import pytest
import torch
import yaml

from audio.dataset import Pack
from common.errors import UserError
from common.files import sha256
from distill.clusters import write_clusters
from models import create_model, load_model, save_checkpoint
from run import Runner
from tests.conftest import run_command, torchrun
from tests.training.test_resume import lines_of, the_run, weights_of
from training.prepare import prepare_run
from training.store_writer import store_embeddings
from training.trainer import Trainer

SETTINGS = {
    "model": "audiotransformer_pico",
    "model_args": {"depth": 1},
    "pretrained": False,
    "objective": "cosine",
    "objective_args": {"hidden": 32},
    "batch_size": 8,
    "epochs": 3,
    "warmup_epochs": 0,
    "optimizer": "Adam",
    "optimizer_args": {"lr": 0.002},
    "num_workers": 0,
    "log_every": 1,
    "device": "cpu",
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """The checkpoint of a small, untrained teacher of another kind."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("teacher") / "teacher.pt"
    save_checkpoint(path, create_model("mn01_as", num_classes=3))
    return path


@pytest.fixture(scope="module")
def store(tone_pack, teacher, tmp_path_factory):
    """Its embeddings of the tones, and clusters of very unlike sizes: the pitch of clips 0 to 3, and all else."""
    folder = tmp_path_factory.mktemp("store")
    store = store_embeddings(load_model(teacher), Pack.open(tone_pack), folder, num_workers=0)
    write_clusters(folder / "clusters_k2.parquet", store.read_rows(1), (np.arange(28) < 4).astype(int), {"k": 2})
    return folder


def configure(tmp_path, tone_pack, store, **changes):
    path = tmp_path / "config.yaml"
    settings = SETTINGS | {"train_data": str(tone_pack), "embeddingspath": str(store)} | changes
    path.write_text(yaml.safe_dump({key: value for key, value in settings.items() if value is not None}))
    return path


def train(path, output, **words):
    Runner(seed=1).train(str(path), outputpath=str(output), **words)
    return the_run(output)


def test_a_student_learns_without_labels_and_keeps_neither_classes_nor_projection(tone_pack, store, tmp_path, capsys):
    changes = {"epochs": 12, "optimizer_args": {"lr": 0.005}}
    folder = train(configure(tmp_path, tone_pack, store, **changes), tmp_path / "runs")
    losses = [line["loss"] for line in lines_of(folder) if line["kind"] == "epoch"]
    assert losses[-1] < 0.3 * losses[0]
    assert lines_of(folder)[-1]["cosine"] == pytest.approx(1 - losses[-1], abs=1e-5)
    model = load_model(folder)
    assert (model.num_classes, model.labels) == (0, [])
    assert "projection" not in " ".join(model.state_dict())
    assert weights_of(folder)["outputlayer.1.weight"].shape == (0, 64)
    fresh = create_model("audiotransformer_pico", num_classes=0, depth=1).state_dict()
    assert model.state_dict().keys() == fresh.keys()
    assert torch.equal(
        model.state_dict()["outputlayer.0.weight"], torch.ones(64)
    )  # nothing was asked of its last layers
    assert load_model(folder, num_classes=5).predict(torch.zeros(1, 16000)).shape == (1, 5)
    assert "probe" in capsys.readouterr().out


def test_labels_beside_embeddings_are_learned_too_and_evaluate(tone_pack, store, tmp_path):
    arguments = {"model_args": {"depth": 1, "pooling": "logit"}, "loss": "BCEWithLogitsLoss"}
    path = configure(
        tmp_path, tone_pack, store, objective_args={"lambda": 0.5}, valid_fraction=0.25, epochs=1, **arguments
    )
    folder = train(path, tmp_path / "runs", **{"init_from_data": True})
    line = lines_of(folder)[-1]
    assert line["loss"] == pytest.approx(0.5 * line["loss_labels"] + 0.5 * line["loss_teacher"], rel=1e-5)
    assert "valid_mAP" in line
    assert load_model(folder).labels == [f"tone {i}" for i in range(7)]


def test_an_online_teacher_embeds_what_the_student_hears(tone_pack, teacher, store, tmp_path):
    """Without augmentation that is what the store holds."""
    stored = train(configure(tmp_path, tone_pack, store), tmp_path / "stored")
    asked = train(configure(tmp_path, tone_pack, store, embeddingspath=None, teacher=str(teacher)), tmp_path / "asked")
    one, two = ([line["loss"] for line in lines_of(f) if line["kind"] == "step"] for f in (stored, asked))
    np.testing.assert_allclose(one, two, atol=2e-3)  # stored in half precision
    mixed = {"embeddingspath": None, "teacher": str(teacher), "mixup": 0.5, "epochs": 1}
    train(configure(tmp_path, tone_pack, store, **mixed), tmp_path / "mixed")


def test_filled_chunks_are_of_one_length(tone_pack, store, tmp_path):
    path = configure(tmp_path, tone_pack, store, model="mn01_as", model_args=None, fill_chunks=True)
    run = prepare_run(str(path), {"outputpath": str(tmp_path / "runs")}, 0).run
    wave = run.dataset[1, 3]["waveforms"][32000]
    assert wave.shape == (320000,)  # the store's chunks are of 10 s
    assert wave[:32000].abs().max() > 0.1
    assert not wave[32000:].any()


def test_small_clusters_are_drawn_as_often_as_large_ones(tone_pack, store, tmp_path):
    clusters = str(store / "clusters_k2.parquet")
    path = configure(tmp_path, tone_pack, store, sampler="clusters", clusters=clusters)
    run = prepare_run(str(path), {"outputpath": str(tmp_path / "runs")}, 0).run
    drawn = [item for step in range(400) for _, item in run.batches.batch(step)]
    assert np.mean(np.array(drawn) < 4) == pytest.approx(0.5, abs=0.03)
    assert np.bincount(drawn, minlength=28)[4:].std() < 30


def test_a_run_with_clusters_goes_on_to_the_same_bits(tone_pack, store, tmp_path, monkeypatch):
    more = {"sampler": "clusters", "clusters": str(store / "clusters_k2.parquet"), "objective": "cluster_contrastive"}
    path = configure(tmp_path, tone_pack, store, checkpoint_every=3, epochs=2, **more)
    whole = train(path, tmp_path / "whole")
    step = Trainer.step

    def stopped(self, parts, weights, number):
        if number == 5:
            raise KeyboardInterrupt
        return step(self, parts, weights, number)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "step", stopped)
        with pytest.raises(SystemExit):
            Runner(seed=1).train(str(path), outputpath=str(tmp_path / "runs"))
    resumed = train(path, tmp_path / "runs")
    assert lines_of(resumed) == lines_of(whole)
    a, b = weights_of(resumed), weights_of(whole)
    assert all(torch.equal(a[key], b[key]) for key in a)
    identity = json.loads((whole / "run.json").read_text())["identity"]  # what must be the same to go on
    assert identity["embeddings_sha256"] == sha256(store / "meta.json")
    assert identity["clusters_sha256"] == sha256(store / "clusters_k2.parquet")


@pytest.mark.long
def test_two_ranks_draw_and_learn_as_one(tone_pack, store, tmp_path):
    more = {"sampler": "clusters", "clusters": str(store / "clusters_k2.parquet"), "epochs": 2}
    path = configure(tmp_path, tone_pack, store, objective_args={"hidden": 32, "dropout": 0.0}, **more)
    alone = train(path, tmp_path / "one")
    result = run_command(*torchrun(), "run.py", "--seed", "1", "train", path, "--outputpath", tmp_path / "two")
    assert result.returncode == 0, result.stderr
    one, two = (
        [line["loss"] for line in lines_of(f) if line["kind"] == "step"] for f in (alone, the_run(tmp_path / "two"))
    )
    np.testing.assert_allclose(one, two, rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"objective": "target", "objective_args": {}},
            "embeddingspath is given, but the targets of objective target are prob",
        ),
        ({"embeddingspath": None}, "objective cosine learns a teacher's embeddings; give embeddingspath"),
        ({"mixup": 0.5}, "mixup needs the embeddings of mixtures, which are not stored"),
        ({"valid_fraction": 0.2}, "valid_fraction is for models with classes, but objective cosine learns none"),
        ({"objective": "cluster_contrastive"}, "objective cluster_contrastive needs clusters"),
        ({"clusters": "x.parquet"}, "clusters are given but not used"),
        ({"sampler": "clusters"}, "sampler: clusters needs clusters"),
        ({"logitspath": "y"}, "logitspath and embeddingspath are both given"),
        ({"wavtransforms": {"Shift": {}}}, "wavtransforms and spectransforms come with the store of embeddingspath"),
        ({"clusters": "absent.parquet", "sampler": "clusters"}, "absent.parquet: there is no such file"),
    ],
)
def test_keys_that_do_not_go_together_are_reported(tone_pack, store, tmp_path, changes, sentence):
    path = configure(tmp_path, tone_pack, store, **changes)
    with pytest.raises(UserError, match=sentence):
        prepare_run(str(path), {"outputpath": str(tmp_path / "runs")}, 0)
    assert not (tmp_path / "runs").exists()
