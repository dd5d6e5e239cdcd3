"""Temporal support: scores of each length of windows are those of its own probe; costs; the choice by validation."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from audio.dataset import Pack
from common.errors import Faults, UserError
from common.options import read_options
from models import create_model, load_model, save_checkpoint
from models.heads import load_head
from probing.cost import Cost, _count_operations, _LiveTensors, _prepare, measure_costs
from probing.fit import Examples, FitSettings, fit, predict
from probing.options import ProbeOptions
from probing.scores import Score
from probing.temporal_support import Support, choose_supports
from run import Runner
from training.holdout import hold_out

QUICK = {"epochs": 8, "lr": 1e-2, "num_workers": 0, "device": "cpu", "baseline": False}
LENGTHS = [0.1, 0.5, 1]


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    """Pictures take longer than these probes."""
    for module in ("probe", "temporal_support"):
        monkeypatch.setattr(f"probing.{module}.render_png", lambda figure: b"png")


@pytest.fixture(scope="module")
def lists(tone_pack):
    """The tones as a training and a test list."""
    table = pd.read_csv(tone_pack, sep="\t", dtype=str).sort_values("filename")
    paths = {}
    for part, rows in {"train": slice(21), "test": slice(21, None)}.items():
        paths[f"{part}_data"] = str(tone_pack.with_name(f"support_{part}.tsv"))
        table[rows].to_csv(paths[f"{part}_data"], sep="\t", index=False)
    return paths


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "embeds.pt"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_checkpoint(path, create_model("audiotransformer_pico", num_classes=0, depth=1))
    return str(path)


@pytest.fixture(scope="module")
def work(model, lists, tmp_path_factory):
    """A working folder with the temporal supports of the tones."""
    folder = tmp_path_factory.mktemp("work")
    Runner().probe(model, name="tones", temporal_support="0.1,1,0.5,2,10", **lists, **places(folder), **QUICK)
    return folder


def places(folder):
    return {"outputpath": str(folder / "heads"), "cache": str(folder / "embeddings")}


def read(folder, name):
    return json.loads((folder / "heads" / f"{name}.json").read_text())


def test_each_length_has_the_score_of_its_own_probe_and_the_head_is_that_of_the_best(work, model, lists):
    found = read(work, "tones_support")
    assert [row["seconds"] for row in found["supports"]] == LENGTHS  # ascending; 2 and 10 s hold the same whole clips
    for row in found["supports"]:
        Runner().probe(model, name="own", chunk_length=row["seconds"], overwrite=True, **lists, **places(work), **QUICK)
        own = read(work, "own")
        assert (row["test"]["value"], row["test"]["interval"]) == (own["value"], own["interval"])
        if row["seconds"] == found["best"]:
            assert own["made_with"] == read(work, "tones")["made_with"]
    assert (work / "heads" / "tones_support.png").read_bytes().startswith(b"\x89PNG")
    assert load_head(work / "heads" / "tones.pt").facts["chunk_length"] == found["best"]
    assert {path.name for path in (work / "heads").glob("tones*")} == {
        "tones.pt", "tones.json", "tones.png", "tones_support.json", "tones_support.png"
    }  # fmt: skip


def test_validation_scores_are_of_training_clips_that_the_head_has_not_learned(work, model, lists):
    """By hand: windows embedded one by one and averaged, training clips held out, a head on the others."""
    train, network = Pack.open(lists["train_data"]), load_model(model)
    labels = sorted(set(train.table["labels"]))
    kinds = np.array([labels.index(label) for label in train.table["labels"]])
    held = hold_out(train.names, [np.array([kind]) for kind in kinds], 7, 0.2)
    for row in read(work, "tones_support")["supports"]:
        length = round(row["seconds"] * 16000)
        with torch.no_grad():
            clips = [torch.from_numpy(train.read(index)).split(length) for index in range(21)]
            means = [torch.cat([network.embed(window[None])[0] for window in clip]).mean(0) for clip in clips]
        examples = Examples(train.names, torch.stack(means).numpy(), np.eye(7, dtype=np.float32)[kinds])
        settings = FitSettings(epochs=8, lr=1e-2, seed=42)
        head = fit(examples.take(~held), examples.take(held), labels, True, settings, torch.device("cpu")).head
        right = predict(head, examples.take(held)).argmax(1) == kinds[held]
        assert row["valid"]["value"] == pytest.approx(right.mean(), abs=1.01 / held.sum())  # stored in half precision
        assert row["valid"]["n_clips"] == held.sum() == 4


def test_test_labels_do_not_change_the_choice(work, model, lists, tmp_path):
    table = pd.read_csv(lists["test_data"], sep="\t", dtype=str)
    table["labels"] = np.roll(table["labels"], 1)
    table.to_csv(lists["test_data"] + "_wrong.tsv", sep="\t", index=False)
    wrong = lists | {"test_data": lists["test_data"] + "_wrong.tsv"}
    options = places(tmp_path) | {"cache": str(work / "embeddings")} | QUICK
    Runner().probe(model, name="wrong", temporal_support=LENGTHS, **wrong, **options)
    one, other = read(work, "tones_support"), read(tmp_path, "wrong_support")
    assert [row["valid"] for row in one["supports"]] == [row["valid"] for row in other["supports"]]
    assert [row["test"] for row in one["supports"]] != [row["test"] for row in other["supports"]]
    assert one["best"] == other["best"]


def test_the_same_command_computes_no_embedding_again(work, model, lists, capsys):
    files = {path: path.stat().st_mtime_ns for path in (work / "embeddings").rglob("*.h5")}
    before = read(work, "tones_support")
    Runner().probe(model, name="tones", temporal_support="0.1,1,0.5,2,10", **lists, **places(work), **QUICK)
    assert {path: path.stat().st_mtime_ns for path in (work / "embeddings").rglob("*.h5")} == files
    after = read(work, "tones_support")
    for one, other in zip(before["supports"], after["supports"], strict=True):
        assert {**one, "ms": 0} == {**other, "ms": 0}
    printed = capsys.readouterr()
    assert "0.1 s   10       1" in printed.out
    assert "padded to 0.15 s" in printed.out  # a patch of CED is 16 frames of 10 ms
    assert "whole clips" in printed.out
    assert f"best by the validation clips: {after['best']:g} s" in printed.out
    assert "clips are at most 1.00 s: 2, 10 s are left out, since they fit in 1 s" in printed.err


@pytest.mark.long
@pytest.mark.parametrize("more", [{"head": "prototypes"}, {"layers": "all"}, {"head": "mlp"}, {"several": True}])
def test_heads_of_all_kinds_and_clips_of_several_labels_are_compared(more, model, lists, tmp_path):
    given, given_lists = dict(more), dict(lists)
    if given.pop("several", False):
        for part, path in lists.items():
            table = pd.read_csv(path, sep="\t", dtype=str)
            table["labels"] += [f";kind {index % 2}" for index in range(len(table))]
            table.to_csv(path + "_several.tsv", sep="\t", index=False)
            given_lists[part] = path + "_several.tsv"
    Runner().probe(model, name="n", temporal_support="0.5,1", **given, **given_lists, **places(tmp_path), **QUICK)
    found = read(tmp_path, "n_support")
    assert found["metric"] == ("mAP" if "several" in more else "accuracy")
    Runner().probe(model, name="own", chunk_length=0.5, **given, **given_lists, **places(tmp_path), **QUICK)
    assert found["supports"][0]["test"]["value"] == read(tmp_path, "own")["value"]


def test_a_head_of_that_name_is_not_replaced(work, model, lists, capsys):
    before = (work / "heads" / "tones.pt").read_bytes()
    options = places(work) | QUICK | {"epochs": 2}
    with pytest.raises(SystemExit):
        Runner().probe(model, name="tones", temporal_support="0.5,1", **lists, **options)
    assert "tones.pt is a head made with other epochs" in capsys.readouterr().err
    assert (work / "heads" / "tones.pt").read_bytes() == before


def make_support(seconds, valid, low, test, ms):
    metrics = SimpleNamespace(n_clips=10)
    scores = [Score("accuracy", value, (least, 1.0), 0.1, metrics) for value, least in ((valid, low), (test, 0.0))]
    return Support(seconds, 1, *scores, Cost(1, ms / 10, ms, 2 * ms), "")


def test_the_best_is_chosen_by_validation_and_the_cheapest_within_its_interval():
    supports = [
        make_support(0.25, 0.79, 0.7, test=1.0, ms=4),
        make_support(0.5, 0.80, 0.7, test=0.1, ms=5),
        make_support(1, 0.90, 0.8, test=0.2, ms=20),
        make_support(2, 0.85, 0.7, test=1.0, ms=30),
    ]
    choice = choose_supports(supports)
    assert (choice.best.seconds, choice.cheapest.seconds) == (1, 0.5)
    assert choice.ratios == pytest.approx({"ms": 0.25, "gflop": 0.25, "megabytes": 0.25})
    equal = [replace(supports[2], seconds=4, cost=Cost(1, 1, 10, 1)), *supports[2:]]
    assert choose_supports(equal).best.seconds == 4  # of equal scores that of fewer operations
    hardly = choose_supports([supports[2], make_support(2, 0.89, 0.7, test=1.0, ms=18.5)])  # less than a tenth
    assert hardly.best is hardly.cheapest
    alone = choose_supports([supports[3], make_support(5, 0.99, 0.95, test=0.0, ms=40)])
    assert alone.best is alone.cheapest


class _Attention(nn.Module):
    """A model whose embedding is attention of 6 tokens of width 4, and a product with a matrix (4, 3)."""

    sample_rate = 24
    front_end = SimpleNamespace(spectrogram=lambda wave, lengths: (wave, None))

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3))

    def embed_clips(self, mel, n_frames):
        tokens = mel.reshape(len(mel), 1, 6, 4)
        return F.scaled_dot_product_attention(tokens, tokens, tokens).mean(2)[:, 0] @ self.weight


@torch.inference_mode()
def test_operations_are_those_of_products_and_attention():
    model = _Attention()
    per_window = 2 * (2 * 6 * 6 * 4) + 2 * 4 * 3
    assert _count_operations(model, _prepare(model, 3.0, 1.0)) == 3 * per_window
    (cost,) = measure_costs(model, 5.0, [1.0], "fp32")
    assert (cost.n_windows, cost.gflop) == (5, pytest.approx(5 * per_window / 1e9))
    assert cost.ms > 0


@torch.inference_mode()
def test_memory_is_the_largest_size_of_the_tensors_alive_at_once():
    weight = torch.ones(250)
    with _LiveTensors([weight]) as live:
        one = weight + 1  # 1000 bytes
        view = one[:100]
        two = torch.cat([one, view.double()])  # 2800, beside the 800 of the doubles
        del one, view
        three = two[:25] * 2  # 200; the memory of `one` is free
        del two
        _ = torch.ones(25) + three
    assert live.peak == 1000 + 800 + 2800
    del three, _
    assert live.alive == 0


@pytest.mark.parametrize(
    ("seconds", "window", "lengths"),
    [(2.5, 1.0, [24, 24, 12]), (5.001, 5.0, [120]), (0.5, 1.0, [12]), (40.0, 1.0, [24] * 40), (1.0, 1.0, [24])],
)
def test_a_clip_is_cut_into_windows_and_what_remains(seconds, window, lengths):
    batches = _prepare(_Attention(), seconds, window)
    assert [each.shape[1] for each in batches for _ in range(len(each))] == lengths
    assert max(map(len, batches)) <= 32


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"temporal_support": "1"}, "compares lengths: give two or more, 0.25,0.5,1,2,5,10"),
        ({"temporal_support": "0,1"}, "temporal_support is "),
        ({"chunk_length": "2"}, "--temporal_support and --chunk_length are both lengths of the chunks; drop one"),
        ({"model": None, "embeddings": "store"}, "give a model, not --embeddings"),
        ({"valid_fraction": "0"}, "chooses by validation clips; give --valid_data, or --valid_fraction above 0"),
        ({"head": "knn"}, "chooses by validation clips, which --head knn has none of; give another head"),
        ({"tasks": "t.yaml"}, "compares lengths on one task; give its clips in place of --tasks"),
    ],
)
def test_options_that_do_not_go_together_are_a_sentence(given, sentence):
    options = {"model": "m", "name": "n", "data": "d.tsv", "temporal_support": "0.5,1"} | given
    faults = Faults("the probe")
    read_options(ProbeOptions, {key: value for key, value in options.items() if value is not None}, faults)
    with pytest.raises(UserError, match=sentence):
        faults.raise_if_any()
