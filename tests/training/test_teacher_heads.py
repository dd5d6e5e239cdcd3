"""A teacher with a head on it: its classes, its probabilities and its weights are those of the head."""

import pytest
import torch

from common.errors import UserError
from distill.dataset import collate
from models import create_model, save_checkpoint
from models.headed import Head
from models.heads import save_head
from tests.training.test_teacher import CPU, LABELS, configure, prepare, teacher_model  # noqa: F401  (a fixture)
from training.prepare import prepare_run
from training.teacher import load_teacher

SOFTMAX = {"loss": "CrossEntropyLoss", "model_args": {"pooling": "logit", "depth": 1}}


def head_for(kind: str, seed: int = 0, **settings) -> Head:
    width = teacher_model(kind).embed_dim
    torch.manual_seed(seed)
    head = Head(width, 7, labels=LABELS, **settings).eval()
    head.facts = {"name": "birds"}
    return head


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A working folder with models that embed, and a head for each in heads/."""
    monkeypatch.chdir(tmp_path)
    for kind in ("ced", "cnn"):
        save_checkpoint(f"{kind}.pt", teacher_model(kind, num_classes=3, labels=["a", "b", "c"]))
        save_head(f"heads/{kind}.pt", head_for(kind))
    save_checkpoint("tags.pt", teacher_model("cnn"))
    save_head("heads/sigmoid.pt", head_for("ced", activation="sigmoid"))
    return tmp_path


def test_the_students_targets_are_the_heads_probabilities(configure, work):  # noqa: F811
    run = prepare(configure(teacher="cnn.pt", teacher_head="cnn", wavtransforms={}, spectransforms=[], **SOFTMAX)).run
    assert run.data.labels == run.model.labels == LABELS
    assert run.model.activation == "softmax"
    batch = collate([run.dataset[(1, item)] for item in range(5)]).to(CPU)
    found = run.teacher.probabilities(batch, run.data.source.replay.spectrogram)
    with torch.no_grad():
        embeddings = teacher_model("cnn", num_classes=3, labels=["a", "b", "c"]).embed(batch.waveforms[32000])[0]
        expected = head_for("cnn")(embeddings).softmax(1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert expected.std(0).max() > 1e-3


def test_weights_and_head_come_from_where_one_likes(work):
    by_name = load_teacher("cnn.pt", heads="cnn")
    by_path = load_teacher("mn01_as", weights="cnn.pt", heads=str(work / "heads" / "cnn.pt"))
    assert by_name.describe() == by_path.describe()
    assert by_name.name == "mn01_as+birds"


def test_of_a_list_each_model_has_its_own_head_or_none(work):
    teacher = load_teacher(["ced.pt", "tags.pt"], heads=["sigmoid", None])
    assert teacher.labels == LABELS
    assert [len(member.labels) for member in teacher.members] == [7, 7]
    assert teacher.describe()[1] == load_teacher("tags.pt").describe()[0]
    assert "head" not in teacher.describe()[1]
    assert teacher.activations == {"sigmoid"}
    with pytest.raises(UserError, match="number of heads: 1, of models: 2; give a list with a head for each model"):
        load_teacher(["ced.pt", "tags.pt"], heads="sigmoid")
    with pytest.raises(UserError, match="number of heads: 3, of models: 2"):
        load_teacher(["ced.pt", "tags.pt"], heads=["sigmoid", None, None])


def test_another_head_is_another_teacher(work):
    def fingerprint():
        return load_teacher("ced.pt", heads="ced").fingerprint()

    first = fingerprint()
    assert first == fingerprint() != load_teacher("ced.pt").fingerprint()
    for head in (head_for("ced", seed=1), head_for("ced", activation="sigmoid")):
        save_head("heads/ced.pt", head)
        assert fingerprint() != first
    turned = head_for("ced")
    turned.labels = LABELS[::-1]
    save_head("heads/ced.pt", turned)
    assert fingerprint() != first
    standardised = head_for("ced")
    standardised.mean += 1
    save_head("heads/ced.pt", standardised)
    assert fingerprint() != first


def test_a_run_does_not_go_on_with_a_head_that_was_trained_anew(configure, work):  # noqa: F811
    path = configure(teacher="cnn.pt", teacher_head="cnn", **SOFTMAX)
    folder = prepare(path).folder.path
    save_head("heads/cnn.pt", head_for("cnn", seed=1))
    with pytest.raises(UserError, match="that run has another teacher_sha256"):
        prepare_run(path, {}, 3, resume=str(folder))
    save_head("heads/cnn.pt", head_for("cnn"))
    assert prepare_run(path, {}, 3, resume=str(folder)).folder.path == folder


@pytest.mark.parametrize(
    ("changes", "sentences"),
    [
        ({}, ["has softmax outputs", "for sigmoid; set loss: CrossEntropyLoss"]),
        ({"teacher_head": "cnn", "loss": "CrossEntropyLoss"}, ["the head takes embeddings of width 96"]),
        ({"teacher_head": "cet"}, ["teacher: no head is called 'cet' (did you mean 'ced'?)"]),
        ({"teacher": ["ced.pt", "ced.pt"]}, ["teacher: number of heads: 1, of models: 2"]),
        ({"teacher": None}, ["teacher_head is given without teacher, the model that it belongs to; add it"]),
        ({"objective": "cosine"}, ["teacher_head is for probabilities, but objective cosine learns"]),
        ({"head": "ced"}, ["unknown key 'head'", "teacher_head is the head of its teacher"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_does_not_fit_is_reported(configure, work, changes, sentences):  # noqa: F811
    with pytest.raises(UserError) as error:
        prepare(configure(**{"teacher": "ced.pt", "teacher_head": "ced"} | changes))
    for sentence in sentences:
        assert sentence in str(error.value)
    assert not (work / "runs").exists()


def test_models_without_classes_teach_by_a_head(work):
    save_checkpoint("embeds.pt", create_model("mn01_as", num_classes=0))
    teacher = load_teacher("embeds.pt", heads="cnn")
    teacher.check_classes()
    assert teacher.labels == LABELS
