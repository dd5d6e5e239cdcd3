import copy

import pytest
import torch

from scripts.benchmark import Benchmark
from scripts.benchmarks.train import (
    count_flops,
    create_transformer,
    make_batch,
    plain_step,
    project_step,
    table,
    take_turns,
)

CPU = torch.device("cpu")


@pytest.fixture
def network():
    torch.manual_seed(0)
    return create_transformer("audiotransformer_pico", 7)


def test_both_steps_learn_the_same(network):
    batch = make_batch(network, 3, 1.3, CPU, seed=1)
    plain_model, our_model = copy.deepcopy(network), copy.deepcopy(network)
    plain, ours = plain_step(plain_model, "fp32", CPU), project_step(our_model, "fp32", CPU, compiled=False)
    for _ in range(4):  # the second and later ones tell whether the weights moved alike
        assert float(ours(batch)) == pytest.approx(float(plain(batch)), rel=1e-4)
    for mine, other in zip(our_model.buffers(), plain_model.buffers(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-3)


def test_the_steps_take_turns(network):
    calls = []
    contenders = {name: lambda batch, name=name: calls.append(name) or 0.0 for name in "ab"}
    seconds = take_turns(contenders, {}, rounds=2, steps=1, device=CPU)
    assert calls == [*"aabb", *"ab", *"ba"]
    assert [len(times) for times in seconds.values()] == [2, 2]


def test_operations_grow_with_the_batch(network):
    one, two = (count_flops(network, make_batch(network, n, 1.0, CPU, seed=0)) for n in (1, 2))
    assert two == 2 * one > 0


def test_table_holds_speed_ratio_and_utilisation():
    text = table({"plain": [2.0, 4.0], "project": [1.0, 4.0]}, 8, 3 * 10**12, "plain", peak_tflops=10.0)
    _, plain, project = text.splitlines()
    assert plain.split() == ["plain", "3.0", "(2.0,", "4.0)", "1.00", "(1.00,", "1.00)", "1", "10.0", "%"]
    assert project.split() == ["project", "5.0", "(2.0,", "8.0)", "1.50", "(1.00,", "2.00)", "1.2", "12.0", "%"]


def test_command_prints_its_table(capsys):
    Benchmark().train("audiotransformer_pico", seconds=1, batch_size=2, steps=2, rounds=1, device="cpu")
    out = capsys.readouterr().out
    assert "training steps of audiotransformer_pico, fp32, 2 clips of 1 s" in out
    assert [line.split()[0] for line in out.splitlines()[-2:]] == ["plain", "project"]


@pytest.mark.parametrize(("model", "seconds"), [("mn04_as", 1), ("audiotransformer_pico", 11)])
def test_what_the_plain_step_does_not_know_is_told(model, seconds, capsys):
    with pytest.raises(SystemExit):
        Benchmark().train(model, seconds=seconds, device="cpu")
    assert "plain step" in capsys.readouterr().err
