import ast
import json
import re
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from common.errors import UserError
from models import audioset_labels, create_model, load_model, save_checkpoint
from scripts import export_hf
from scripts.hf import folder as hf_folder
from scripts.hf.feature_extraction_ced import CedFeatureExtractor
from scripts.hf.folder import code_files, export
from scripts.hf.modeling_ced import CedForAudioClassification, CedModel
from tests.conftest import run_command
from tests.models.sounds import noise

NAMES = ["rain", 'dog, "barking"', "Ääni"]
SECONDS = (1.0, 10.0, 25.0)


def tagger(name="audiotransformer_pico", seed=0, **settings):
    """A small tagger whose head is large enough for differences to show."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = create_model(name, **settings).eval()
        nn.init.normal_(model.outputlayer[1].weight, std=0.2)
        nn.init.normal_(model.outputlayer[1].bias, std=0.3)
        model.init_bn[1].running_mean.uniform_(-10, 10)
        model.init_bn[1].running_var.uniform_(50, 200)
    return model


def clips(*seconds, sample_rate=16000):
    return [noise(round(s * sample_rate), seed=i, level=0.3 / (i + 1)).numpy() for i, s in enumerate(seconds)]


def loaded(folder, model_class=CedForAudioClassification, **settings):
    return model_class.from_pretrained(folder, **settings).eval(), CedFeatureExtractor.from_pretrained(folder)


@torch.inference_mode()
def own_probabilities(model, sounds):
    return torch.cat([model.predict(torch.from_numpy(sound)[None]) for sound in sounds])


@pytest.fixture(scope="module")
def model():
    return tagger(labels=NAMES)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    target = tmp_path_factory.mktemp("export") / "three-sounds"
    export(model, target)
    return target


@pytest.fixture(scope="module")
def audioset_model():
    return tagger("audiotransformer_nano")


@pytest.fixture(scope="module")
def audioset_folder(audioset_model, tmp_path_factory):
    target = tmp_path_factory.mktemp("export") / "nano"
    export(audioset_model, target)
    return target


ELSEWHERE = """
import json, socket, sys
import numpy as np, torch
def refuse(*_): raise OSError("no network in this test")
socket.socket.connect = socket.socket.connect_ex = refuse
from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, AutoModelForAudioClassification, pipeline

folder, again, sounds = sys.argv[1], sys.argv[2], np.load(sys.argv[3])
sounds = [sounds[key] for key in sorted(sounds)]
result = {"config": AutoConfig.from_pretrained(folder, trust_remote_code=True).to_dict()["id2label"]}

def tags(folder):
    extractor = AutoFeatureExtractor.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForAudioClassification.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.inference_mode():
        alone = [model(**extractor(s, sampling_rate=16000, return_tensors="pt")).logits.sigmoid()[0] for s in sounds]
        mixed = model(**extractor(sounds, sampling_rate=16000, padding=True, return_tensors="pt")).logits.sigmoid()
    return extractor, model, torch.stack(alone).tolist(), mixed.tolist()

extractor, model, result["alone"], result["mixed"] = tags(folder)
model.save_pretrained(again)
extractor.save_pretrained(again)
result["again"] = tags(again)[3]
with torch.inference_mode():
    output = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()(
        **extractor(sounds, sampling_rate=16000, return_tensors="pt"))
result["embedding"] = output.pooler_output.tolist()
tag = pipeline("audio-classification", model=folder, trust_remote_code=True)
result["pipeline"] = [tag(sound, top_k=3) for sound in sounds]
result["batch"] = tag(sounds, top_k=3, batch_size=2)
result["resampled"] = tag({"array": np.zeros(8000, np.float32), "sampling_rate": 8000}, top_k=1)
result["ours"] = sorted({name.split(".")[0] for name in sys.modules} & {"models", "common", "scripts", "audio"})
print("RESULT " + json.dumps(result))
"""


def use_elsewhere(folder, place):
    """What a user with transformers and torch, without this project and without a network, gets from a folder."""
    np.savez(place / "sounds.npz", **{f"{i}": clip for i, clip in enumerate(clips(*SECONDS))})
    (place / "use.py").write_text(ELSEWHERE)
    environment = {"HF_HOME": str(place / "home"), "HF_MODULES_CACHE": str(place / "modules")}
    environment |= {"HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    words = ["use.py", folder, place / "again", "sounds.npz"]
    done = run_command(*words, cwd=place, env=environment)
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    return json.loads(line.removeprefix("RESULT ")) | {"folder": place / "again"}


@pytest.fixture(scope="module")
def elsewhere(audioset_folder, tmp_path_factory):
    return use_elsewhere(audioset_folder, tmp_path_factory.mktemp("elsewhere"))


def test_auto_classes_load_it_without_the_project_and_without_a_network(elsewhere, audioset_model):
    wanted = own_probabilities(audioset_model, clips(*SECONDS))
    for kind in ("alone", "mixed", "again"):
        torch.testing.assert_close(torch.tensor(elsewhere[kind]), wanted, atol=1e-5, rtol=0)
    assert elsewhere["ours"] == []
    assert list(elsewhere["config"].values()) == audioset_labels()
    embeddings = [audioset_model.embed(torch.from_numpy(clip)[None])[0][0] for clip in clips(*SECONDS)]
    torch.testing.assert_close(torch.tensor(elsewhere["embedding"]), torch.stack(embeddings), atol=1e-4, rtol=0)


def test_the_pipeline_gives_the_same_tags(elsewhere, audioset_model):
    wanted = own_probabilities(audioset_model, clips(*SECONDS))
    for tags, row in zip(elsewhere["pipeline"], wanted, strict=True):
        values, classes = row.topk(3)
        assert [tag["label"] for tag in tags] == [audioset_model.labels[i] for i in classes]
        assert [tag["score"] for tag in tags] == pytest.approx(values.tolist(), abs=1e-5)
    check_batch(elsewhere)
    assert len(elsewhere["resampled"]) == 1


def check_batch(found):
    """The pipeline gives clips of several lengths, two a batch, what it gives each alone."""
    for tags, alone in zip(found["batch"], found["pipeline"], strict=True):
        assert [tag["label"] for tag in tags] == [tag["label"] for tag in alone]
        assert [tag["score"] for tag in tags] == pytest.approx([tag["score"] for tag in alone], abs=1e-5)


def test_what_transformers_saved_is_read_by_this_project(elsewhere, audioset_model):
    again = load_model(elsewhere["folder"])
    assert again.labels == audioset_labels()
    sounds = clips(1.0, 12.0)
    assert torch.equal(own_probabilities(again, sounds), own_probabilities(audioset_model, sounds))


def test_reading_it_back_gives_the_same_model(folder, model):
    again = load_model(folder)
    assert (again.name, again.labels, again.activation) == (model.name, NAMES, "sigmoid")
    assert torch.equal(own_probabilities(again, clips(2.0)), own_probabilities(model, clips(2.0)))


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
@pytest.mark.parametrize("pooling", ["mean", "token", "dm", "logit"])
@torch.inference_mode()
def test_logits_belong_to_the_probabilities(pooling, activation, tmp_path):
    settings = {"target_length": 248, "sample_rate": 8000, "f_max": 4000, "depth": 2, "init_values": 0.5}
    own = tagger(labels=NAMES, pooling=pooling, activation=activation, eval_avg="mean", **settings)
    export(own, tmp_path / "hf")
    hf, extractor = loaded(tmp_path / "hf")
    sounds = clips(0.7, 3.0, 12.4, 5.1, sample_rate=8000)
    wanted = own_probabilities(own, sounds)
    assert (wanted[0] - wanted[1]).abs().max() > 1e-3
    logits = hf(**extractor(sounds, sampling_rate=8000, return_tensors="pt")).logits
    probabilities = logits.softmax(-1) if activation == "softmax" else logits.sigmoid()
    torch.testing.assert_close(probabilities, wanted, atol=1e-5, rtol=0)
    back = load_model(tmp_path / "hf")
    assert (back.activation, back.sample_rate, back.pooling) == (activation, 8000, pooling)


@torch.inference_mode()
def test_maximum_over_chunks(tmp_path):
    own = tagger(num_classes=4, eval_avg="max", target_length=128)
    export(own, tmp_path / "hf")
    hf, extractor = loaded(tmp_path / "hf")
    sounds = clips(1.0, 4.3)
    probabilities = hf(**extractor(sounds, sampling_rate=16000, return_tensors="pt")).logits.sigmoid()
    torch.testing.assert_close(probabilities, own_probabilities(own, sounds), atol=1e-5, rtol=0)


@torch.inference_mode()
def test_it_gives_what_the_published_code_gives(shared, tmp_path):
    # The published chunking drops the last chunk of 2024 frames; every other stored length is compared.
    stored = np.load(shared / "fixtures" / "ced_tiny_random_io.npz")
    checkpoint = shared / "fixtures" / "ced_tiny_random.pt"
    export_hf.main([str(tmp_path / "hf"), "-m", "ced_tiny", "--weights", str(checkpoint)])
    hf, extractor = loaded(tmp_path / "hf")
    keys = ["0.5s", "1s", "10s", "12s", "35s"]
    sounds = [stored[f"wav/{key}"].astype(np.float32) / 32768 for key in keys]
    output = hf(**extractor(sounds, sampling_rate=16000, return_tensors="pt")).logits.sigmoid()
    wanted = torch.stack([torch.from_numpy(stored[f"out/{key}"]) for key in keys])
    torch.testing.assert_close(output, wanted, atol=1e-5, rtol=0)


def test_names_of_classes_stay_whole(folder, audioset_folder):
    for path, names in ((folder, NAMES), (audioset_folder, audioset_labels())):
        config = loaded(path)[0].config
        assert [config.id2label[i] for i in range(len(names))] == names
        assert [config.label2id[name] for name in names] == list(range(len(names)))
        assert (config.num_labels, config.outputdim) == (len(names), len(names))
    assert config.id2label[1] == "Male speech, man speaking"


def test_settings_have_their_usual_names_too(folder):
    config = loaded(folder)[0].config
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (64, 4, 1)
    assert config.problem_type == "multi_label_classification"


@torch.inference_mode()
def test_embeddings_are_those_of_the_model(folder, model):
    sounds = clips(*SECONDS)
    hf, extractor = loaded(folder)
    inputs = extractor(sounds, sampling_rate=16000, return_tensors="pt")
    output = loaded(folder, CedModel)[0](**inputs)
    hidden = hf(**inputs, output_hidden_states=True).hidden_states
    assert len(hidden) == 1
    assert torch.equal(hidden[0], output.last_hidden_state)
    assert hf(**inputs).hidden_states is None
    for row, sound in enumerate(sounds):
        clip, steps = model.embed(torch.from_numpy(sound)[None])
        torch.testing.assert_close(output.pooler_output[row], clip[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(output.last_hidden_state[row, : steps.shape[1]], steps[0], atol=1e-5, rtol=1e-5)
        assert not output.last_hidden_state[row, steps.shape[1] :].any()
    assert len(hf(**inputs, return_dict=False)) == 1


def test_the_loss_of_many_labels_is_binary_cross_entropy(folder):
    hf, extractor = loaded(folder)
    inputs = extractor(clips(1.0, 12.0), sampling_rate=16000, return_tensors="pt")
    labels = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.2, 0.0]])
    output = hf(**inputs, labels=labels)
    p = output.logits.sigmoid()
    by_hand = -(labels * p.log() + (1 - labels) * (1 - p).log()).mean()
    torch.testing.assert_close(output.loss, by_hand)
    assert torch.equal(hf(**inputs, labels=torch.tensor([[1, 0, 1], [0, 1, 0]])).loss.isfinite(), torch.tensor(True))
    with pytest.raises(ValueError, match='problem_type="single_label_classification"'):
        hf(**inputs, labels=torch.tensor([1, 2]))


def test_the_loss_of_one_label_is_cross_entropy(tmp_path):
    own = tagger(labels=NAMES, activation="softmax")
    export(own, tmp_path / "hf")
    hf, extractor = loaded(tmp_path / "hf")
    sounds = clips(1.0, 12.0)
    output = hf(**extractor(sounds, sampling_rate=16000, return_tensors="pt"), labels=torch.tensor([2, 0]))
    p = own_probabilities(own, sounds)
    torch.testing.assert_close(output.loss, -(p[0, 2].log() + p[1, 0].log()) / 2, atol=1e-5, rtol=0)


def test_a_step_of_fine_tuning_changes_the_weights_and_lowers_the_loss(folder):
    names = {"id2label": {0: "dog", 1: "cat"}, "label2id": {"dog": 0, "cat": 1}}
    torch.manual_seed(0)
    hf, extractor = loaded(folder, ignore_mismatched_sizes=True, problem_type="single_label_classification", **names)
    before = {key: value.clone() for key, value in hf.state_dict().items()}
    original, _ = loaded(folder)
    assert torch.equal(before["encoder.time_pos_embed"], original.state_dict()["encoder.time_pos_embed"])
    assert before["outputlayer.1.weight"].shape == (2, 64)
    assert 0.01 < before["outputlayer.1.weight"].std() < 0.03
    assert not before["outputlayer.1.bias"].any()

    examples = [
        {"input_values": extractor(clip, sampling_rate=16000)["input_values"][0], "labels": label}
        for clip, label in zip(clips(1.0, 2.0, 1.5), (0, 1, 0), strict=True)
    ]
    batch = extractor.pad(examples, return_tensors="pt")
    assert batch["labels"].tolist() == [0, 1, 0]
    hf.train()
    optimizer = torch.optim.AdamW(hf.parameters(), lr=1e-3)
    losses = []
    for _ in range(5):
        loss = hf(**batch).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    for name, parameter in hf.named_parameters():
        # Without later columns, and before softmax over all keys, some gradients are zero.
        assert not torch.equal(parameter, before[name]) or name.endswith("attn.qkv.bias"), name


def test_trainer_fine_tunes_clips_of_several_lengths(folder, tmp_path):
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    hf, extractor = loaded(folder)
    before = hf.outputlayer[1].weight.clone()
    examples = [
        dict(extractor(clip, sampling_rate=16000).data, labels=np.eye(3, dtype=np.float32)[i % 3])
        for i, clip in enumerate(clips(1.0, 2.0, 1.5, 0.5))
    ]
    examples = [{"input_values": e["input_values"][0], "labels": e["labels"]} for e in examples]
    settings = {"max_steps": 2, "per_device_train_batch_size": 2, "report_to": "none", "use_cpu": True}
    arguments = TrainingArguments(str(tmp_path / "run"), **settings)
    trainer = Trainer(
        model=hf, args=arguments, train_dataset=examples, eval_dataset=examples, processing_class=extractor
    )
    trainer.train()
    assert not torch.equal(hf.outputlayer[1].weight, before)
    assert np.isfinite(trainer.evaluate()["eval_loss"])
    assert trainer.predict(examples).predictions.shape == (4, 3)


def test_the_base_can_be_frozen(folder):
    hf, _ = loaded(folder)
    for parameter in hf.base_model.parameters():
        parameter.requires_grad = False
    trained = {name for name, parameter in hf.named_parameters() if parameter.requires_grad}
    assert trained == {f"outputlayer.{layer}.{kind}" for layer in (0, 1) for kind in ("weight", "bias")}


def test_a_fresh_model_starts_like_ours(folder):
    config = loaded(folder)[0].config
    torch.manual_seed(0)
    hf = CedForAudioClassification(config)
    ours = create_model("audiotransformer_pico", num_classes=3)
    for name, parameter in ours.named_parameters():
        twin = hf.get_parameter(name if name.startswith("outputlayer") else f"encoder.{name}".replace("bn.1", "bn"))
        if "patch_embed" not in name:  # a convolution's own start there
            torch.testing.assert_close(twin.std(), parameter.std(), atol=0.003, rtol=0.15)
            torch.testing.assert_close(twin.mean(), parameter.mean(), atol=0.005, rtol=0)


def test_the_extractor_computes_the_front_ends_features(folder, model):
    extractor = CedFeatureExtractor.from_pretrained(folder)
    assert (extractor.model_input_names, extractor.sampling_rate) == (["input_values"], 16000)
    for n_samples, n_frames in ((16000, 101), (160000, 1001)):
        values = extractor(np.zeros(n_samples, np.float32), sampling_rate=16000, return_tensors="pt")["input_values"]
        assert values.shape == (1, n_frames, 64)
        assert torch.all(values == -100)
    sounds = clips(1.0, 0.05, 2.5)
    for wanted in ("np", "pt", None):
        batch = extractor(sounds, sampling_rate=16000, padding=True, return_tensors=wanted)
        values, mask = batch["input_values"], batch["attention_mask"]
        assert isinstance(values, torch.Tensor if wanted == "pt" else np.ndarray)
        assert values.shape == (3, 251, 64)
        assert mask.sum(1).tolist() == [101, 16, 251]
        for row, sound in enumerate(sounds):
            alone = model.front_end(torch.from_numpy(sound)[None])[0].T
            np.testing.assert_array_equal(values[row][: len(alone)], alone)
            assert (values[row][len(alone) :] == -100).all()


@pytest.mark.parametrize(
    "kind",
    [
        lambda clip: clip,
        lambda clip: clip.tolist(),
        lambda clip: clip.astype(np.float64),
        torch.from_numpy,
        lambda clip: [clip],
        lambda clip: clip[None],
        lambda clip: [clip.tolist()],
    ],
)
def test_the_extractor_takes_arrays_lists_and_tensors(folder, kind):
    extractor = CedFeatureExtractor.from_pretrained(folder)
    clip = clips(0.5)[0]
    values = extractor(kind(clip), sampling_rate=16000, return_tensors="np")["input_values"]
    np.testing.assert_array_equal(values, extractor(clip, sampling_rate=16000)["input_values"])


def test_the_extractor_cuts_and_pads_to_a_length(folder):
    extractor = CedFeatureExtractor.from_pretrained(folder)
    cut = extractor(clips(1.0, 3.0), sampling_rate=16000, max_length=32000, truncation=True, return_tensors="np")
    assert cut["attention_mask"].sum(1).tolist() == [101, 201]
    filled = extractor(clips(1.0), sampling_rate=16000, padding="max_length", max_length=32000)
    assert filled["input_values"].shape == (1, 201, 64)
    loose = extractor(clips(1.0, 3.0), sampling_rate=16000, padding=False)["input_values"]
    assert [len(mel) for mel in loose] == [101, 301]
    again = extractor.pad({"input_values": loose}, pad_to_multiple_of=16, return_tensors="pt")
    assert again["input_values"].shape == (2, 304, 64)
    assert again["attention_mask"].sum(1).tolist() == [101, 301]
    twice = extractor.pad(again, return_tensors="pt")
    assert torch.equal(twice["input_values"], again["input_values"][:, :301])
    assert "attention_mask" not in extractor(clips(1.0), sampling_rate=16000, return_attention_mask=False)


@pytest.mark.parametrize(
    ("sound", "rate", "sentence"),
    [
        (np.zeros(8000, np.float32), 8000, "8000 Hz, this model takes 16000 Hz: resample"),
        (np.zeros(8000, np.int16), 16000, "clip 0 holds torch.int16; expected floats"),
        ([np.zeros(80), np.zeros((2, 80))], 16000, r"clip 1 is \(2, 80\); expected one channel"),
        (np.zeros(0, np.float32), 16000, r"clip 0 is \(0,\); expected one channel of at least one sample"),
        ([np.zeros(80), np.full(80, np.nan)], 16000, "clip 1 holds NaN"),
    ],
)
def test_what_is_no_waveform_is_reported(folder, sound, rate, sentence):
    with pytest.raises(ValueError, match=sentence):
        CedFeatureExtractor.from_pretrained(folder)(sound, sampling_rate=rate)


def test_what_is_no_spectrogram_is_reported(folder):
    hf, _ = loaded(folder)
    with pytest.raises(ValueError, match="expected spectrograms"):
        hf(torch.zeros(2, 16000))
    with pytest.raises(ValueError, match=r"\(2, 64, 101\); expected spectrograms \(batch, frames, 64 mel bands\)"):
        hf(torch.zeros(2, 64, 101))
    with pytest.raises(ValueError, match="attention_mask is"):
        hf(torch.zeros(2, 101, 64), torch.ones(2, 100))
    with pytest.raises(ValueError, match="a clip has 3 frames of its own; expected at least 16"):
        hf(torch.zeros(1, 101, 64), (torch.arange(101) < 3)[None])


def test_it_runs_in_half_precision(folder, model):
    hf, extractor = loaded(folder, dtype=torch.bfloat16)
    inputs = extractor(clips(1.0, 12.0), sampling_rate=16000, return_tensors="pt")
    with torch.inference_mode():
        difference = hf(**inputs).logits.sigmoid() - own_probabilities(model, clips(1.0, 12.0))
    assert difference.abs().max() < 0.05


def run_card(folder, monkeypatch, cache):
    """Run the commands of a folder's model card, and return it."""
    card = (folder / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(blocks) == 4
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(cache))
    for name in [name for name in sys.modules if name.split(".")[0] == "transformers_modules"]:
        monkeypatch.delitem(sys.modules, name)  # of another cache
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(folder.parent)
    for block in blocks:
        code = block.replace('"sound.wav"', "__import__('numpy').zeros(16000, 'float32')")
        exec(compile(code, "README.md", "exec"), {})
    return card


def test_the_commands_of_the_model_card_run(folder, monkeypatch, tmp_path):
    card = run_card(folder, monkeypatch, tmp_path)
    assert 'rain, dog, "barking", Ääni' in card
    assert "CED audio transformer (audiotransformer_pico, 4 blocks of width 64)" in card
    assert "above 10.12 s are cut into chunks of that length, and the chunks' probabilities are joined (mean)." in card
    assert re.search(r"^# license:", card, re.MULTILINE)


@pytest.mark.parametrize("kind", ["ced", "resnet10"])
def test_the_code_needs_transformers_torch_and_numpy_alone(kind):
    files = code_files(kind)
    own = {f"configuration_{kind}.py", "feature_extraction_ced.py", f"modeling_{kind}.py", "frontends.py"}
    assert own <= set(files)
    assert ("resnet.py" in files, "vit.py" in files) == (kind == "resnet10", kind == "ced")
    for text in files.values():
        for node in ast.walk(ast.parse(text)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0 or f"{node.module}.py" in files
                names = [] if node.level else [node.module]
            roots = {name.split(".")[0] for name in names}
            assert roots <= {"torch", "numpy", "transformers"} | set(sys.stdlib_module_names)


def test_it_runs_as_a_command_from_a_checkpoint(model, tmp_path):
    save_checkpoint(tmp_path / "mine.pt", model)
    done = run_command("scripts/export_hf.py", "-m", tmp_path / "mine.pt", tmp_path / "a" / "b")
    assert done.returncode == 0, done.stderr
    assert f"written     {tmp_path / 'a' / 'b'} (audiotransformer_pico, 3 classes, 16000 Hz)" in done.stdout
    assert {path.name for path in (tmp_path / "a" / "b").iterdir()} == {
        *code_files(),
        *("config.json", "model.safetensors", "preprocessor_config.json", "README.md", "LICENSE-CODE"),
    }
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]


def test_other_architectures_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"mn01_as is a MobileNetV3: only CED's audio transformers .* and ResNet-10"):
        export(create_model("mn01_as", num_classes=2), tmp_path / "hf")
    with pytest.raises(UserError, match="one class and softmax"):
        export(tagger(num_classes=1, activation="softmax"), tmp_path / "hf")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_use_is_refused_or_keeps_what_is_not_ours(model, tmp_path):
    target = tmp_path / "hf"
    target.mkdir()
    export(model, target)
    with pytest.raises(UserError, match="is not empty: give another folder, or --overwrite"):
        export(model, target)
    (target / "notes.txt").write_text("mine")
    (target / "README.md").write_text("license: mine")
    other = tagger(seed=1, labels=["a", "b"])
    export(other, target, overwrite=True)
    assert (target / "notes.txt").read_text() == "mine"
    assert (target / "README.md").read_text() == "license: mine"
    assert load_model(target).labels == ["a", "b"]
    assert torch.equal(own_probabilities(load_model(target), clips(1.0)), own_probabilities(other, clips(1.0)))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        export(model, tmp_path / "file")


def test_an_interrupted_export_leaves_nothing(model, folder, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(hf_folder, "_format_card", stop)
    for target, overwrite in ((tmp_path / "new", False), (folder, True)):
        before = {path: path.read_bytes() for path in target.parent.rglob("*") if path.is_file()}
        with pytest.raises(KeyboardInterrupt):
            export(model, target, overwrite=overwrite)
        assert {path: path.read_bytes() for path in target.parent.rglob("*") if path.is_file()} == before


def test_damaged_weights_are_reported_before_anything_is_written(model, tmp_path):
    damaged = tagger(labels=NAMES)
    damaged.outputlayer[1].bias.data[0] = float("nan")
    with pytest.raises(UserError, match=r"weights are damaged|NaN or infinite"):
        export(damaged, tmp_path / "hf")
    assert list(tmp_path.iterdir()) == []


def test_the_folder_holds_the_published_state_dict(audioset_folder):
    hf, _ = loaded(audioset_folder)
    keys = set(hf.state_dict())
    assert "encoder.init_bn.running_mean" in keys
    assert {key.split(".")[0] for key in keys} == {"encoder", "outputlayer"}
    assert not any("front_end" in key for key in keys)
    weights = audioset_folder / "model.safetensors"
    assert set(load_file(weights)) == keys
    assert weights.stat().st_mode & 0o077 == (audioset_folder / "config.json").stat().st_mode & 0o077
