"""Students that learn from the embeddings of several teachers at once, stored or computed during training."""

import json

import numpy as np
import pytest
import torch

import save_logits
from audio.dataset import Pack
from common.errors import UserError
from common.files import sha256
from distill.embeddings import StoredEmbeddings
from models import create_model, load_model, save_checkpoint
from run import Runner
from tests.conftest import run_command, torchrun
from tests.training.test_embedding_training import configure, train
from tests.training.test_resume import lines_of, the_run, weights_of
from training.figures import curves_figure
from training.prepare import prepare_run
from training.store_writer import store_embeddings
from training.trainer import Trainer

KINDS, LONG = ("weight", "bias"), pytest.mark.long


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    """Curves and reports take longer than these runs."""
    for name in ("loop.draw_curves", "finish.draw_curves", "finish.write_report"):
        monkeypatch.setattr(f"training.{name}", lambda *_, **__: None)


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """Checkpoints of a CNN at 32 kHz with 3 classes and of a transformer at 16 kHz without any."""
    folder = tmp_path_factory.mktemp("teachers")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_checkpoint(folder / "cnn.pt", create_model("mn01_as", num_classes=3))
        save_checkpoint(folder / "ced.pt", create_model("audiotransformer_pico", num_classes=0, depth=1))
    return [str(folder / "cnn.pt"), str(folder / "ced.pt")]


@pytest.fixture(scope="module")
def stores(tone_pack, teachers, tmp_path_factory):
    """Their embeddings of the tones."""
    folder = tmp_path_factory.mktemp("stores")
    pack, names = Pack.open(tone_pack), ("cnn", "ced")
    for name, teacher in zip(names, teachers, strict=True):
        store_embeddings(load_model(teacher), pack, folder / name, num_workers=0)
    return [str(folder / name) for name in names]


def select_steps(folder):
    return [line for line in lines_of(folder) if line["kind"] == "step"]


def test_two_stores_teach_as_the_two_teachers_do(tone_pack, teachers, stores, tmp_path, capsys):
    """Without augmentation, teachers at 32 and 16 kHz compute what their stores hold."""
    weighted = {"objective_args": {"hidden": 32, "weights": [1, 2]}, "epochs": 2}
    stored = train(configure(tmp_path, tone_pack, stores, embeddingspath=stores, **weighted), tmp_path / "stored")
    assert f"teacher 2, of cosine_2 and loss_teacher_2: {stores[1]}" in capsys.readouterr().err
    online = {"embeddingspath": None, "teacher": teachers}
    computed = train(configure(tmp_path, tone_pack, stores, **online, **weighted), tmp_path / "computed")
    assert "teacher 1, of cosine_1 and loss_teacher_1: mn01_as" in capsys.readouterr().err
    names = ("loss", "cosine_1", "cosine_2", "loss_teacher_1", "loss_teacher_2")
    one, two = ([[line[name] for name in names] for line in select_steps(folder)] for folder in (stored, computed))
    np.testing.assert_allclose(one, two, atol=2e-3)  # stored in half precision
    for line in select_steps(stored):
        assert line["loss"] == pytest.approx((line["loss_teacher_1"] + 2 * line["loss_teacher_2"]) / 3, rel=1e-5)
    epochs = [[line["constant_loss"] for line in lines_of(f) if line["kind"] == "epoch"] for f in (stored, computed)]
    np.testing.assert_allclose(epochs[0], epochs[1], atol=2e-3)
    assert 0 < epochs[0][0] < 1
    assert load_model(stored).num_classes == 0
    assert "projection" not in " ".join(weights_of(stored))


def test_curves_show_the_losses_and_cosines_of_each_teacher():
    values = {
        "loss": 1.0,
        "loss_teacher_1": 1.5,
        "loss_teacher_2": 0.5,
        "cosine": 0.4,
        "cosine_1": 0.3,
        "cosine_2": 0.5,
    }
    entries = [{"kind": kind, "step": step, "epoch": step, **values} for step in (1, 2) for kind in ("step", "epoch")]
    losses, cosines = curves_figure(entries).axes[:2]
    assert {"loss", "loss_teacher_1", "loss_teacher_2"} < set(losses.get_legend_handles_labels()[1])
    assert not any("cosine" in label for label in losses.get_legend_handles_labels()[1])
    assert cosines.get_legend_handles_labels()[1] == ["mean over the teachers", "teacher 1", "teacher 2"]


def test_a_stopped_run_of_two_teachers_goes_on_to_the_same_bits(tone_pack, stores, tmp_path, monkeypatch):
    more = {"embeddingspath": stores, "checkpoint_every": 3, "epochs": 2}
    path = configure(tmp_path, tone_pack, stores, **more)
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
    assert identity["embeddings_sha256"] == [sha256(f"{store}/meta.json") for store in stores]


@pytest.mark.long
def test_two_ranks_learn_from_two_teachers_as_one(tone_pack, stores, tmp_path):
    arguments = {"hidden": 32, "dropout": 0.0, "weights": [1, 2]}
    path = configure(tmp_path, tone_pack, stores, embeddingspath=stores, objective_args=arguments, epochs=2)
    alone = train(path, tmp_path / "one")
    result = run_command(*torchrun(), "run.py", "--seed", "1", "train", path, "--outputpath", tmp_path / "two")
    assert result.returncode == 0, result.stderr
    one, two = ([line["loss"] for line in select_steps(f)] for f in (alone, the_run(tmp_path / "two")))
    np.testing.assert_allclose(one, two, rtol=1e-4)


def test_a_list_of_one_teacher_is_that_teacher(tone_pack, stores, tmp_path):
    path = configure(tmp_path, tone_pack, stores, embeddingspath=stores[:1])
    run = prepare_run(str(path), {"outputpath": str(tmp_path / "runs")}, 0).run
    assert list(run.objective.state_dict()) == [f"projection.{layer}.{kind}" for layer in (0, 3) for kind in KINDS]
    assert isinstance(run.data.source, StoredEmbeddings)


def test_of_two_teachers_one_may_be_a_name_with_weights(tone_pack, teachers, stores, tmp_path):
    path = configure(tmp_path, tone_pack, stores, embeddingspath=None)
    changes = {"teacher": f"mn01_as,{teachers[1]}", "teacher_weights": f"{teachers[0]},null"}
    members = prepare_run(str(path), changes | {"outputpath": str(tmp_path / "runs")}, 0).run.teacher.members
    assert [model.name for model in members] == ["mn01_as", "audiotransformer_pico"]
    given = load_model(teachers[0]).state_dict()
    assert all(torch.equal(given[key], value) for key, value in members[0].state_dict().items())


@pytest.mark.parametrize(
    "change",
    [{"embeddingspath": ["a", "b"]}, pytest.param({"embeddingspath": None, "teacher": ["a", "b"]}, marks=LONG)],
    ids=["stored", "online"],
)
def test_two_teachers_run_without_data(change, tone_pack, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = {"train_data": "absent.tsv", "objective_args": {"weights": [1, 2]}}
    path = configure(tmp_path, tone_pack, "", **arguments, **change)
    assert "cosine_2" in lines_of(train(path, tmp_path / "runs", smoke=True))[-1]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"objective_args": {"weights": [1]}}, "number of weights: 1, of teachers: 2; give one weight for each"),
        ({"objective_args": {"weights": [-1, 1]}}, "weights is -1; expected a number of at least 0 for each teacher"),
        ({"objective_args": {"weights": [0, 0]}}, "all zero, so nothing would be learned"),
        ({"embeddingspath": ["SAME", "SAME"]}, "embeddingspath lists .* more than once"),
        ({"embeddingspath": ["SAME", "absent"]}, "absent is not a folder; make embeddings with `python save_logits"),
        ({"embeddingspath": None, "teacher": ["mn01_as"], "teacher_weights": ["a", "b"]}, "found 2 weights for 1 mod"),
        ({"mixup": 0.5}, "mixup needs the embeddings of mixtures, which are not stored"),
    ],
)
def test_teachers_that_do_not_go_together_are_reported_and_nothing_is_written(
    tone_pack, stores, tmp_path, changes, sentence
):
    given = {"embeddingspath": stores} | changes
    if isinstance(given["embeddingspath"], list):
        given["embeddingspath"] = [stores[0] if each == "SAME" else each for each in given["embeddingspath"]]
    path = configure(tmp_path, tone_pack, stores, **given)
    with pytest.raises(UserError, match=sentence):
        prepare_run(str(path), {"outputpath": str(tmp_path / "runs")}, 0)
    assert not (tmp_path / "runs").exists()


def test_several_models_have_a_store_of_embeddings_each(tone_pack, teachers, tmp_path, capsys):
    options = {"train_data": str(tone_pack), "model": teachers, "outputpath": str(tmp_path)}
    with pytest.raises(SystemExit):
        save_logits.save_logits("logitconfig/own_embeddings.yaml", **options)
    message = capsys.readouterr().err
    assert "2 models are given" in message
    assert "each has a store of its own: embeddingspath: [A, B]" in message
