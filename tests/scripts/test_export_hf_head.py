"""A model with a head as a folder of transformers: the head's classes, and what `inference.py --head` says."""

import csv
import json
from functools import partial

import numpy as np
import pytest
import torch

import inference
from audio.io import read_audio
from common.errors import UserError
from models import attach_head, create_model, load_model, save_checkpoint
from models.head_inputs import measure_layers
from models.headed import Head
from models.heads import save_head, weights_sha256
from models.other_heads import create_head
from scripts import export_hf
from scripts.hf.folder import export
from scripts.hf.modeling_ced import CedForAudioClassification
from scripts.hf.modeling_resnet10 import ResNet10ForAudioClassification
from tests.conftest import run_command, write_tones
from tests.models.sounds import noise
from tests.scripts.test_export_hf import clips, loaded, own_probabilities, tagger
from tests.scripts.test_export_hf_resnet import resnet

NAMES = ["rain", 'dog, "barking"', "Ääni", "sea"]


def headed(model, **settings):
    """A model with a head that tells sounds apart."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        head = Head(model.embed_dim, len(NAMES), labels=NAMES, **settings).eval()
        embeddings = model.embed(torch.stack([noise(16000, seed, 10.0**-seed) for seed in range(4)]))[0]
        head.mean.copy_(embeddings.mean(0))
        head.scale.copy_(embeddings.std(0).clamp(min=1e-3))
        head.layers[-1].weight.mul_(3)
    head.facts = {"name": "mine", "model": model.name, "weights_sha256": weights_sha256(model), "chunk_length": 2.0}
    head.facts["source"] = "/home/me/experiments/mine"
    return attach_head(model, head)


@pytest.mark.parametrize(
    ("network", "settings"),
    [
        (partial(tagger, target_length=248), {"activation": "softmax"}),
        (
            partial(tagger, target_length=248, pooling="token"),
            {"activation": "sigmoid", "hidden_sizes": [8, 6], "dropout": 0.5},
        ),
        (resnet, {"activation": "softmax"}),
        (resnet, {"activation": "sigmoid", "hidden_sizes": [8, 6], "dropout": 0.5}),
    ],
)
@torch.inference_mode()
def test_the_folder_gives_the_heads_probabilities_here_and_in_transformers(network, settings, tmp_path):
    own = headed(network(num_classes=7), **settings)
    export(own, tmp_path / "hf")
    model_class = ResNet10ForAudioClassification if network is resnet else CedForAudioClassification
    hf, extractor = loaded(tmp_path / "hf", model_class)
    sounds = clips(0.4, 1.0, 2.5, 9.3)  # of one chunk, and of several
    wanted = own_probabilities(own, sounds)
    assert wanted.std(0).max() > 0.03
    logits = hf(**extractor(sounds, sampling_rate=16000, return_tensors="pt")).logits
    found = logits.softmax(-1) if own.activation == "softmax" else logits.sigmoid()
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    hf.save_pretrained(tmp_path / "again")
    for folder in ("hf", "again"):
        back = load_model(tmp_path / folder)
        torch.testing.assert_close(own_probabilities(back, sounds), wanted, atol=1e-6, rtol=0)
        assert (back.labels, back.activation, back.full_name) == (NAMES, own.activation, own.full_name)
        assert (back.head.chunk_seconds, back.head.dropout) == (2.0, own.head.dropout)
    assert "/home/me" not in (tmp_path / "hf" / "config.json").read_text()
    assert "a head on its embeddings" in (tmp_path / "hf" / "README.md").read_text()


@pytest.mark.parametrize("kind", ["layers", "knn", "prototypes"])
@torch.inference_mode()
def test_heads_of_other_kinds_give_the_same_probabilities_here_and_in_transformers(kind, tmp_path):
    torch.manual_seed(0)
    model = tagger(num_classes=7, target_length=248)
    width, widths = model.embed_dim, measure_layers(model)[:2]
    if kind == "layers":
        head = create_head("mlp", sum(widths), len(NAMES), labels=NAMES, layers=[0, 1], widths=widths)
        head.gate.copy_(torch.tensor([0.5, -0.5]))
    elif kind == "knn":
        head = create_head("knn", width, len(NAMES), labels=NAMES, n_examples=8, n_neighbours=3)
        head.store(torch.randn(8, width), torch.eye(len(NAMES)).repeat(2, 1))
    else:
        head = create_head("prototypes", width, len(NAMES), labels=NAMES, n_prototypes=8, stride=2)
    head.facts = {"name": "mine", "model": model.name}
    own = attach_head(model, head.eval())
    export(own, tmp_path / "hf")
    hf, extractor = loaded(tmp_path / "hf", CedForAudioClassification)
    sounds = clips(0.4, 1.0, 2.5, 9.3)  # of one chunk, and of several
    wanted = own_probabilities(own, sounds)
    found = hf(**extractor(sounds, sampling_rate=16000, return_tensors="pt")).logits.softmax(-1)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    back = load_model(tmp_path / "hf")
    assert type(back.head) is type(head)
    torch.testing.assert_close(own_probabilities(back, sounds), wanted, atol=1e-6, rtol=0)


ELSEWHERE = """
import json, sys, numpy as np, torch
from transformers import AutoFeatureExtractor, AutoModelForAudioClassification, pipeline
folder = sys.argv[1]
extractor = AutoFeatureExtractor.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForAudioClassification.from_pretrained(folder, trust_remote_code=True).eval()
sound = np.load("sound.npy")
with torch.inference_mode():
    found = model(**extractor(sound, sampling_rate=16000, return_tensors="pt")).logits.softmax(-1)[0]
tag = pipeline("audio-classification", model=folder, trust_remote_code=True)
several = [sound, np.tile(sound, 12), sound[:5000]]
alone, batch = [tag(one, top_k=4) for one in several], tag(several, top_k=4, batch_size=3)
for one, other in zip(alone, batch, strict=True):
    assert [tag["label"] for tag in one] == [tag["label"] for tag in other]
    np.testing.assert_allclose([tag["score"] for tag in one], [tag["score"] for tag in other], atol=1e-5)
print("RESULT", json.dumps({model.config.id2label[i]: value for i, value in enumerate(found.tolist())}))
"""


def test_the_command_writes_what_transformers_loads_without_this_project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tagged = headed(tagger(num_classes=7))
    save_checkpoint("model.pt", tagged.model)
    save_head("heads/mine.pt", tagged.head)
    write_tones(tmp_path, 1, 1, 16000, 1.0)
    export_hf.main(["-m", "model.pt", "--head", "mine", "hf"])
    (tmp_path / "use.py").write_text(ELSEWHERE)
    np.save("sound.npy", tone(tmp_path))
    environment = {"HF_HOME": str(tmp_path / "home"), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    environment |= {"HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    done = run_command("use.py", tmp_path / "hf", cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.split("RESULT", 1)[1])
    assert list(found) == NAMES
    for number, words in enumerate((["-m", "model.pt", "--head", "mine"], ["-m", "hf"])):
        inference.main(["sounds", *words, "-k", "4", "--output", f"{number}.csv", "--quiet", "--device", "cpu"])
        with open(f"{number}.csv", newline="") as file:
            assert {row["label"]: float(row["probability"]) for row in csv.DictReader(file)} == pytest.approx(
                found, abs=1e-5
            )


def tone(folder):
    """The samples of the only tone, as files are read."""
    return read_audio(folder / "sounds" / "tone_000.wav", 16000)[0]


def test_transformers_can_fine_tune_it_on_other_classes(tmp_path):
    export(headed(tagger(num_classes=7), hidden_sizes=[8]), tmp_path / "hf")
    hf, extractor = loaded(
        tmp_path / "hf", id2label={0: "a", 1: "b"}, label2id={"a": 0, "b": 1}, ignore_mismatched_sizes=True
    )
    batch = extractor(clips(1.0, 2.0), sampling_rate=16000, return_tensors="pt")
    output = hf(**batch, labels=torch.tensor([0, 1]))
    output.loss.backward()
    assert output.logits.shape == (2, 2)
    assert hf.outputlayer.layers[0].weight.grad.abs().max() > 0


def test_heads_that_no_folder_can_hold_are_refused(tmp_path):
    with pytest.raises(UserError, match="mn01_as is a MobileNetV3: only CED's audio transformers"):
        export(headed(create_model("mn01_as", num_classes=0).eval()), tmp_path / "hf")
    padded = headed(tagger(num_classes=7))
    padded.head.padded = True
    with pytest.raises(UserError, match="trained on clips filled up with zeros"):
        export(padded, tmp_path / "hf")
    assert list(tmp_path.iterdir()) == []
