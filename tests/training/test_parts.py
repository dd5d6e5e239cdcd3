"""The small parts of training, each against a slow, obvious reference."""

import logging

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy, binary_cross_entropy_with_logits, cross_entropy

from common.errors import UserError
from distill.dataset import EpochBatches
from distill.objectives import LOSSES, create_objective, register_objective
from models import create_model
from training.checkpoints import BestCheckpoints, average_states
from training.mixup import mix_with_flipped
from training.optim import create_optimizer, parameter_groups, warmup_cosine
from training.precision import Precision, choose_device
from training.student import start_from_data


def test_mixup_of_targets_equals_the_published_mixture_of_losses():
    torch.manual_seed(0)
    mel, target = torch.randn(6, 4, 10), torch.rand(6, 3)
    weight = torch.from_numpy(np.random.default_rng(5).beta(0.5, 0.5, 6).astype(np.float32))[:, None]
    mixed, n_frames, batch = mix_with_flipped(mel, None, {"target": target}, 0.5, np.random.default_rng(5))
    logits = torch.randn(6, 3)
    expected = weight * binary_cross_entropy_with_logits(logits, target, reduction="none")
    expected += (1 - weight) * binary_cross_entropy_with_logits(logits, target.flip(0), reduction="none")
    assert torch.allclose(binary_cross_entropy_with_logits(logits, batch["target"]), expected.mean(), atol=1e-6)
    for i in range(6):
        assert torch.allclose(mixed[i], weight[i] * mel[i] + (1 - weight[i]) * mel[5 - i], atol=1e-6)
    assert n_frames is None


def test_a_mixture_is_as_long_as_its_longer_part():
    n = torch.tensor([10, 4, 7])
    _, n_frames, _ = mix_with_flipped(
        torch.zeros(3, 2, 10), n, {"target": torch.zeros(3, 1)}, 1.0, np.random.default_rng()
    )
    assert n_frames.tolist() == [10, 4, 10]


def test_schedule_warms_up_and_ends_at_its_fraction():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = warmup_cosine(optimizer, 10, 110, 0.1)
    rates = []
    for _ in range(111):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[0] == pytest.approx(2.0 / 11)
    assert rates[10] == pytest.approx(2.0)
    assert rates[60] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    assert rates[110] == pytest.approx(0.2)
    assert rates[:11] == sorted(rates[:11])


def test_adam8bit_without_a_gpu_is_adam_and_says_so(caplog):
    with caplog.at_level(logging.INFO):
        optimizer = create_optimizer("Adam8bit", [nn.Parameter(torch.zeros(1))], {"lr": 0.1}, torch.device("cpu"))
    assert type(optimizer) is torch.optim.Adam
    assert caplog.messages == ["optimizer: Adam in place of Adam8bit, which needs bitsandbytes and a GPU"]


def test_a_wrong_optimizer_argument_is_a_sentence():
    with pytest.raises(UserError, match=r"optimizer_args.*moment"):
        create_optimizer("AdamW", [nn.Parameter(torch.zeros(1))], {"lr": 0.1, "moment": 1}, torch.device("cpu"))


def test_amp_without_a_gpu_computes_in_float32_and_says_so(caplog):
    with caplog.at_level(logging.INFO):
        precision = Precision("amp", torch.device("cpu"))
    assert precision.dtype is None
    assert not precision.scaler.is_enabled()
    assert "float32" in caplog.text
    with Precision("amp_bf16", torch.device("cpu")).context():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is torch.bfloat16


def test_an_unknown_device_is_a_sentence():
    with pytest.raises(UserError, match="'gpu' is not known"):
        choose_device("gpu")


def test_norms_biases_and_position_embeddings_are_not_decayed():
    model = create_model("audiotransformer_pico", num_classes=2)
    decayed, others = parameter_groups(model, None)
    names = {id(p): name for name, p in model.named_parameters()}
    spared = {names[id(p)] for p in others["params"]}
    assert others["weight_decay"] == 0.0
    assert {"time_pos_embed", "freq_pos_embed", "norm.weight", "outputlayer.1.bias", "init_bn.1.weight"} <= spared
    assert not any(name.endswith(".weight") and "norm" not in name and "outputlayer.0" not in name
                   and "init_bn" not in name for name in spared)  # fmt: skip
    assert len(decayed["params"]) + len(others["params"]) == len(names)


def test_weights_that_were_loaded_are_left_as_they_are():
    model = create_model("audiotransformer_pico", num_classes=3, pooling="logit")
    nn.init.constant_(model.outputlayer[1].bias, 3.0)
    model.init_bn[1].num_batches_tracked.fill_(7)
    batch = {"waveforms": {16000: torch.randn(2, 16000)}, "lengths": {16000: None}, "target": torch.ones(2, 3)}
    start_from_data(model, [batch])
    assert model.outputlayer[1].bias.tolist() == [3.0] * 3


def test_averaging_is_the_mean_of_floats_and_keeps_counters():
    states = [{"w": torch.tensor([1.0, 5.0]), "scale": torch.tensor(2.0), "n": torch.tensor(7)},
              {"w": torch.tensor([3.0, 6.0]), "scale": torch.tensor(4.0), "n": torch.tensor(9)}]  # fmt: skip
    mean = average_states(states)
    assert mean["w"].tolist() == [2.0, 5.5]
    assert mean["scale"].item() == 3.0
    assert mean["n"].item() == 7


def test_the_best_n_checkpoints_are_kept_and_averaged(tmp_path):
    model = create_model("audiotransformer_pico", num_classes=2)
    best = BestCheckpoints(tmp_path, 2)
    answers = []
    for epoch, score in enumerate([0.3, 0.5, 0.2, 0.4], 1):
        nn.init.constant_(model.outputlayer[1].bias, epoch)
        answers.append(best.offer(model, score, epoch))
    assert answers == [True, True, False, False]
    assert sorted(p.name for p in tmp_path.glob("best*")) == [
        "best_epoch=0002_mAP=0.5000.pt",
        "best_epoch=0004_mAP=0.4000.pt",
    ]
    best.average(model)
    assert model.outputlayer[1].bias.tolist() == [3.0, 3.0]
    assert (tmp_path / "averaged.pt").is_file()
    best.restore_best(model)
    assert model.outputlayer[1].bias.tolist() == [2.0, 2.0]


def test_a_pass_shows_each_item_once_and_the_next_pass_another_order():
    stream = iter(EpochBatches(10, 4, seed=1))
    passes = [[key for batch in (next(stream), next(stream), next(stream)) for key in batch] for _ in range(2)]
    for number, keys in enumerate(passes, 1):
        assert sorted(item for _, item in keys) == list(range(10))
        assert {epoch for epoch, _ in keys} == {number}
    assert [i for _, i in passes[0]] != [i for _, i in passes[1]]


def test_batches_of_an_epoch_length_run_on_into_the_next_pass():
    stream = iter(EpochBatches(10, 4, seed=1, cut_passes=False))
    batches = [next(stream) for _ in range(5)]
    assert [len(b) for b in batches] == [4] * 5
    assert [epoch for epoch, _ in batches[2]] == [1, 1, 2, 2]


def test_balanced_sampling_draws_as_the_weights_say():
    weights = np.array([1.0, 3.0])
    stream = iter(EpochBatches(2, 100, seed=0, weights=weights, cut_passes=False))
    items = [item for _ in range(40) for _, item in next(stream)]
    assert np.mean(items) == pytest.approx(0.75, abs=0.03)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_each_loss_equals_its_plain_definition(name):
    torch.manual_seed(0)
    output, target = torch.randn(5, 4), torch.rand(5, 4)
    objective = create_objective("target", loss=name, loss_args={"reduction": "none"} if "BCE" in name else {})
    if name == "BCELoss":
        output = output.sigmoid()
        expected = binary_cross_entropy(output, target)
    elif name == "BCEWithLogitsLoss":
        expected = binary_cross_entropy_with_logits(output, target)
    else:
        expected = cross_entropy(output, target / target.sum(1, keepdim=True))
    assert torch.allclose(objective(output, {"target": target})["loss"], expected)


def test_an_objective_is_added_in_one_place():
    @register_objective("twice_the_mean")
    class TwiceTheMean:
        wants = None

        def __call__(self, output, batch):
            return {"loss": 2 * output.mean()}

    assert create_objective("twice_the_mean")(torch.ones(2, 2), {})["loss"] == 2.0
    with pytest.raises(UserError, match="did you mean 'twice_the_mean'"):
        create_objective("twice_the_meen")


def test_a_model_started_from_data_answers_with_the_prior_and_knows_the_level():
    torch.manual_seed(0)
    model = create_model("audiotransformer_pico", num_classes=3, pooling="logit")
    waveform = 0.3 * torch.randn(8, 16000)
    target = torch.tensor([[1.0, 0.0, 0.2]]).repeat(8, 1)
    batches = [{"waveforms": {16000: waveform}, "lengths": {16000: None}, "target": target}] * 3
    start_from_data(model, batches)
    mel = model.front_end(waveform)
    norm = model.init_bn[1]
    assert torch.allclose(norm.running_mean, mel.mean(dim=(0, 2)), atol=0.1)
    assert norm.momentum == 0.01
    with torch.no_grad():
        model.outputlayer[1].weight.zero_()
    assert torch.allclose(model.eval().predict(waveform)[0], target[0], atol=1e-3)
