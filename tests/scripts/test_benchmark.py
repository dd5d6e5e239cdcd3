import copy
import re

import pytest
import torch

from common.errors import UserError
from scripts.benchmark import Benchmark
from scripts.benchmarks import tome
from scripts.benchmarks.tag import find_largest_difference, make_sounds
from scripts.benchmarks.timing import compute_tflops, format_table, time_steps
from scripts.benchmarks.tome import count_block_flops, create_network, with_naive_attention
from scripts.benchmarks.train import (
    count_flops,
    create_transformer,
    make_batch,
    make_plain_step,
    make_project_step,
)

CPU = torch.device("cpu")


@pytest.fixture
def network():
    torch.manual_seed(0)
    return create_transformer("audiotransformer_pico", 7)


def test_both_steps_learn_the_same(network):
    batch = make_batch(network, 3, 1.3, CPU, seed=1)
    plain_model, our_model = copy.deepcopy(network), copy.deepcopy(network)
    plain, ours = make_plain_step(plain_model, "fp32", CPU), make_project_step(our_model, "fp32", CPU, compiled=False)
    for _ in range(4):  # the second and later ones tell whether the weights moved alike
        assert float(ours(batch)) == pytest.approx(float(plain(batch)), rel=1e-4)
    for mine, other in zip(our_model.buffers(), plain_model.buffers(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-3)


def test_the_steps_take_turns(network):
    calls = []
    candidates = {name: lambda batch, name=name: calls.append(name) or 0.0 for name in "ab"}
    seconds = time_steps(candidates, {}, rounds=2, steps=1, device=CPU)
    assert calls == [*"aabb", *"ab", *"ba"]
    assert [len(times) for times in seconds.values()] == [2, 2]


def test_operations_grow_with_the_batch(network):
    one, two = (count_flops(network, make_batch(network, n, 1.0, CPU, seed=0)) for n in (1, 2))
    assert two == 2 * one > 0


def test_table_holds_speed_ratio_and_further_columns():
    seconds = {"plain": [2.0, 4.0], "project": [1.0, 4.0]}
    tflops = compute_tflops(seconds, dict.fromkeys(seconds, 3 * 10**12))
    assert tflops == {"plain": 1.0, "project": 1.2}
    text = format_table(seconds, "plain", 8, "clips/s", {"more": {"plain": "a", "project": "b"}})
    _, plain, project = text.splitlines()
    assert plain.split() == ["plain", "3.0", "(2.0,", "4.0)", "1.00", "(1.00,", "1.00)", "a"]
    assert project.split() == ["project", "5.0", "(2.0,", "8.0)", "1.50", "(1.00,", "2.00)", "b"]


def test_training_prints_the_utilisation(capsys):
    options = {"seconds": 1, "batch_size": 2, "steps": 1, "rounds": 1, "device": "cpu", "peak_tflops": 0.001}
    Benchmark().train("audiotransformer_pico", **options)
    header, *rows = capsys.readouterr().out.splitlines()[1:]
    assert header.split()[-2:] == ["TFLOP/s", "utilisation"]
    for row in rows:
        tflops, percent, _ = row.split()[-3:]
        assert float(percent) == pytest.approx(1e5 * float(tflops), rel=0.01)


def test_command_prints_its_table(capsys):
    Benchmark().train("audiotransformer_pico", seconds=1, batch_size=2, steps=2, rounds=1, device="cpu")
    out = capsys.readouterr().out
    assert "training steps of audiotransformer_pico, fp32, 2 clips of 1 s" in out
    assert [line.split()[0] for line in out.splitlines()[-2:]] == ["plain", "project"]


@pytest.mark.parametrize(("model", "seconds"), [("mn04_as", 1), ("audiotransformer_pico", 11)])
def test_what_the_plain_step_does_not_support_is_an_error(model, seconds, capsys):
    with pytest.raises(SystemExit):
        Benchmark().train(model, seconds=seconds, device="cpu")
    assert "plain step" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "seconds", "length"), [("ast_pico", 1, 128), ("ast_pico", 5, 512), ("ast_pico", 10, 1024)]
)
def test_ast_is_built_for_the_lengths_of_its_recipes(name, seconds, length):
    network = create_network(name, seconds)
    assert network.target_length == length
    assert not network.training


@pytest.mark.parametrize(("name", "n_tokens", "protected"), [("ast_pico", 146, 2), ("audiotransformer_pico", 248, 0)])
def test_naive_attention_merges_the_same_and_its_operations_are_those_of_the_formula(name, n_tokens, protected):
    torch.manual_seed(0)
    network = create_network(name, 1 if protected else 10)
    naive = with_naive_attention(network)
    with torch.inference_mode():
        mel = network.front_end(0.1 * torch.randn(2, network.sample_rate * (1 if protected else 10)))
        outputs = []
        for r in (0, 20):
            network.merge_tokens(r)
            naive.merge_tokens(r)
            outputs.append(network.forward_spectrogram(mel))
            torch.testing.assert_close(naive.forward_spectrogram(mel), outputs[-1], rtol=1e-4, atol=1e-5)
    assert not torch.equal(*outputs)
    width, depth = network.embed_dim, len(network.blocks)
    for r in (0, 20):
        n, expected = n_tokens, 0
        for _ in range(depth):
            expected += 8 * n * width**2 + 4 * n**2 * width  # queries, keys, values and projection; scores and values
            n -= min(r, (n - protected) // 2)
            expected += 16 * n * width**2
        assert count_block_flops(naive, mel, r) == 2 * expected


def test_the_share_of_the_bound_compares_each_attention_with_itself(monkeypatch, capsys):
    def turns(candidates, batch, rounds, steps, device):
        for step in candidates.values():
            step(batch)
        return dict(zip(candidates, ([4.0, 6.0], [2.0, 4.0], [9.0, 9.0], [3.0, 3.0]), strict=True))

    monkeypatch.setattr(tome, "time_steps", turns)
    monkeypatch.setattr(tome, "count_block_flops", lambda network, mel, r: 50 if r else 100)
    Benchmark().tome("audiotransformer_pico", seconds=1, r=3, batch_size=2, attention=("sdpa", "naive"), rounds=2)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[2][:4] == ["sdpa,", "r", "=", "0"]
    assert lines[2][-3:] == ["1.00", "100", "%"]
    assert (lines[3][:5], lines[3][-4:]) == (["sdpa,", "r", "=", "3", "0.8"], ["0.500", "2.00", "88", "%"])
    assert lines[3][7] == "1.75"  # of 2 and 1.5
    assert (lines[6][:4], lines[6][-2:]) == (["naive,", "r", "=", "3"], ["150", "%"])


def test_tome_prints_its_table(capsys):
    Benchmark().tome("audiotransformer_pico", seconds=1, r=(2, 4), batch_size=1, rounds=1)
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("audiotransformer_pico, 1 clips of 1 s, 101 frames in chunks of 1012")
    assert [line.split(",")[1].split()[2] for line in out[2:5]] == ["0", "2", "4"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"model": "mn01_as"}, "has no tokens to merge"),
        ({"model": "ced_tiny", "seconds": 20}, "into chunks; try --seconds 10"),
        ({"r": "x"}, "--r is 'x'"),
        ({"attention": "fast"}, "sdpa, naive, or sdpa,naive"),
    ],
)
def test_faults_of_tome_are_sentences(options, sentence, capsys):
    with pytest.raises(SystemExit):
        Benchmark().tome(**options)
    assert sentence in capsys.readouterr().err


def test_the_tags_of_a_csv_are_compared_window_by_window_and_label_by_label(tmp_path):
    reference = {"a.wav": [[0.1, 0.9], [0.3, 0.2]], "b.wav": [[0.5, 0.6]]}
    rows = ["a.wav,0.0,5.0,Dog,0.9,", "a.wav,5.0,10.0,Cat,0.3,", "a.wav,10.0,10.2,Cat,1.0,", "b.wav,0.0,5.0,Dog,0.58,"]
    table = tmp_path / "tags.csv"
    table.write_text("\n".join(["filename,start,end,label,probability,error", *rows]) + "\n")
    assert find_largest_difference(table, reference, ["Cat", "Dog"], 5.0) == pytest.approx(0.02)
    table.write_text("filename,start,end,label,probability,error\n")
    with pytest.raises(UserError, match="no row to compare"):
        find_largest_difference(table, reference, ["Cat", "Dog"], 5.0)


@pytest.mark.long
def test_whole_processes_tag_alike_and_are_timed(tmp_path, capsys):
    make_sounds(tmp_path / "sounds", 3, 1.0, seed=0)
    Benchmark().tag(str(tmp_path / "sounds"), "audiotransformer_pico", chunk_length=1.0, rounds=1)
    out = capsys.readouterr().out
    assert "3 files, 3 windows of 1 s" in out
    assert "one file, 3 windows of 1 s" in out
    assert out.count("project, ONNX int8") == 2


@pytest.mark.long
def test_export_prints_size_time_and_difference_of_every_file(capsys):
    Benchmark().export("lstm_small", bits=(4,), seconds=1.0, rounds=2)
    rows = [re.split(" {2,}", line) for line in capsys.readouterr().out.splitlines() if line]
    sizes = {row[0]: float(row[1]) for row in rows[1:]}
    assert list(sizes) == ["fp32", "int8", "4 bits, as trained"]
    assert sizes["4 bits, as trained"] < 0.2 * sizes["fp32"]
    assert sizes["int8"] < 0.3 * sizes["fp32"]
