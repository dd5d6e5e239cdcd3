"""The small parts of training, each against a slow, obvious reference."""

import itertools
import logging

import numpy as np
import pytest
import torch
from scipy.stats import kstest
from torch import nn
from torch.nn.functional import binary_cross_entropy, binary_cross_entropy_with_logits, cross_entropy

from audio.cutting import Chunks
from audio.dataset import Pack
from common.errors import UserError
from distill.dataset import EpochBatches, ReplayDataset
from distill.objectives import Needs, plan_objective
from distill.objectives.target import LOSSES
from distill.replay import Replay
from distill.sources import SeededItems
from models import create_model
from models.devices import choose_device
from tests.batches import make_batch
from tests.objectives import build_objective, define_objective, losses_of
from training.averaging import MovingAverage, average_states
from training.evaluate import group_by_length
from training.mixup import mix_spectrograms, mix_targets, mix_waveforms
from training.optim import create_optimizer, create_schedule, freeze, layer_depths, parameter_groups
from training.precision import Precision
from training.student import check_lengths, start_from_data


def test_mixup_of_targets_equals_the_published_mixture_of_losses():
    torch.manual_seed(0)
    mel, target, weight = torch.randn(6, 4, 10), torch.rand(6, 3), torch.rand(6)
    mixed, n_frames = mix_spectrograms(mel, None, weight)
    batch = mix_targets(make_batch(target=target, mixup_weight=weight))
    logits, weight = torch.randn(6, 3), weight[:, None]
    expected = weight * binary_cross_entropy_with_logits(logits, target, reduction="none")
    expected += (1 - weight) * binary_cross_entropy_with_logits(logits, target.flip(0), reduction="none")
    assert torch.allclose(binary_cross_entropy_with_logits(logits, batch.target), expected.mean(), atol=1e-6)
    for i in range(6):
        assert torch.allclose(mixed[i], weight[i] * mel[i] + (1 - weight[i]) * mel[5 - i], atol=1e-6)
    assert n_frames is None


def test_mixed_waveforms_are_the_sum_of_two_sounds_as_long_as_the_longer():
    waveform, n, weight = torch.randn(3, 50), torch.tensor([50, 20, 30]), torch.tensor([0.2, 0.5, 0.9])
    batch = mix_waveforms(make_batch(waveforms={8: waveform}, lengths={8: n}, mixup_weight=weight))
    assert torch.allclose(batch.waveforms[8][0], 0.2 * waveform[0] + 0.8 * waveform[2], atol=1e-6)
    assert batch.lengths[8].tolist() == [50, 20, 50]
    assert mix_waveforms(make_batch(waveforms={8: waveform}, mixup_weight=weight)).lengths == {8: None}


def test_a_mixture_is_as_long_as_its_longer_part():
    _, n_frames = mix_spectrograms(torch.zeros(3, 2, 10), torch.tensor([10, 4, 7]), torch.ones(3))
    assert n_frames is not None
    assert n_frames.tolist() == [10, 4, 10]


def test_mixup_weights_follow_their_distribution_and_are_a_function_of_seed_epoch_and_item(tone_pack):
    pack = Pack.open(tone_pack)
    source = SeededItems(Chunks.cut(np.array([64000]), 16000, 0.01), Replay(), seed=3)
    dataset = ReplayDataset(pack, source, [], mixup=0.5, seed=3)
    drawn = np.array([dataset[(1, i)]["mixup_weight"] for i in range(400)])
    assert kstest(drawn, "beta", args=(0.5, 0.5)).pvalue > 0.01
    assert dataset[(1, 7)]["mixup_weight"] == drawn[7]
    assert dataset[(2, 7)]["mixup_weight"] != drawn[7]
    assert ReplayDataset(pack, source, [], mixup=0.5, seed=4)[(1, 7)]["mixup_weight"] != drawn[7]


@pytest.mark.parametrize(("shape", "quarter", "end"), [
    ("cosine", 0.1 + 0.9 * (1 + 0.5**0.5) / 2, 0.1), ("linear", 0.775, 0.1), ("constant", 1.0, 1.0)
])  # fmt: skip
def test_schedule_warms_up_and_ends_at_its_fraction(shape, quarter, end):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = create_schedule(optimizer, shape, 10, 110, 0.1)
    rates = []
    for _ in range(111):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[0] == pytest.approx(2.0 / 11)
    assert rates[10] == pytest.approx(2.0)
    assert rates[35] == pytest.approx(2.0 * quarter)
    assert rates[110] == pytest.approx(2.0 * end)
    assert rates[:11] == sorted(rates[:11])


def test_adam8bit_without_a_gpu_is_adam_and_logs_it(caplog):
    with caplog.at_level(logging.INFO):
        optimizer = create_optimizer("Adam8bit", [nn.Parameter(torch.zeros(1))], {"lr": 0.1}, torch.device("cpu"))
    assert type(optimizer) is torch.optim.Adam
    assert caplog.messages == ["optimizer: Adam in place of Adam8bit, which needs bitsandbytes and a GPU"]


def test_a_wrong_optimizer_argument_is_a_sentence():
    with pytest.raises(UserError, match=r"optimizer_args.*moment"):
        create_optimizer("AdamW", [nn.Parameter(torch.zeros(1))], {"lr": 0.1, "moment": 1}, torch.device("cpu"))


def test_amp_without_a_gpu_computes_in_float32_and_logs_it(caplog):
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
    decayed, others = parameter_groups(model, nn.Identity())
    names = {id(p): name for name, p in model.named_parameters()}
    spared = {names[id(p)] for p in others["params"]}
    assert others["weight_decay"] == 0.0
    assert {"time_pos_embed", "freq_pos_embed", "norm.weight", "outputlayer.1.bias", "init_bn.1.weight"} <= spared
    assert not any(name.endswith(".weight") and "norm" not in name and "outputlayer.0" not in name
                   and "init_bn" not in name for name in spared)  # fmt: skip
    assert len(decayed["params"]) + len(others["params"]) == len(names)


def test_layer_decay_slows_each_block_relative_to_the_one_above():
    model = create_model("audiotransformer_pico", num_classes=2)  # four blocks
    rates = {}
    for group in parameter_groups(model, nn.Identity(), 0.01, 0.5):
        rates |= {id(p): group["lr"] for p in group["params"]}
    by_name = {name: rates[id(p)] for name, p in model.named_parameters()}
    assert by_name["outputlayer.1.weight"] == by_name["norm.bias"] == 0.01
    assert [by_name[f"blocks.{i}.mlp.fc1.weight"] for i in (3, 2, 1, 0)] == [0.005, 0.0025, 0.00125, 0.000625]
    assert by_name["patch_embed.proj.weight"] == by_name["time_pos_embed"] == pytest.approx(0.0003125)
    depths = layer_depths(create_model("mn02_as", num_classes=2))
    assert depths["features.0.0.weight"] == 1
    assert depths["classifier.5.weight"] == max(depths.values())


def test_frozen_parameters_stay_and_their_modules_rest():
    model = create_model("audiotransformer_pico", num_classes=2)
    resting = freeze(model, ["patch_embed.*", "blocks.[01].*", "init_bn.*"])
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == {
        name
        for name, _ in model.named_parameters()
        if name.startswith(("patch_embed", "blocks.0", "blocks.1", "init_bn"))
    }
    assert model.init_bn[1] in resting
    assert model.blocks[2] not in resting
    trained = sum(len(group["params"]) for group in parameter_groups(model, nn.Identity()))
    assert trained == sum(p.requires_grad for p in model.parameters())
    with pytest.raises(UserError, match=r"no parameter matches 'stem.1'.*blocks"):
        freeze(model, ["stem.1"])
    with pytest.raises(UserError, match="no parameter is left to train"):
        freeze(model, ["*"])


def test_the_moving_average_equals_its_plain_recurrence_and_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    average = MovingAverage(model, 0.9)
    expected = model[0].weight.detach().clone()
    for n in range(30):
        with torch.no_grad():
            model[0].weight.add_(1.0)
        model[1].num_batches_tracked.add_(1)
        average.update()
        decay = min(0.9, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * model[0].weight.detach()
    own = model[0].weight.detach().clone()
    with average.applied():
        assert torch.allclose(model[0].weight, expected, atol=1e-5)
        assert model[1].num_batches_tracked.item() == 30
    assert torch.equal(model[0].weight, own)
    other = MovingAverage(model, 0.9)
    other.load_state_dict(average.state_dict())
    assert torch.equal(other.average["0.weight"], average.average["0.weight"])


@pytest.mark.parametrize(("loss", "expected"), [
    ("BCEWithLogitsLoss", [0.95, 0.05, 0.05, 0.05]), ("CrossEntropyLoss", [0.925, 0.025, 0.025, 0.025])
])  # fmt: skip
def test_label_smoothing_moves_a_tenth_to_what_has_nothing(loss, expected):
    output = torch.randn(1, 4)
    one_hot = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    smoothed = build_objective("target", loss=loss, loss_args={}, label_smoothing=0.1)
    plain = build_objective("target", loss=loss, loss_args={})
    assert losses_of(smoothed, make_batch(target=one_hot), output)["loss"] == pytest.approx(
        losses_of(plain, make_batch(target=torch.tensor([expected])), output)["loss"].item()
    )
    if loss == "CrossEntropyLoss":
        assert losses_of(smoothed, make_batch(target=one_hot), output)["loss"] == pytest.approx(
            cross_entropy(output, one_hot, label_smoothing=0.1).item()
        )


@pytest.mark.parametrize("cut", [True, False])
def test_batches_from_a_step_on_are_those_of_the_whole_order(cut):
    whole = iter(EpochBatches(np.arange(5, 15), 4, seed=1, cut_passes=cut))
    batches = [next(whole) for _ in range(9)]
    later = EpochBatches(np.arange(5, 15), 4, seed=1, cut_passes=cut, start=5)
    assert list(itertools.islice(later, 4)) == batches[5:]
    assert [later.size(step) for step in range(9)] == [len(batch) for batch in batches]


def test_weights_that_were_loaded_are_left_as_they_are():
    model = create_model("audiotransformer_pico", num_classes=3, pooling="logit")
    nn.init.constant_(model.outputlayer[1].bias, 3.0)
    model.init_bn[1].num_batches_tracked.fill_(7)
    batch = make_batch(waveforms={16000: torch.randn(2, 16000)}, target=torch.ones(2, 3))
    start_from_data(model, [batch])
    assert model.outputlayer[1].bias.tolist() == [3.0] * 3


def test_averaging_is_the_mean_of_floats_and_keeps_counters():
    states = [{"w": torch.tensor([1.0, 5.0]), "scale": torch.tensor(2.0), "n": torch.tensor(7)},
              {"w": torch.tensor([3.0, 6.0]), "scale": torch.tensor(4.0), "n": torch.tensor(9)}]  # fmt: skip
    mean = average_states(states)
    assert mean["w"].tolist() == [2.0, 5.5]
    assert mean["scale"].item() == 3.0
    assert mean["n"].item() == 7


def test_a_pass_shows_each_item_once_and_the_next_pass_another_order():
    stream = iter(EpochBatches(np.arange(10), 4, seed=1))
    passes = [[key for batch in (next(stream), next(stream), next(stream)) for key in batch] for _ in range(2)]
    for number, keys in enumerate(passes, 1):
        assert sorted(item for _, item in keys) == list(range(10))
        assert {epoch for epoch, _ in keys} == {number}
    assert [i for _, i in passes[0]] != [i for _, i in passes[1]]


def test_batches_of_an_epoch_length_run_on_into_the_next_pass():
    stream = iter(EpochBatches(np.arange(10), 4, seed=1, cut_passes=False))
    batches = [next(stream) for _ in range(5)]
    assert [len(b) for b in batches] == [4] * 5
    assert [epoch for epoch, _ in batches[2]] == [1, 1, 2, 2]


def test_balanced_sampling_draws_as_the_weights_say():
    weights = np.array([1.0, 3.0])
    stream = iter(EpochBatches(np.arange(2), 100, seed=0, weights=weights, cut_passes=False))
    items = [item for _ in range(40) for _, item in next(stream)]
    assert np.mean(items) == pytest.approx(0.75, abs=0.03)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_each_loss_equals_its_plain_definition(name):
    torch.manual_seed(0)
    output, target = torch.randn(5, 4), torch.rand(5, 4)
    objective = build_objective("target", loss=name, loss_args={"reduction": "none"} if "BCE" in name else {})
    if name == "BCELoss":
        output = output.sigmoid()
        expected = binary_cross_entropy(output, target)
    elif name == "BCEWithLogitsLoss":
        expected = binary_cross_entropy_with_logits(output, target)
    else:
        expected = cross_entropy(output, target / target.sum(1, keepdim=True))
    assert torch.allclose(losses_of(objective, make_batch(target=target), output)["loss"], expected)


def test_an_objective_is_added_in_one_place():
    def compute(objective, student, batch):
        return {"loss": objective.settings.factor * student.forward_spectrogram(batch.mel).mean()}

    define_objective("twice_the_mean", Needs("none", output="logits"), compute, factor=2.0)
    assert losses_of(build_objective("twice_the_mean"), make_batch(target=torch.ones(2, 2)), torch.ones(2, 2)) == {
        "loss": 2.0
    }
    with pytest.raises(UserError, match="did you mean 'twice_the_mean'"):
        plan_objective("twice_the_meen")


def test_a_model_started_from_data_outputs_with_the_prior_and_has_the_level():
    torch.manual_seed(0)
    model = create_model("audiotransformer_pico", num_classes=3, pooling="logit")
    waveform = 0.3 * torch.randn(8, 16000)
    target = torch.tensor([[1.0, 0.0, 0.2]]).repeat(8, 1)
    batches = [make_batch(waveforms={16000: waveform}, target=target)] * 3
    start_from_data(model, batches)
    mel = model.front_end(waveform)
    norm = model.init_bn[1]
    assert torch.allclose(norm.running_mean, mel.mean(dim=(0, 2)), atol=0.1)
    assert norm.momentum == 0.01
    with torch.no_grad():
        model.outputlayer[1].weight.zero_()
    assert torch.allclose(model.eval().predict(waveform)[0], target[0], atol=1e-3)


def test_batch_norm_on_clips_of_several_lengths_is_warned_of(caplog):
    norms, masks = create_model("mn01_as", num_classes=2), create_model("audiotransformer_pico", num_classes=2, depth=1)
    with caplog.at_level("WARNING"):
        check_lengths(norms, np.array([16000, 16100]), 1)
        check_lengths(masks, np.array([16000, 80000]), 1)
        assert not caplog.records
        check_lengths(norms, np.array([16000, 80000]), 1)
    assert "its batch norm is trained with other statistics than it uses in evaluation" in caplog.text
    with pytest.raises(UserError, match="which is not supported with several processes"):
        check_lengths(norms, np.array([16000, 16100]), 2)


def test_batches_of_long_clips_are_smaller():
    n_samples = np.array([5, 5, 5, 5, 5, 30, 40, 1000, 5000])
    order = np.argsort(n_samples, kind="stable")
    assert group_by_length(order, n_samples, 4, 30) == [[0, 1, 2, 3], [4, 5, 6], [7], [8]]
    assert group_by_length(order[:5], n_samples, 2, 30) == [[0, 1], [2, 3], [4]]
