"""ResNet-10 as a folder of transformers; what it shares with CED's is tested beside those."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from common.errors import UserError
from models import create_model, load_model, save_checkpoint
from scripts import export_hf
from scripts.hf.folder import code_files, export
from scripts.hf.modeling_resnet10 import ResNet10ForAudioClassification, ResNet10Model
from tests.scripts.test_export_hf import (
    NAMES,
    SECONDS,
    check_batch,
    clips,
    own_probabilities,
    run_card,
    tagger,
    use_elsewhere,
)
from tests.scripts.test_export_hf import loaded as loaded_as


def resnet(name="resnet10", **settings):
    """A narrow network whose statistics are not those of the start, and whose classes differ."""
    settings = {"width": 4} | settings if name == "resnet10" else settings
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = create_model(name, **settings).eval()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 2)
        model.bands.running_mean.uniform_(-60, -20)
        model.bands.running_var.uniform_(1, 4)  # sensitive to the level of a sound
        model.classifier[1].weight.normal_(std=4)
    return model


def loaded(folder, model_class=ResNet10ForAudioClassification, **settings):
    return loaded_as(folder, model_class, **settings)


@pytest.fixture(scope="module")
def model():
    return resnet(labels=NAMES)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    """What the command writes of a checkpoint."""
    place = tmp_path_factory.mktemp("export")
    save_checkpoint(place / "mine.pt", model)
    export_hf.main(["-m", str(place / "mine.pt"), str(place / "my_tagger")])
    return place / "my_tagger"


def test_transformers_alone_gives_what_the_model_predicts(folder, model, tmp_path):
    found = use_elsewhere(folder, tmp_path)
    wanted = own_probabilities(model, clips(*SECONDS))
    assert wanted.std(0).max() > 0.03
    for kind in ("alone", "mixed", "again"):
        torch.testing.assert_close(torch.tensor(found[kind]), wanted, atol=1e-5, rtol=0)
    assert found["ours"] == []
    assert list(found["config"].values()) == NAMES
    for tags, row in zip(found["pipeline"], wanted, strict=True):
        values, classes = row.topk(3)
        assert [tag["label"] for tag in tags] == [NAMES[i] for i in classes]
        assert [tag["score"] for tag in tags] == pytest.approx(values.tolist(), abs=1e-5)
    check_batch(found)
    embeddings = [model.embed(torch.from_numpy(clip)[None])[0][0] for clip in clips(*SECONDS)]
    torch.testing.assert_close(torch.tensor(found["embedding"]), torch.stack(embeddings), atol=1e-4, rtol=0)
    again = load_model(found["folder"])  # as transformers saved it
    assert (again.labels, again.arguments) == (NAMES, model.arguments)
    assert torch.equal(own_probabilities(again, clips(1.0)), own_probabilities(model, clips(1.0)))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("resnet10", {"sample_rate": 8000, "n_fft": 256, "win_size": 200, "hop_size": 80, "n_mels": 32}),
        ("resnet10", {"sample_rate": 32000, "f_max": 14000.0, "f_min": 20.0, "dropout": 0.5, "activation": "softmax"}),
        ("resnet10_small", {"hop_size": 320, "activation": "softmax"}),
        ("resnet10", {"width": 16}),
    ],
)
@torch.inference_mode()
def test_clips_of_several_lengths_get_what_they_get_alone_whatever_the_front_end(name, settings, tmp_path):
    own = resnet(name, labels=NAMES, **settings)
    export(own, tmp_path / "hf")
    hf, extractor = loaded(tmp_path / "hf")
    sounds = clips(0.7, 3.0, 0.01, 5.1, sample_rate=own.sample_rate)
    logits = hf(**extractor(sounds, sampling_rate=own.sample_rate, return_tensors="pt")).logits
    probabilities = logits.softmax(-1) if own.activation == "softmax" else logits.sigmoid()
    torch.testing.assert_close(probabilities, own_probabilities(own, sounds), atol=1e-5, rtol=0)
    back = load_model(tmp_path / "hf")
    assert (back.name, back.labels, back.activation) == (own.name, NAMES, own.activation)
    assert back.front_end.description == own.front_end.description
    assert back.arguments == {key: value for key, value in own.arguments.items() if (key, value) != ("width", 16)}
    assert torch.equal(own_probabilities(back, sounds), own_probabilities(own, sounds))


@torch.inference_mode()
def test_embeddings_are_those_of_the_model(folder, model):
    sounds = clips(*SECONDS)
    hf, extractor = loaded(folder)
    inputs = extractor(sounds, sampling_rate=16000, return_tensors="pt")
    output = loaded(folder, ResNet10Model)[0](**inputs)
    assert torch.equal(hf(**inputs, output_hidden_states=True).hidden_states[0], output.last_hidden_state)
    for row, sound in enumerate(sounds):
        clip, steps = model.embed(torch.from_numpy(sound)[None])
        torch.testing.assert_close(output.pooler_output[row], clip[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(output.last_hidden_state[row, : steps.shape[1]], steps[0], atol=1e-4, rtol=1e-4)
        assert not output.last_hidden_state[row, steps.shape[1] :].any()


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_a_step_of_training_is_that_of_this_project(activation, tmp_path):
    own = resnet(labels=NAMES, activation=activation, dropout=0.0)
    export(own, tmp_path / "hf")
    hf, extractor = loaded(tmp_path / "hf")
    sounds = [torch.from_numpy(clip) for clip in clips(1.0, 2.0, 0.5)]
    labels = torch.tensor([2, 0, 1])
    compare, targets = F.cross_entropy, labels
    if activation == "sigmoid":
        compare, targets = F.binary_cross_entropy_with_logits, F.one_hot(labels, 3).float()
    lengths = torch.tensor([len(sound) for sound in sounds])
    wanted = compare(own.train()(nn.utils.rnn.pad_sequence(sounds, batch_first=True), lengths), targets)
    wanted.backward()
    inputs = extractor(sounds, sampling_rate=16000, return_tensors="pt")
    found = hf.train()(**inputs, labels=targets).loss
    found.backward()
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    for name, parameter in own.named_parameters():
        twin = hf.get_parameter(
            name.replace("classifier", "outputlayer") if "classifier" in name else f"encoder.{name}"
        )
        torch.testing.assert_close(twin.grad, parameter.grad, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(hf.encoder.bands.running_mean, own.bands.running_mean)

    optimizer = torch.optim.SGD(hf.parameters(), lr=1e-3)
    optimizer.step()
    assert hf(**inputs, labels=targets).loss < found


@pytest.mark.parametrize("problem", ["multi_label_classification", "single_label_classification"])
def test_trainer_fine_tunes_clips_of_several_lengths_on_other_classes(problem, folder, tmp_path):
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    names = {"id2label": {0: "dog", 1: "cat"}, "label2id": {"dog": 0, "cat": 1}}
    hf, extractor = loaded(folder, ignore_mismatched_sizes=True, problem_type=problem, **names)
    assert torch.equal(hf.encoder.stem.conv.weight, loaded(folder)[0].encoder.stem.conv.weight)
    single = problem.startswith("single")
    targets = [0, 1] if single else np.eye(2, dtype=np.float32)
    examples = [
        {"input_values": extractor(clip, sampling_rate=16000)["input_values"][0], "labels": targets[i % 2]}
        for i, clip in enumerate(clips(1.0, 2.0, 1.5, 0.5))
    ]
    settings = {"max_steps": 12, "per_device_train_batch_size": 4, "report_to": "none", "use_cpu": True}
    settings |= {"learning_rate": 1e-2, "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True}
    arguments = TrainingArguments(str(tmp_path / "run"), **settings)
    trainer = Trainer(
        model=hf, args=arguments, train_dataset=examples, eval_dataset=examples, processing_class=extractor
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] / 2
    assert np.isfinite(trainer.evaluate()["eval_loss"])
    assert trainer.predict(examples).predictions.shape == (4, 2)
    trainer.save_model(str(tmp_path / "tuned"))
    tuned = load_model(tmp_path / "tuned")
    assert (tuned.labels, tuned.activation) == (["dog", "cat"], "softmax" if single else "sigmoid")


def test_a_fresh_model_starts_like_ours(folder):
    config = loaded(folder)[0].config
    config.width = 16
    torch.manual_seed(0)
    hf, own = ResNet10ForAudioClassification(config), create_model("resnet10", num_classes=3)
    for name, parameter in own.named_parameters():
        twin = hf.get_parameter(name.replace("classifier", "outputlayer") if "classif" in name else f"encoder.{name}")
        if parameter.numel() > 100:
            torch.testing.assert_close(twin.std(), parameter.std(), atol=0.003, rtol=0.15)
            torch.testing.assert_close(twin.mean(), parameter.mean(), atol=0.02, rtol=0)
    for name, value in own.named_buffers():
        if not name.startswith("front_end."):
            assert torch.equal(hf.get_buffer(f"encoder.{name}"), value), name


def test_it_runs_in_half_precision(folder, model):
    hf, extractor = loaded(folder, dtype=torch.bfloat16)
    with torch.inference_mode():
        found = hf(**extractor(clips(1.0, 2.0), sampling_rate=16000, return_tensors="pt")).logits.sigmoid()
    assert (found - own_probabilities(model, clips(1.0, 2.0))).abs().max() < 0.1


def test_a_clip_without_a_frame_is_reported(folder):
    with pytest.raises(ValueError, match="a clip has 0 frames of its own; expected at least 1"):
        loaded(folder)[0](torch.zeros(2, 9, 64), torch.tensor([[1] * 9, [0] * 9]))


def test_the_model_card_is_that_of_this_network_and_its_commands_run(folder, monkeypatch, tmp_path):
    card = run_card(folder, monkeypatch, tmp_path)
    assert "ResNet-10 on CED's log-mels (resnet10, embeddings of width 32), 19,727 parameters" in card
    assert "(clips, time steps of 160 ms, 32)" in card
    assert "tags: [audio-classification, audio-tagging, resnet10]" in card
    assert "chunk" not in card
    assert "transformer (" not in card


def test_the_folder_holds_these_files_and_tensors(folder, model):
    assert {path.name for path in folder.iterdir()} == {
        *code_files("resnet10"),
        *("config.json", "model.safetensors", "preprocessor_config.json", "README.md", "LICENSE-CODE"),
    }
    assert json.loads((folder / "config.json").read_text())["model_type"] == "resnet10"
    own = {key for key in model.state_dict() if not key.startswith("front_end.")}
    tensors = load_file(folder / "model.safetensors")
    assert set(tensors) == {
        key.replace("classifier.", "outputlayer.") if "classifier" in key else f"encoder.{key}" for key in own
    }


def test_one_kind_takes_the_place_of_the_other(model, tmp_path):
    for first, second in ((tagger(labels=["a", "b"]), model), (model, tagger(labels=["a", "b"]))):
        export(first, tmp_path / "hf", overwrite=True)
        export(second, tmp_path / "hf", overwrite=True)
        back = load_model(tmp_path / "hf")
        assert (back.name, back.labels) == (second.name, second.labels)


def test_tensors_of_another_network_are_reported(folder, tmp_path):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    save_file({key: value for key, value in tensors.items() if "stem" not in key}, tmp_path / "hf/model.safetensors")
    with pytest.raises(UserError, match="expected those of ResNet-10"):
        load_model(tmp_path / "hf")
    tensors.pop("encoder.blocks.0.first.conv.weight")
    save_file(tensors, tmp_path / "hf/model.safetensors")
    with pytest.raises(UserError, match=r"1 tensors are missing: blocks\.0\.first\.conv\.weight"):
        load_model(tmp_path / "hf")
    given = json.loads((folder / "config.json").read_text()) | {"head": {"hidden_sizes": [], "dropout": 0, "facts": {}}}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(given))
    with pytest.raises(UserError, match="expected those of a head as well"):
        load_model(tmp_path / "hf")
