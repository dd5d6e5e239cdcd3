"""Training, for real, on a few tones."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.utils.parametrize
from scipy.stats import kstest

from audio.cutting import Chunks
from audio.dataset import Pack
from common.errors import Faults, UserError
from distill.dataset import ReplayDataset
from distill.objectives import Needs, register_objective
from distill.replay import Replay
from distill.sources import SeededItems
from models import Ensemble, create_model, load_tagger
from models.parametrizations import register_parametrization
from tests.objectives import define_objective
from training.config import SoftTargetConfig, TrainConfig
from training.data import open_training
from training.evaluate import evaluate
from training.labelled import open_labelled
from training.loop import Run, RunParts
from training.needs import plan_run
from training.precision import Precision
from training.store_writer import SoftTargetContent, StoreWriter
from training.student import create_student
from training.trainer import Trainer

CPU = torch.device("cpu")


def settings(tone_pack, **changes):
    return TrainConfig(
        **{
            "train_data": str(tone_pack),
            "eval_data": str(tone_pack),
            "model": "audiotransformer_pico",
            "model_args": {"pooling": "logit"},
            "pretrained": False,
            "loss": "BCEWithLogitsLoss",
            "init_from_data": True,
            "batch_size": 8,
            "epochs": 25,
            "warmup_epochs": 1,
            "valid_every": 5,
            "optimizer": "AdamW",
            "optimizer_args": {"lr": 0.003},
            "num_workers": 0,
            "device": "cpu",
        }
        | changes
    )


def train(folder: Path, config: TrainConfig, seed=1):
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    faults = Faults("the test")
    plan = plan_run(config, faults)
    data = open_training(config, seed, faults, plan.needs)
    faults.raise_if_any()
    model = create_student(config, data.labels, plan.needs)
    run = Run(config, RunParts(data, model, plan.build(model), plan.needs, CPU, seed), folder)
    return run.fit(), run


@pytest.mark.parametrize("loss", ["BCEWithLogitsLoss", "CrossEntropyLoss"])
def test_a_model_learns_seven_classes_named_by_words(tone_pack, tmp_path, loss):
    result, run = train(tmp_path, settings(tone_pack, loss=loss))
    assert run.model.labels == [f"tone {i}" for i in range(7)]
    assert result["top1"] > 0.9
    assert result["mAP"] > 0.9
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["kind"] == "epoch"]
    assert [line["epoch"] for line in lines] == list(range(1, 26))
    assert lines[-1]["loss"] < lines[0]["loss"] / 2
    assert Path(result["weights"]).is_file()
    saved = json.loads((tmp_path / "results.json").read_text())
    assert saved["clips"] == 28
    assert saved["chance_mAP"] == pytest.approx(1 / 7)
    assert len((tmp_path / "results_per_class.csv").read_text().splitlines()) == 8


@pytest.mark.parametrize("changes", [{}, {"mixup": 0.5, "sampler": "balanced"}, {"mode": "amp_bf16"}], ids=str)
def test_the_same_seed_gives_the_same_weights_with_any_number_of_workers(tone_pack, tmp_path, changes):
    short = {"epochs": 2, "valid_every": 2} | changes
    one, two = (
        train(tmp_path / str(n), settings(tone_pack, num_workers=n, **short))[1].model.state_dict() for n in (0, 2)
    )
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_training_on_chunks_covers_the_whole_of_a_long_clip(tone_pack):
    faults = Faults("the test")
    data = open_training(settings(tone_pack, chunk_length=0.25), 1, faults, Needs("classes"))
    assert not faults.sentences
    assert len(data.source.chunks) == 28 * 4
    assert np.array_equal(data.source.target(1, 5), np.eye(7)[1])


def test_patch_out_draws_from_the_runs_own_generator(tone_pack, tmp_path):
    arguments = {"pooling": "logit", "time_patch_out": 2}
    short = settings(tone_pack, model_args=arguments, epochs=1, valid_every=1, init_from_data=False)
    a, b = (train(tmp_path / name, short)[1].model.state_dict() for name in "ab")
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_loss_that_is_not_finite_stops_with_the_names_of_the_batch(tone_pack, tmp_path):
    changes = {"optimizer": "SGD", "optimizer_args": {"lr": 1e30}, "use_scheduler": False, "init_from_data": False}
    with pytest.raises(UserError, match=r"the loss is (nan|inf).*sounds/tone_\d+\.wav"):
        train(tmp_path, settings(tone_pack, **changes))


def test_the_first_batches_looked_at_are_trained_on_as_well(tone_pack, tmp_path, monkeypatch):
    """Every stored epoch in order: looking at the data first must not use any of it up."""
    seen = []

    def look(self, parts, weights, number):
        seen.extend(parts[0].item.tolist())
        return {"loss": torch.ones(()), "grad_norm": torch.ones(())}

    monkeypatch.setattr(Trainer, "step", look)
    train(tmp_path, settings(tone_pack, epochs=1, valid_every=1))
    assert sorted(seen) == list(range(28))


def test_an_objective_of_its_own_brings_losses_parameters_and_rates(tone_pack, tmp_path):
    def compute(objective, student, batch):
        assert batch.waveforms[8000].shape[1] == 8000
        output = student.forward_spectrogram(batch.mel, batch.n_frames)
        return {"loss": (output.mean() - objective.level) ** 2, "level": objective.level}

    needs = Needs("classes", output="logits", sample_rates=(8000,))
    kind = define_objective("towards_a_learnt_level", needs, compute, start=0.0)

    class WithLevel(kind):
        def __init__(self, settings, student, facts):
            super().__init__(settings, student, facts)
            self.level = torch.nn.Parameter(torch.tensor(settings.start))

    register_objective("towards_a_learnt_level")(WithLevel)
    config = settings(tone_pack, epochs=2, valid_every=2, init_from_data=False)
    config = config.model_copy(
        update={"objective": "towards_a_learnt_level", "objective_args": {"start": 5.0}, "loss": "BCELoss"}
    )
    _, run = train(tmp_path, config)
    objective = run.objective
    assert objective.level.item() < 5.0
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["kind"] == "epoch"]
    assert lines[1]["level"] < lines[0]["level"] < 5.0


class Sign(torch.nn.Module):
    """Two-level weights, by a straight-through estimator."""

    def forward(self, weight):
        return weight + (weight.sign() * weight.abs().mean() - weight).detach()


@register_parametrization("test_signs")
def _sign_weights(model, *, only):
    for name, layer in model.named_modules():
        if name.endswith(only):
            torch.nn.utils.parametrize.register_parametrization(layer, "weight", Sign())


def test_changed_parameters_are_trained_saved_evaluated_and_tagged_with(tone_pack, tmp_path):
    """What training wrote is what every command computes with; nothing but the argument says that they are changed."""
    changed = {"pooling": "logit", "parametrize": {"test_signs": {"only": "fc1"}}}
    result, run = train(tmp_path, settings(tone_pack, model_args=changed, epochs=6, valid_every=3))
    layer = run.model.blocks[0].mlp.fc1
    assert torch.allclose(layer.weight.abs(), layer.weight.abs().mean(), rtol=1e-5)
    assert layer.parametrizations.weight.original.abs().std() > 1e-3  # what is learnt is not
    model = load_tagger(result["weights"])
    sound = torch.randn(2, 16000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model.predict(sound), run.model.eval().predict(sound))
    data = open_labelled(str(tone_pack), model.labels, Faults("the test"))
    found = evaluate(model, data, batch_size=8, num_workers=0, precision=Precision("fp32", CPU))
    assert found.mAP == result["mAP"]
    assert torch.allclose(model.blocks[0].mlp.fc1.weight.abs().std(), torch.zeros(()), atol=1e-6)


def test_without_consistency_clips_are_not_shifted_and_masks_are_drawn_anew(tone_pack):
    """As the published code runs it: 0 of 24 clips shifted. The stored seed decides nothing about the input."""
    pack = Pack.open(tone_pack)
    chunks = Chunks.whole(np.full(24, 16000), 16000)

    def shown(consistent, store_seed, seed=3):
        source = SeededItems(chunks, Replay({"Shift": {}}, [{"TimeMasking": {}}]), seed=store_seed)
        dataset = ReplayDataset(pack, source, [16000], consistent=consistent, seed=seed)
        return [[dataset[(epoch, item)] for item in range(24)] for epoch in (1, 2)]

    def draws(epochs):
        return [[(item["value"], item["min_value"]) for item in items] for items in epochs]

    def n_shifted(epochs):
        clips = [torch.from_numpy(pack.read(i, 0, 16000)) for i in range(24)]
        return [
            sum(not torch.equal(item["waveforms"][16000], clip) for item, clip in zip(items, clips, strict=True))
            for items in epochs
        ]

    replayed, fresh = shown(True, store_seed=3), shown(False, store_seed=3)
    assert all(6 <= n <= 18 for n in n_shifted(replayed))  # each with a probability of a half
    assert n_shifted(fresh) == [0, 0]
    assert draws(shown(False, store_seed=4)) == draws(fresh) != draws(shown(False, store_seed=3, seed=4))
    other, new = ({pair for items in draws(epochs) for pair in items} for epochs in (replayed, fresh))
    assert not other & new
    assert len(new) == 48  # another in every epoch
    assert kstest(np.array(draws(fresh)).ravel(), "uniform").pvalue > 0.01


@pytest.mark.parametrize("disabled", [False, True])
def test_the_key_disable_consistency_reaches_the_clips_of_a_run(tone_pack, tmp_path, disabled):
    store = tmp_path / "store"
    given = {"model": "audiotransformer_pico", "epochs": 1, "topk": 3, "num_workers": 0, "device": "cpu"}
    given |= {"wavtransforms": {"Shift": {"p": 1.0}}, "spectransforms": []}
    labels = [f"tone {i}" for i in range(7)]
    teacher = Ensemble([create_model("audiotransformer_pico", num_classes=7, labels=labels, depth=1)])
    config = SoftTargetConfig(train_data=str(tone_pack), **given)
    StoreWriter(config, Pack.open(tone_pack), SoftTargetContent(teacher, 3), store).save()
    changes = {"logitspath": str(store), "disable_consistency": disabled, "epochs": 1, "valid_every": 1}
    _, run = train(tmp_path / "run", settings(tone_pack, **changes))
    for item, (clip, start, stop) in enumerate(run.data.source.chunks):
        shown = run.dataset[(1, item)]["waveforms"][16000].numpy()
        assert np.array_equal(shown, run.data.pack.read(clip, start, stop)) is disabled


@pytest.mark.parametrize(("fill_by", "tail"), [("silence", "zeros"), ("repeat", "the clip again")])
def test_short_items_are_brought_to_one_length(tone_pack, fill_by, tail):
    pack = Pack.open(tone_pack)
    source = SeededItems(Chunks.whole(np.array([3000, 16000]), pack.sample_rate), Replay(), 1)
    rates = [16000, 8000]
    plain = ReplayDataset(pack, source, rates)
    filled = ReplayDataset(pack, source, rates, fill_seconds=0.5, fill_by=fill_by)
    for rate in rates:
        clip, wanted = plain[(1, 0)]["waveforms"][rate], rate // 2
        expected = torch.zeros(wanted)
        for index in range(wanted):  # slow and obvious
            expected[index] = clip[index % len(clip)] if tail != "zeros" or index < len(clip) else 0.0
        assert torch.equal(filled[(1, 0)]["waveforms"][rate], expected)
        assert torch.equal(filled[(1, 1)]["waveforms"][rate], plain[(1, 1)]["waveforms"][rate][:wanted])


def test_repeated_clips_train_a_network_that_cannot_mask_padding(tone_pack, tmp_path, caplog):
    changes = {"model": "mn01_as", "model_args": {"width": 0.1}, "epochs": 1, "valid_every": 1}
    changes |= {"chunk_length": 1.0, "fill_chunks": "repeat"}
    _, run = train(tmp_path, settings(tone_pack, **changes))
    lengths = {len(run.dataset[(1, item)]["waveforms"][run.model.sample_rate]) for item in range(28)}
    assert lengths == {run.model.sample_rate}
    assert "batch norm learns with other statistics" not in caplog.text
