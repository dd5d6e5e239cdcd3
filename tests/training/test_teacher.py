"""An online teacher: it hears what the student hears, answers, and stays as it is."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from audio.dataset import Pack
from common.errors import UserError
from distill.dataset import collate
from distill.objectives import Objective
from models import Ensemble, create_model, load_model, save_checkpoint
from tests.batches import make_batch
from tests.training.test_resume import StoppedError, final_weights, lines_of, stop_after, weights_of
from training.config import SoftTargetConfig
from training.finish import describe_targets
from training.loss_module import LossModule, add_teacher_output
from training.mixup import mix_targets
from training.prepare import prepare_run
from training.run_folder import RunFolder
from training.store_writer import SoftTargetContent, StoreWriter
from training.teacher import load_teacher

CPU = torch.device("cpu")
LABELS = [f"tone {index}" for index in range(7)]
AUGMENTED = {
    "wavtransforms": {"Shift": {"min_shift": -0.5, "max_shift": 0.5}},
    "spectransforms": [{"TimeMasking": {"time_mask_param": 48}}, {"FrequencyMasking": {"freq_mask_param": 16}}],
}
MODELS = {"ced": ("audiotransformer_pico", {"depth": 1}), "cnn": ("mn01_as", {})}  # 16 kHz, and 32 kHz


def teacher_model(kind: str, **arguments):
    name, more = MODELS[kind]
    torch.manual_seed(5)
    model = create_model(name, **{"num_classes": 7, "labels": LABELS} | more | arguments)
    norms = [module for module in model.modules() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():  # answers that differ from clip to clip and from class to class
        model.train()(0.3 * torch.randn(8, model.sample_rate))
        model.get_submodule(model.last_layer).weight.mul_(20)
    return model.eval()


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    """Curves and reports take longer than these runs."""
    for name in ("loop.draw_curves", "finish.draw_curves", "finish.write_report"):
        monkeypatch.setattr(f"training.{name}", lambda *_, **__: None)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teachers")
    for kind in MODELS:
        save_checkpoint(folder / f"{kind}.pt", teacher_model(kind))
    save_checkpoint(folder / "softmax.pt", teacher_model("ced", activation="softmax"))
    save_checkpoint(folder / "others.pt", teacher_model("ced", labels=[*LABELS[:6], "noise"]))
    return folder


@pytest.fixture
def configure(tone_pack, tmp_path):
    """`configure(key=value)` writes a configuration and returns its path."""

    def write(**changes):
        settings = {
            "train_data": str(tone_pack), "eval_data": str(tone_pack), "model": "audiotransformer_pico",
            "model_args": {"pooling": "logit", "depth": 1}, "pretrained": False, "loss": "BCEWithLogitsLoss",
            "batch_size": 8, "epochs": 2, "warmup_iters": 2, "valid_every": 2, "optimizer": "AdamW",
            "optimizer_args": {"lr": 0.003}, "num_workers": 0, "device": "cpu", "log_every": 1,
            "outputpath": str(tmp_path / "runs"),
        } | AUGMENTED | changes  # fmt: skip
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(settings))
        return str(path)

    return write


def prepare(path: str, seed: int = 3, **more):
    torch.manual_seed(seed)
    return prepare_run(path, {}, seed, resume="never", **more)


class Seen(Objective):
    """Keeps the batches that it is given."""

    def __init__(self):
        super().__init__(None, None, None)
        self.batches = []

    def forward(self, student, batch):
        self.batches.append(batch)
        return {"loss": batch.mel.mean()}


@pytest.mark.parametrize("kind", ["ced", "cnn"])
@pytest.mark.parametrize("mixup_on", [None, "spectrogram", "waveform"])
def test_the_target_is_the_teachers_output_to_the_same_augmented_and_mixed_clip(configure, checkpoints, kind, mixup_on):
    """One clip at a time, by hand: roll, mixture of waveforms, mel, masks, mixture of spectrograms, probabilities."""
    path = configure(
        teacher=str(checkpoints / f"{kind}.pt"), objective="cmkd", mixup=0.5 if mixup_on else None,
        mixup_on=mixup_on or "spectrogram",
    )  # fmt: skip
    run = prepare(path).run
    keys = [(2, item) for item in (0, 5, 11, 23, 27)]
    batch = collate([run.dataset[key] for key in keys]).to(CPU)
    seen = Seen()
    add = partial(add_teacher_output, run.teacher, run.needs)
    losses = LossModule(run.model.eval(), seen, run.needs, run.data.source.replay, mixup_on, add_teacher=add)
    losses(batch)
    (message,) = seen.batches
    model = load_model(checkpoints / f"{kind}.pt")
    rate, replay = model.sample_rate, run.data.source.replay
    items, weights = [run.dataset[key] for key in keys], batch.mixup_weight
    waves = [item["waveforms"][rate] for item in items]
    if mixup_on == "waveform":
        waves = [w * a + (1 - w) * b for w, a, b in zip(weights, waves, waves[::-1], strict=True)]
    draws = ("value", "min_value", "n_reference")
    mels = []
    for item, wave in zip(items, waves, strict=True):
        mel = model.front_end(wave[None])
        mels.append(replay.mask_spectrogram(mel, model.front_end, *(torch.tensor([item[key]]) for key in draws)))
    if mixup_on == "spectrogram":
        mels = [w * a + (1 - w) * b for w, a, b in zip(weights, mels, mels[::-1], strict=True)]
    with torch.no_grad():
        expected = torch.cat([model.probabilities(model.forward_spectrogram(mel)) for mel in mels])
    assert torch.allclose(message.target, expected, atol=1e-4)
    assert expected.std(0).max() > 0.01
    if kind == "ced":  # of the same front-end: what the student's network is given is what the teacher's was
        assert torch.allclose(message.mel, torch.cat(mels), atol=0.05 if not torch.cuda.is_available() else 0.3)  # decibels, down to -100
    own = torch.eye(7)[[0, 5, 4, 2, 6]]
    if mixup_on:
        own = weights[:, None] * own + (1 - weights[:, None]) * own.flip(0)
    assert torch.allclose(message.labels, own, atol=1e-6)


def test_clips_of_several_lengths_are_answered_as_each_would_be_alone(checkpoints):
    teacher = load_teacher([str(checkpoints / "ced.pt"), str(checkpoints / "cnn.pt")])
    assert teacher.sample_rates == [16000, 32000]
    assert teacher.name == "audiotransformer_pico_mn01_as"
    run_lengths = {16000: [16000, 9000, 12000], 32000: [32000, 18000, 24000]}
    sounds = {rate: 0.1 * torch.randn(3, n[0]) for rate, n in run_lengths.items()}
    for rate, lengths in run_lengths.items():
        for row, n in enumerate(lengths):
            sounds[rate][row, n:] = 0

    def hear(front_end, batch):
        lengths = batch.lengths[front_end.sample_rate]
        frames = None if lengths is None else front_end.n_frames(lengths)
        return front_end(batch.waveforms[front_end.sample_rate], lengths), frames

    lengths = {rate: torch.tensor(n) for rate, n in run_lengths.items()}
    together = teacher.probabilities(make_batch(waveforms=sounds, lengths=lengths), hear)
    for row in range(3):
        alone = {rate: sounds[rate][row : row + 1, : n[row]] for rate, n in run_lengths.items()}
        each = [member.predict(alone[member.sample_rate])[0] for member in teacher.members]
        assert torch.allclose(together[row], (each[0] + each[1]) / 2, atol=1e-5)


@pytest.mark.parametrize(
    ("teacher", "student", "loss"), [("cnn", "ced", "BCEWithLogitsLoss"), ("ced", "cnn", "CrossEntropyLoss")]
)
def test_any_teacher_teaches_any_student_and_stays_as_it_is(configure, checkpoints, tmp_path, teacher, student, loss):
    source = tmp_path / "teacher.pt"
    activation = "softmax" if loss == "CrossEntropyLoss" else "sigmoid"
    save_checkpoint(source, teacher_model(teacher, activation=activation))
    name, arguments = MODELS[student]
    arguments = arguments | ({"pooling": "logit"} if student == "ced" else {})
    prepared = prepare(
        configure(teacher=str(source), objective="cmkd", model=name, model_args=arguments, loss=loss, mixup=0.5,
                  objective_args={"lambda": 0.3, "tau": 2.0}, ema=0.9)
    )  # fmt: skip
    run = prepared.run
    (member,) = run.teacher.members
    before = {key: value.clone() for key, value in member.state_dict().items()}
    own = {key: value.clone() for key, value in run.model.state_dict().items()}
    states = []
    save = run.states.save
    run.states.save = lambda step, state: states.append(state) or save(step, state)
    prepared.fit()
    after = member.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert not any(module.training for module in member.modules())
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in member.parameters())
    assert any(not torch.equal(own[key], value) for key, value in run.model.state_dict().items())
    assert run.trainer.state_dict()["model"].keys() == own.keys()
    assert not any("teacher" in key for key in run.trainer.loss_module.state_dict())
    trained = {id(parameter) for parameter in run.trainer.guard.parameters}
    assert trained == {id(parameter) for parameter in run.model.parameters()}
    assert states[-1]["trainer"].keys() == {"model", "optimizer", "schedule", "scaler", "average", "objective"}
    saved = torch.load(final_weights(prepared.folder.path), weights_only=True)
    assert saved["model"].keys() == own.keys()
    assert saved["config"]["labels"] == LABELS
    (line, *_) = [line for line in lines_of(prepared.folder.path) if line["kind"] == "step"]
    assert line["loss"] == pytest.approx(0.3 * line["loss_labels"] + 0.7 * line["loss_teacher"], rel=1e-5)


def test_asking_online_is_what_a_store_of_the_same_seed_would_say(configure, checkpoints, tone_pack, tmp_path):
    """Two epochs of step losses: by a teacher that is asked, and by its answers stored beforehand."""
    teacher = load_teacher(str(checkpoints / "cnn.pt"))
    settings = {"epochs": 2, "topk": 7, "num_workers": 0, "device": "cpu", "seed": 3} | AUGMENTED
    config = SoftTargetConfig(train_data=str(tone_pack), model="mn01_as", **settings)
    store = StoreWriter(
        config, Pack.open(tone_pack), SoftTargetContent(teacher, config.topk), tmp_path / "store"
    ).save()
    losses = {}
    for objective in ("target", "cmkd"):
        online = prepare(configure(teacher=str(checkpoints / "cnn.pt"), objective=objective))
        stored = prepare(configure(logitspath=str(store), wavtransforms={}, spectransforms=[], objective=objective))
        a, b = online.run.model.state_dict(), stored.run.model.state_dict()
        assert all(torch.equal(a[key], b[key]) for key in a)  # loading a teacher draws nothing
        for name, prepared in (("online", online), ("stored", stored)):
            prepared.fit()
            steps = [line for line in lines_of(prepared.folder.path) if line["kind"] == "step"]
            losses[objective, name] = np.array([line["loss"] for line in steps])
        np.testing.assert_allclose(losses[objective, "online"], losses[objective, "stored"], rtol=5e-3)
    assert len(losses["cmkd", "online"]) == 8
    assert np.abs(losses["cmkd", "online"] - losses["target", "online"]).min() > 0.01


def test_a_head_start_from_data_requests_the_teacher(configure, checkpoints):
    run = prepare(configure(teacher=str(checkpoints / "cnn.pt"), init_from_data=True, epochs=1)).run
    keys = [key for step in range(run.epoch_steps) for key in run.batches.batch(step)]
    batch = collate([run.dataset[key] for key in keys]).to(CPU)
    prior = run.teacher.probabilities(batch, run.data.source.replay.spectrogram).mean(0)
    biases = []
    make = run.create_trainer
    run.create_trainer = lambda: biases.append(run.model.outputlayer[1].bias.detach().clone()) or make()
    run.fit()
    assert torch.allclose(biases[0], torch.logit(prior), atol=1e-3)


def unlabelled(tone_pack: Path, tmp_path: Path) -> str:
    table = pd.read_csv(tone_pack, sep="\t", dtype=str).drop(columns="labels")
    table["hdf5path"] = [str(Path(path).resolve()) for path in table["hdf5path"]]
    table.to_csv(tmp_path / "bare.tsv", sep="\t", index=False)
    return str(tmp_path / "bare.tsv")


def test_a_teacher_alone_needs_no_labels(configure, checkpoints, tone_pack, tmp_path):
    bare = unlabelled(tone_pack, tmp_path)
    prepared = prepare(configure(teacher=str(checkpoints / "ced.pt"), train_data=bare, epochs=1, valid_every=1))
    assert prepared.run.data.labels == LABELS
    assert "labels" not in prepared.run.dataset[(1, 0)]
    assert 0 < prepared.fit()["mAP"] <= 1
    assert describe_targets(prepared.run) == "probabilities of audiotransformer_pico, computed while training"


@pytest.mark.parametrize(
    ("changes", "sentences"),
    [
        ({"teacher": "gone.pt", "batch_sise": 3}, ["2 faults", "teacher: gone.pt: no such file", "'batch_size'"]),
        ({"teacher": "others.pt"}, ["has labels that are not classes of the teacher: tone 6", "tone 0, tone 1"]),
        ({"teacher": "softmax.pt"}, ["has softmax outputs", "for sigmoid; set loss: CrossEntropyLoss"]),
        ({"num_classes": 5}, ["1 fault", "ced.pt has 7 classes, the configuration 5; drop num_classes"]),
        ({"labels_csv": "turned.csv"}, ["class 0 is 'tone 6' in", "but 'tone 0' in"]),
        ({"train_data": "bare.tsv"}, ["bare.tsv has no `labels` column", "set objective: target"]),
        ({"train_data": "bare.tsv", "teacher": None, "logitspath": "store"}, ["bare.tsv has no `labels` column"]),
        ({"logitspath": "store"}, ["teacher and logitspath are both given"]),
        ({"teacher": None}, ["objective cmkd learns from a teacher beside the labels; give teacher"]),
        ({"teacher_weights": ["a", "b"]}, ["found 2 weights for 1 models"]),
        ({"teacher": None, "objective": "target", "teacher_weights": "a"}, ["teacher_weights is given without"]),
        ({"disable_consistency": True}, ["disable_consistency is for stored targets"]),
        ({"objective_args": {"taw": 2}}, [r"has no argument 'taw' (did you mean 'tau'?)"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_does_not_fit_is_reported(configure, checkpoints, tone_pack, tmp_path, monkeypatch, changes, sentences):
    monkeypatch.chdir(tmp_path)
    for path in checkpoints.iterdir():
        (tmp_path / path.name).symlink_to(path)
    unlabelled(tone_pack, tmp_path)
    Path("turned.csv").write_text("index,mid,display_name\n" + "".join(f'{i},,"tone {6 - i}"\n' for i in range(7)))
    settings = {"teacher": "ced.pt", "objective": "cmkd"} | changes
    if changes.get("logitspath"):
        config = SoftTargetConfig(train_data=str(tone_pack), model="x", epochs=1, num_workers=0, device="cpu")
        StoreWriter(
            config, Pack.open(tone_pack), SoftTargetContent(load_teacher("ced.pt"), config.topk), Path("store")
        ).save()
        settings |= {"wavtransforms": {}, "spectransforms": []}
    with pytest.raises(UserError) as error:
        prepare(configure(**settings))
    for sentence in sentences:
        assert sentence in str(error.value)
    assert not (tmp_path / "runs").exists()


def test_members_with_other_labels_do_not_vote_together(checkpoints):
    with pytest.raises(UserError, match="differ from class 6"):
        load_teacher([str(checkpoints / "ced.pt"), str(checkpoints / "others.pt")])


def test_a_stopped_run_goes_on_with_its_teacher_and_with_no_other(configure, checkpoints, tmp_path, monkeypatch):
    teacher = tmp_path / "teacher.pt"
    save_checkpoint(teacher, teacher_model("cnn"))
    path = configure(teacher=str(teacher), objective="cmkd", mixup=0.5, checkpoint_every=3)
    whole = prepare(path)
    whole.fit()
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        with pytest.raises(StoppedError):
            prepare(path).fit()
    folders = {p.parent for p in (tmp_path / "runs").glob("*/*/*/run.json") if not p.parent.is_symlink()}
    (folder,) = folders - {whole.folder.path}
    with torch.no_grad():
        other = teacher_model("cnn")
        other.get_submodule(other.last_layer).bias.add_(0.1)
    save_checkpoint(teacher, other)
    with pytest.raises(UserError, match="that run has another teacher_sha256"):
        prepare_run(path, {}, 3, resume=str(folder))
    save_checkpoint(teacher, teacher_model("cnn"))
    prepare_run(path, {}, 3, resume=str(folder)).fit()
    one, other = (weights_of(path) for path in (whole.folder.path, folder))
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert lines_of(whole.folder.path) == lines_of(folder)


def test_what_a_teacher_was_created_with_is_part_of_its_fingerprint():
    def fingerprint(**arguments):
        torch.manual_seed(0)
        return Ensemble([create_model("audiotransformer_pico", num_classes=2, depth=1, **arguments)]).fingerprint()

    assert fingerprint() == fingerprint()
    assert fingerprint() != fingerprint(pooling="logit")


def test_runs_that_were_begun_without_a_teacher_are_the_same_still(configure, tmp_path):
    """`run.json` of runs from before there were teachers says nothing of them."""
    prepared = prepare(configure(epochs=1))
    record = prepared.folder.path / "run.json"
    content = json.loads(record.read_text())
    assert content["identity"].pop("teacher_sha256") is None
    identity = dict(content["identity"])
    for key in ("teacher", "teacher_weights"):
        content["identity"].pop(key)
    record.write_text(json.dumps(content))
    assert RunFolder(prepared.folder.path).differences(identity | {"teacher_sha256": None}) == []


def test_labels_are_mixed_like_targets():
    target, labels, weight = torch.rand(4, 3), torch.eye(3)[[0, 1, 2, 0]], torch.tensor([0.2, 0.5, 1.0, 0.0])
    mixed = mix_targets(make_batch(target=target, labels=labels, mixup_weight=weight))
    for row in range(4):
        for found, own in ((mixed.target, target), (mixed.labels, labels)):
            assert torch.allclose(found[row], weight[row] * own[row] + (1 - weight[row]) * own[3 - row])
    assert mix_targets(make_batch(target=target, mixup_weight=weight)).labels is None
