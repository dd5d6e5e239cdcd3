"""Which weights a run ends with: the average of its best checkpoints, or the best of them."""

import json

import pytest
import torch
import yaml
from torch import nn

from common.errors import Faults
from models import create_model, load_model
from run import Runner
from tests.training.test_resume import LABELS_ONLY, SETTINGS, StoppedError, final_weights, the_run, weights_of
from training.averaging import find_trained_norms, recompute_batch_norm
from training.checkpoints import BestCheckpoints, choose_final_weights, keep_best, keep_last, restore_best
from training.evaluate import evaluate
from training.labelled import open_labelled
from training.parallel import Ranks
from training.precision import Precision

CPU = torch.device("cpu")


def tagger(bias=0.0):
    model = create_model("audiotransformer_pico", num_classes=2, depth=1)
    nn.init.constant_(model.outputlayer[1].bias, bias)
    return model


def bias_of(model):
    (value,) = set(model.outputlayer[1].bias.tolist())
    return value


def saved(folder, scores, n=4):
    """Checkpoints of epochs 1, 2, ... whose bias is the number of the epoch."""
    torch.manual_seed(0)
    model, best = tagger(), BestCheckpoints(folder, n)
    for epoch, score in enumerate(scores, 1):
        nn.init.constant_(model.outputlayer[1].bias, epoch)
        best.update(model, {"valid_mAP": score}, epoch)
    best.prune()
    return model, best


def files(folder):
    return sorted(path.name for path in folder.glob("*.pt") if not path.name.startswith("best_epoch"))


def test_the_best_n_checkpoints_are_kept(tmp_path):
    model = tagger()
    best = BestCheckpoints(tmp_path, 2)
    answers = []
    for epoch, score in enumerate([0.3, 0.5, 0.2, 0.4], 1):
        nn.init.constant_(model.outputlayer[1].bias, epoch)
        answers.append(best.update(model, {"valid_mAP": score}, epoch))
        best.prune()
    assert len(list(tmp_path.glob("best*"))) == 3  # what the state before still speaks of
    best.prune()
    assert answers == [True, True, False, False]
    assert sorted(p.name for p in tmp_path.glob("best*")) == [
        "best_epoch=0002_mAP=0.5000.pt",
        "best_epoch=0004_mAP=0.4000.pt",
    ]
    weights = restore_best(best, model, Ranks())
    assert bias_of(model) == 2.0
    assert weights.path.name == "best_epoch=0002_mAP=0.5000.pt"


@pytest.mark.parametrize(
    ("of_average", "kept", "bias"), [(0.6, "averaged.pt", 3.0), (0.5, "averaged.pt", 3.0), (0.4999, "best.pt", 2.0)]
)
def test_the_better_one_on_the_validation_data_is_kept_and_nothing_else(tmp_path, caplog, of_average, kept, bias):
    model, best = saved(tmp_path, [0.3, 0.5, 0.2, 0.4], n=2)
    for stale in ("averaged.pt", "best.pt"):  # of an attempt that was killed
        (tmp_path / stale).write_bytes(b"")
    looked_at = []
    with caplog.at_level("INFO"):
        weights = choose_final_weights(best, model, Ranks(), lambda: looked_at.append(bias_of(model)) or of_average)
    assert looked_at == [3.0]  # the average of epochs 2 and 4
    assert bias_of(model) == bias_of(load_model(tmp_path)) == bias_of(load_model(weights.path)) == bias
    assert files(tmp_path) == [kept] == [weights.path.name]
    assert weights.compared == {"average": of_average, "best": 0.5}
    for text in (caplog.text, weights.sentence):
        assert f"{of_average:.4f}" in text
        assert "0.5000" in text
    assert "epoch 2" in weights.sentence
    assert kept in caplog.text


@pytest.mark.parametrize("scores", [[0.5], [0.3, 0.5]], ids=["one", "alike"])
def test_one_checkpoint_or_equal_ones_are_kept_without_another_validation(tmp_path, scores):
    model = tagger(1.0)
    best = BestCheckpoints(tmp_path, 4)
    for epoch, score in enumerate(scores, 1):
        best.update(model, {"valid_mAP": score}, epoch)
    weights = choose_final_weights(best, tagger(9.0), Ranks(), lambda: pytest.fail("validated"))
    assert files(tmp_path) == ["averaged.pt"]
    assert bias_of(load_model(tmp_path)) == 1.0
    assert weights.compared == {}


def test_without_validation_data_the_last_weights_are_kept_and_the_log_reports_it(tmp_path, caplog):
    model, best = tagger(), BestCheckpoints(tmp_path, 4)
    last = tagger(5.0).state_dict()
    with caplog.at_level("INFO"):
        weights = keep_last(best, model, last, Ranks())
    assert [path.name for path in tmp_path.glob("*.pt")] == ["last.pt"] == [weights.path.name]
    assert bias_of(model) == bias_of(load_model(tmp_path)) == 5.0
    assert "without validation data" in caplog.text


@pytest.mark.parametrize(("select_by", "chosen"), [("cosine", 2), ("-cosine", 1)])
def test_the_log_names_the_value_that_chose_without_its_sign(tmp_path, caplog, select_by, chosen):
    model, best = tagger(), BestCheckpoints(tmp_path, 4, select_by)
    for epoch, value in enumerate([0.99, 0.95], 1):
        nn.init.constant_(model.outputlayer[1].bias, epoch)
        best.update(model, {"cosine": value}, epoch)
    with caplog.at_level("INFO"):
        keep_best(best, model, Ranks())
    assert bias_of(model) == chosen
    assert f"(epoch {chosen}), cosine {[0.99, 0.95][chosen - 1]} on the training clips" in caplog.text


@pytest.mark.parametrize(
    ("scores", "kept", "bias"),
    [([0.7, 0.6], "averaged.pt", 103.0), ([0.6, 0.7], "best.pt", 102.0), ([0.4, 0.3], "best.pt", 2.0)],
)
def test_with_new_statistics_there_are_three_to_choose_from(tmp_path, scores, kept, bias):
    """Recomputing stands for adding 100: the average with new statistics, the best with and without."""
    model, best = saved(tmp_path, [0.3, 0.5, 0.2, 0.4], n=2)
    scores, looked_at = list(scores), []

    def validate():
        looked_at.append(bias_of(model))
        return scores.pop(0)

    def recompute():
        with torch.no_grad():
            model.outputlayer[1].bias.add_(100.0)

    weights = choose_final_weights(best, model, Ranks(), validate, recompute)
    assert looked_at == [103.0, 102.0]
    assert files(tmp_path) == [kept]
    assert bias_of(model) == bias_of(load_model(tmp_path)) == bias
    assert list(weights.compared) == ["average", "best", "best_recomputed"]


def test_recomputed_statistics_are_the_mean_of_the_batches_and_nothing_else_changes():
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 4), nn.Dropout(0.5), nn.BatchNorm1d(4), nn.BatchNorm1d(4))
    for parameter in model[4].parameters():
        parameter.requires_grad = False  # frozen
    for norm in (model[0], model[3], model[4]):
        norm.running_mean.fill_(7.0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batches = [torch.randn(8, 3) + i for i in range(3)]
    with recompute_batch_norm(model), torch.no_grad():
        for batch in batches:
            model(batch)
    after = model.state_dict()
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        f"{i}.{name}" for i in (0, 3) for name in ("running_mean", "running_var", "num_batches_tracked")
    }
    assert torch.allclose(model[0].running_mean, torch.stack([b.mean(0) for b in batches]).mean(0), atol=1e-6)
    assert torch.allclose(model[0].running_var, torch.stack([b.var(0) for b in batches]).mean(0), atol=1e-5)
    hidden = [model[1]((b - b.mean(0)) / (b.var(0, unbiased=False) + 1e-5).sqrt()) for b in batches]
    assert torch.allclose(model[3].running_mean, torch.stack([h.mean(0) for h in hidden]).mean(0), atol=1e-5)
    assert not any(module.training for module in model.modules())
    assert model[0].momentum == 0.1


def test_only_networks_with_norms_behind_their_weights_need_new_statistics():
    assert find_trained_norms(tagger()) == []  # its one norm is of the input
    assert len(find_trained_norms(create_model("mn01_as", num_classes=2))) > 20


def configure(tone_pack, tmp_path, **changes):
    path = tmp_path / "config.yaml"
    data = {"train_data": str(tone_pack), "valid_data": str(tone_pack), "eval_data": str(tone_pack), "num_workers": 0}
    data |= {"valid_fraction": None, "valid_every": 1}
    path.write_text(yaml.safe_dump(SETTINGS | LABELS_ONLY | data | changes))
    return path


@pytest.mark.parametrize("model", ["audiotransformer_pico", "mn01_as"])
def test_what_a_run_keeps_has_the_figure_it_says(tone_pack, tmp_path, model, capsys):
    changes = {} if model == "audiotransformer_pico" else {"model": model, "model_args": {}, "ema": None, "epochs": 3}
    Runner(7).train(str(configure(tone_pack, tmp_path, **changes)), outputpath=str(tmp_path / "runs"))
    folder = the_run(tmp_path / "runs")
    kept = final_weights(folder)
    assert f"-m {kept}" in capsys.readouterr().out
    finished = json.loads((folder / "finished.json").read_text())
    figures = {key: value for key, value in finished.items() if key.startswith("valid_mAP_")}
    assert len(figures) == (2 if model == "audiotransformer_pico" else 3)
    assert (kept.name == "averaged.pt") == (finished["valid_mAP_average"] == max(figures.values()))
    network = load_model(folder)
    data = open_labelled(str(tone_pack), network.labels, Faults("the test"))
    metrics = evaluate(network, data, batch_size=6, num_workers=0, precision=Precision("fp32", CPU))
    assert metrics.mAP == pytest.approx(max(figures.values()), abs=1e-6)
    assert metrics.mAP == pytest.approx(finished["mAP"], abs=1e-6)
    page = (folder / "report.html").read_text()
    assert f"<dt>weights</dt><dd>{kept.name}: " in page
    assert f"{max(figures.values()):.4f}" in (folder / "train.log").read_text()


def test_a_run_killed_while_it_chooses_ends_with_the_same_weights(tone_pack, tmp_path, monkeypatch):
    path = configure(tone_pack, tmp_path)
    Runner(7).train(str(path), outputpath=str(tmp_path / "whole"))
    with monkeypatch.context() as patch:
        patch.setattr("training.finish.write_results", lambda *_: (_ for _ in ()).throw(StoppedError))
        with pytest.raises(StoppedError):
            Runner(7).train(str(path), outputpath=str(tmp_path / "runs"))
    (folder,) = (p.parent for p in (tmp_path / "runs").glob("*/*/*/run.json"))
    assert len(files(folder)) == 1
    (folder / ({"averaged.pt", "best.pt"} - set(files(folder))).pop()).write_bytes(b"of a killed attempt")
    Runner(7).train(str(path), outputpath=str(tmp_path / "runs"))
    one, other = weights_of(the_run(tmp_path / "whole")), weights_of(the_run(tmp_path / "runs"))
    assert all(torch.equal(one[key], other[key]) for key in one)
