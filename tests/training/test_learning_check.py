"""A run that learns nothing says so, with causes; one that learns says nothing."""

import json
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import torch

from distill.objectives import Needs, Objective
from tests.batches import make_batch
from tests.objectives import build_objective, losses_of
from tests.training.test_loop import settings, train
from tests.training.test_report import Page
from training.chance import Chance, compute_chance_bounds
from training.learning_causes import find_likely_causes
from training.learning_check import LearningCheck
from training.metrics import evaluate_scores
from training.parallel import Ranks
from training.tally import TargetTally

CLASSES = {"loss": "BCEWithLogitsLoss", "loss_args": {}, "label_smoothing": 0.0}
SOFTMAX = CLASSES | {"loss": "CrossEntropyLoss"}
CASES = {
    "sigmoid": ("target", CLASSES | {"loss_args": {"reduction": "none"}}),
    "probabilities": ("target", CLASSES | {"loss": "BCELoss"}),
    "softmax": ("target", SOFTMAX),
    "smoothed": ("target", CLASSES | {"label_smoothing": 0.2}),
    "smoothed softmax": ("target", SOFTMAX | {"label_smoothing": 0.2}),
    "cmkd": ("cmkd", CLASSES | {"lambda": 0.3}),
    "cmkd softmax": ("cmkd", SOFTMAX | {"lambda": 0.3, "tau": 2.0, "label_smoothing": 0.1}),
    "cosine": ("cosine", {}),
    "mse": ("mse", {}),
    "kl": ("kl", {"temperature": 2.0}),
    "cosine and labels": ("cosine", CLASSES | {"lambda": 0.4}),
}


def batch_of(name, n=60, width=5, seed=0):
    """Random targets and labels of the kind that an objective compares with."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.nn.functional.one_hot(torch.arange(n) % 3, width).float()
    if name.startswith(("cosine", "mse", "kl")):
        return make_batch(target=torch.randn(n, width, generator=random) + torch.arange(width), labels=labels)
    mixed = torch.lerp(labels.flip(0), labels, torch.rand(n, 1, generator=random))
    soft = torch.rand(n, width, generator=random)
    soft = soft / soft.sum(1, keepdim=True) if "softmax" in name else soft
    return make_batch(target=soft if "cmkd" in name else mixed, labels=mixed)


def best_constant(objective, batch, probabilities):
    """Search for the answer, the same for every clip, that has the smallest loss."""
    n, width = batch.target.shape
    answer = torch.zeros(width, dtype=torch.float64, requires_grad=True)
    vector = torch.ones(width, dtype=torch.float64, requires_grad=True)
    batch = replace(batch, target=batch.target.double(), labels=batch.labels.double())
    optimizer = torch.optim.LBFGS([answer, vector], lr=0.5, max_iter=500, tolerance_change=1e-12)

    def loss():
        optimizer.zero_grad()
        output = (answer.sigmoid() if probabilities else answer).expand(n, width)
        value = losses_of(objective, batch, output, vector.expand(n, width))["loss"]
        value.backward()
        return value

    optimizer.step(loss)
    return loss().item()


@pytest.mark.parametrize("name", CASES)
def test_the_constant_loss_is_the_smallest_that_one_output_to_all_clips_has(name):
    kind, arguments = CASES[name]
    objective = build_objective(kind, width=5, **arguments)
    if hasattr(objective, "projection"):
        objective.projection = torch.nn.Identity()  # the answer itself is searched for
    batch = batch_of(name)
    tally = TargetTally(objective)
    for rows in (slice(0, 7), slice(7, 40), slice(40, 60)):
        tally.add(make_batch(target=batch.target[rows], labels=batch.labels[rows]))
    assert tally.constant_loss(Ranks()) == pytest.approx(
        best_constant(objective, batch, name == "probabilities"), rel=1e-4
    )


@pytest.mark.parametrize("name", CASES)
def test_counting_targets_reads_nothing_from_the_device(name):
    """A tensor on the meta device has no values: whatever waited for one would raise."""
    kind, arguments = CASES[name]
    tally = TargetTally(build_objective(kind, width=5, **arguments))
    for _ in range(2):
        tally.add(batch_of(name).to(torch.device("meta")))


def test_what_is_not_known_is_not_evaluated():
    class Custom(Objective):
        @classmethod
        def needs(cls, settings):
            return Needs("classes")

    contrastive, weighed = (
        build_objective("contrastive", width=5),
        CLASSES | {"loss_args": {"pos_weight": torch.ones(1)}},
    )
    for objective in (Custom(None, None, None), contrastive, build_objective("target", **weighed)):
        tally = TargetTally(objective)
        tally.add(batch_of("kl"))
        assert tally.constant_loss(Ranks()) is None
    check = checked(None)
    assert check.end_epoch({"step": 90, "epoch": 9, "loss": 1.0}, None, None) == {}
    assert check.learns is check.summary() is None


@pytest.mark.parametrize("n_clips", [40, 300])
def test_scores_that_know_nothing_are_within_chance_and_those_that_know_a_little_are_not(n_clips):
    random = np.random.default_rng(0)
    n_above = 0
    for trial in range(200):
        targets = np.eye(5)[random.integers(0, 5, n_clips)]
        scores = random.random((n_clips, 5))
        metrics = evaluate_scores(scores, targets)
        n_above += not compute_chance_bounds(scores, targets, trial).holds(metrics.mAP, metrics.top1)
        constant = np.tile(random.random(5), (n_clips, 1))
        metrics = evaluate_scores(constant, targets)
        assert compute_chance_bounds(constant, targets, trial).holds(metrics.mAP, metrics.top1)
    assert n_above <= 3
    scores += 0.5 * targets
    metrics = evaluate_scores(scores, targets)
    assert not compute_chance_bounds(scores, targets, 0).holds(metrics.mAP, metrics.top1)


def test_the_bounds_are_those_of_permuted_clips_and_of_the_largest_class():
    random = np.random.default_rng(0)
    targets = np.eye(4)[[0] * 30 + [1] * 10 + [2] * 20]  # class 3 is absent
    scores = random.random((60, 4))
    permuted = [evaluate_scores(scores, targets[random.permutation(60)]).mAP for _ in range(2000)]
    found = compute_chance_bounds(scores, targets, 1)
    assert found == compute_chance_bounds(scores, targets, 1) != compute_chance_bounds(scores, targets, 2)
    assert np.quantile(permuted, 0.98) < found.mAP < np.mean(permuted) + 7 * np.std(permuted)
    accuracies = random.binomial(60, 0.5, 20000) / 60
    assert (accuracies > found.top1).mean() < 0.002 < (accuracies >= found.top1 - 3 / 60).mean()
    targets[0, 1] = 1  # two labels
    assert compute_chance_bounds(scores, targets, 1).top1 is None


class Fixed:
    """A tally whose constant loss is given."""

    def __init__(self, loss):
        self.loss = loss

    def constant_loss(self, ranks):
        return self.loss

    def reset(self):
        pass


def checked(constant_loss, causes=("a cause",)):
    return LearningCheck(Fixed(constant_loss), 100, 10, lambda constant: list(causes), Ranks())


def entry(epoch, loss):
    return {"step": 10 * epoch, "epoch": epoch, "loss": loss}


def test_it_is_reported_once_that_nothing_is_learned_and_once_that_something_is(caplog):
    check = checked(2.0)
    with caplog.at_level("INFO"):
        assert check.end_epoch(entry(1, 2.1), None, None) == {"constant_loss": 2.0}  # early: not judged
        assert not caplog.records
        assert check.postfix == {}
        for epoch in (2, 3, 4):
            assert check.end_epoch(entry(epoch, 1.97), None, None)["learns"] is False
        assert len(caplog.records) == 1
        assert caplog.records[0].levelname == "WARNING"
        for part in ("NOTHING IS LEARNT after epoch 2 of 10", "loss 1.97,", "of a constant output 2)", "- a cause"):
            assert part in caplog.text
        assert check.postfix
        assert "NOTHING WAS LEARNT" in check.summary()
        for epoch in (5, 6):
            assert check.end_epoch(entry(epoch, 1.9), None, None)["learns"] is True
        assert len(caplog.records) == 2
        assert "the run learns from epoch 5 on" in caplog.records[1].getMessage()
        assert check.postfix == {}
        assert check.summary() is None
        check.end_epoch(entry(7, 1.99), None, None)  # at the edge: no back and forth
        assert len(caplog.records) == 2
        check.end_epoch(entry(8, 2.01), None, None)
        assert "NOTHING IS LEARNT after epoch 8" in caplog.records[2].getMessage()


def test_its_state_goes_on_where_it_was(caplog):
    objective = build_objective("target", **SOFTMAX)
    one, other = (LearningCheck(TargetTally(objective), 100, 10, lambda _: ["a cause"], Ranks()) for _ in range(2))
    batches = [batch_of("softmax", seed=seed) for seed in range(4)]
    one.targets.add(batches[0])
    one.end_epoch(entry(5, 9.0), None, None)
    assert one.alarmed
    one.targets.add(batches[1])
    one.add_loss(3.0)
    state = one.state_dict()
    other.load_state_dict(state, torch.device("cpu"))
    for check in (one, other):
        check.targets.add(batches[2])
        check.add_loss(2.0)
    assert other.losses == one.losses == [3.0, 2.0]
    caplog.clear()
    results = [check.end_epoch(entry(6, 9.0), None, None) for check in (one, other)]
    assert results[0] == results[1]
    assert not caplog.records  # it was said before
    assert one.summary() == other.summary()


def test_a_fall_within_the_noise_of_the_epoch_is_none():
    check = checked(2.0)
    for loss in (1.6, 2.2, 1.5, 2.3):  # a standard error of 0.2
        check.add_loss(loss)
    assert check.end_epoch(entry(5, 1.9), None, None)["learns"] is False
    for loss in (1.88, 1.9, 1.9, 1.92):
        check.add_loss(loss)
    assert check.end_epoch(entry(6, 1.9), None, None)["learns"] is True


def test_a_loss_that_falls_beside_a_validation_at_chance_is_reported_as_such(caplog):
    targets = np.eye(2)[np.arange(200) % 2]
    scores = np.random.default_rng(0).random((200, 2))
    metrics, chance = evaluate_scores(scores, targets), compute_chance_bounds(scores, targets, 0)
    check = checked(0.7)
    more = check.end_epoch(entry(5, 0.1), metrics, chance)
    assert more["learns"] is False
    assert more["valid_chance_mAP"] == chance.mAP
    assert (more["valid_top1"], more["valid_chance_top1"]) == (metrics.top1, chance.top1)
    assert "the loss falls, but the validation metrics are those of chance" in caplog.text
    assert check.end_epoch(entry(6, 0.1), None, None)["learns"] is False  # nothing new is known of it
    metrics = evaluate_scores(targets + scores, targets)
    assert check.end_epoch(entry(7, 0.1), metrics, chance)["learns"] is True
    assert not Chance(1.0, None).holds(0.5, None)  # too few clips to tell


def lines(folder: Path) -> list[dict]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["kind"] == "epoch"]


def relabelled(tone_pack: Path, folder: Path, change) -> str:
    table = pd.read_csv(tone_pack, sep="\t", dtype=str)
    table["hdf5path"] = [str((tone_pack.parent / path).resolve()) for path in table["hdf5path"]]
    change(table)
    table.to_csv(folder / "changed.tsv", sep="\t", index=False)
    return str(folder / "changed.tsv")


def test_a_run_that_learns_raises_no_alarm(tone_pack, tmp_path, caplog):
    with caplog.at_level("INFO"):
        result, run = train(tmp_path, settings(tone_pack, epochs=10, valid_every=1))
    assert result["learns"] is True
    assert "LEARNT" not in caplog.text
    assert [line.get("learns") for line in lines(tmp_path)] == [None] + 9 * [True]
    entropy = -(np.log(1 / 7) / 7 + np.log(6 / 7) * 6 / 7)
    assert [line["constant_loss"] for line in lines(tmp_path)] == pytest.approx(10 * [entropy])
    page = Page((tmp_path / "report.html").read_text())
    assert "NOTHING WAS LEARNT" not in page.text
    assert run.learning.summary() is None


def message(folder, caplog, *parts):
    """See that a run said once, in the log and on top of the report, that it learnt nothing, and why."""
    warnings = [record.getMessage() for record in caplog.records if "NOTHING IS LEARNT" in record.getMessage()]
    assert len(warnings) == 1
    last = caplog.records[-1].getMessage()
    assert last.startswith("NOTHING WAS LEARNT")
    text = Page((folder / "report.html").read_text()).text
    for part in ("NOTHING WAS LEARNT", *parts):
        assert part in last
        assert part in text
    assert text.index("NOTHING WAS LEARNT") < text.index("training data")
    assert lines(folder)[-1]["learns"] is False


def test_without_a_learning_rate_nothing_is_learned_and_it_is_named(tone_pack, tmp_path, caplog):
    changes = {"epochs": 5, "valid_every": 1, "optimizer_args": {"lr": 0.0}, "mixup": 0.3}
    with caplog.at_level("INFO"):
        result, run = train(tmp_path, settings(tone_pack, **changes))
    assert result["learns"] is False
    message(
        tmp_path,
        caplog,
        "learning rate: it is 0",
        "few clips: 28 for 7 classes, a median of 4 a class",
        "with 0.3 every clip",
    )
    assert run.learning.postfix == {"learnt": "NOTHING"}


def test_labels_that_do_not_belong_to_the_clips_are_not_learned(tone_pack, tmp_path, caplog):
    def permute(table):
        table["labels"] = np.random.default_rng(3).permutation(table["labels"])

    changed = relabelled(tone_pack, tmp_path, permute)
    changes = {"train_data": changed, "valid_data": str(tone_pack), "select_on": "valid"}
    with caplog.at_level("INFO"):
        result, _ = train(tmp_path / "run", settings(tone_pack, epochs=10, valid_every=2, **changes))
    assert result["learns"] is False
    message(tmp_path / "run", caplog, "those of chance", "that the labels belong to the clips")


def _zero(item):
    if isinstance(item, h5py.Dataset) and item.dtype.kind == "i" and len(item) > 1000:
        item[...] = 0


def test_silence_is_not_learned(tone_pack, tmp_path, caplog):
    def silence(table):
        source = Path(table["hdf5path"][0])
        (tmp_path / source.name).write_bytes(source.read_bytes())
        with h5py.File(tmp_path / source.name, "r+") as file:
            file.visititems(lambda _, item: _zero(item))
        table["hdf5path"] = str(tmp_path / source.name)

    if pd.read_csv(tone_pack, sep="\t")["hdf5path"].nunique() > 1:
        pytest.skip("the pack has several shards")
    changed = relabelled(tone_pack, tmp_path, silence)
    with caplog.at_level("INFO"):
        train(tmp_path / "run", settings(tone_pack, epochs=5, valid_every=1, train_data=changed))
    message(tmp_path / "run", caplog, "that were checked are silent")


def test_a_long_warm_up_is_named_and_the_epoch_from_which_it_learns(tone_pack, tmp_path, caplog):
    with caplog.at_level("INFO"):
        changes = {"epochs": 20, "valid_every": 20, "warmup_epochs": 18, "optimizer_args": {"lr": 5e-5}}
        result, _ = train(tmp_path, settings(tone_pack, **changes))
    messages = [
        r.getMessage() for r in caplog.records if "run learns from" in r.getMessage() or "LEARNT" in r.getMessage()
    ]
    assert len(messages) == 2
    assert messages[0].startswith("NOTHING IS LEARNT after epoch 4 of 20")
    assert "warm-up: 72 of 80 steps" in messages[0]
    assert "the run learns from epoch" in messages[1]
    learns = [line.get("learns") for line in lines(tmp_path)]
    assert learns[:4] == [None] * 3 + [False]
    assert learns[-1] is result["learns"] is True


def test_it_changes_nothing_that_is_learned(tone_pack, tmp_path, monkeypatch):
    config = settings(tone_pack, epochs=3, valid_every=1, mixup=0.5)
    with_it = train(tmp_path / "with", config)[1].model.state_dict()
    monkeypatch.setattr("training.tally.TargetTally.add", lambda *_: None)
    monkeypatch.setattr("training.loop.compute_chance_bounds", lambda *_: Chance(1.0, None))
    without = train(tmp_path / "without", config)[1].model.state_dict()
    assert all(torch.equal(with_it[key], without[key]) for key in with_it)
    assert not any("constant_loss" in line for line in lines(tmp_path / "without"))


USUAL = {"few clips", "few steps", "otherwise"}  # of 28 tones in four steps


@pytest.mark.parametrize(
    ("changes", "constant", "causes", "part"),
    [
        ({"model_args": {"pooling": "logit", "hop_size": 640}}, True, {"patches"}, "a clip of 1.00 s"),
        ({"freeze": ["blocks.*", "patch_embed.*"]}, True, {"frozen"}, "of the parameters are trained"),
        ({"spectransforms": [{"TimeMasking": {"time_mask_param": 60}}]}, True, {"masks"}, "30% of a clip's frames"),
        ({"optimizer_args": {"lr": 0.5}}, True, {"learning rate"}, "0.5 is high for AdamW"),
        ({"optimizer_args": {"lr": 1e-7}}, True, {"learning rate"}, "1e-07 is low for AdamW"),
        (
            {"model": "mn01_as", "model_args": {}},
            False,
            {"validation clips", "batch norm"},
            "still 96% of the statistics",
        ),
        ({"mixup": 0.4}, False, {"validation clips", "mixup"}, "with 0.4 every clip"),
        ({}, True, set(), "check learning rate 0.003, warm-up 0 steps, 4 steps of 8 clips, mixup none"),
    ],
    ids=["patches", "frozen", "masks", "high rate", "low rate", "batch norm", "mixup", "plain"],
)
def test_causes_name_what_stands_out_in_this_run_and_nothing_else(tone_pack, tmp_path, changes, constant, causes, part):
    _, run = train(tmp_path, settings(tone_pack, epochs=1, valid_every=1, baseline=False, **changes))
    found = find_likely_causes(run, constant)
    assert {sentence.partition(":")[0] for sentence in found} == causes | USUAL
    assert part in "\n".join(found)
