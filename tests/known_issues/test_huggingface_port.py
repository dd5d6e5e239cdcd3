"""Traps that the published port of CED to Hugging Face's transformers fell into."""

import socket

import numpy as np
import pytest
import torch

from models import audioset_labels, create_model
from scripts.hf.configuration_ced import CedConfig
from scripts.hf.feature_extraction_ced import CedFeatureExtractor
from scripts.hf.folder import export
from scripts.hf.modeling_ced import CedForAudioClassification
from tests.models.sounds import noise


@pytest.fixture(scope="module")
def own():
    torch.manual_seed(0)
    model = create_model("audiotransformer_pico").eval()
    torch.nn.init.normal_(model.outputlayer[1].weight, std=0.2)
    return model


@pytest.fixture(scope="module")
def folder(own, tmp_path_factory):
    target = tmp_path_factory.mktemp("hf") / "pico"
    export(own, target)
    return target


@pytest.fixture(scope="module")
def tag(folder):
    extractor = CedFeatureExtractor.from_pretrained(folder)
    model = CedForAudioClassification.from_pretrained(folder).eval()

    @torch.inference_mode()
    def probabilities(*sounds):
        inputs = extractor([sound.numpy() for sound in sounds], sampling_rate=16000, return_tensors="pt")
        return model(**inputs).logits.sigmoid()

    return probabilities


def test_names_of_classes_are_neither_fetched_nor_cut_at_their_commas(folder, monkeypatch):
    def refuse(*_):
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert CedConfig().num_labels == 527
    config = CedConfig.from_pretrained(folder)
    assert list(config.id2label.values()) == audioset_labels()
    assert config.id2label[1] == "Male speech, man speaking"


@torch.inference_mode()
def test_logits_are_logits(folder, own):
    # They were probabilities: whoever applied the sigmoid squeezed them into 0.5 to 0.73.
    clip = noise(16000)
    inputs = CedFeatureExtractor.from_pretrained(folder)(clip.numpy(), sampling_rate=16000, return_tensors="pt")
    logits = CedForAudioClassification.from_pretrained(folder).eval()(**inputs).logits
    assert logits.min() < 0
    torch.testing.assert_close(logits.sigmoid(), own.predict(clip[None]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("n_frames", [2024, 3036])
@torch.inference_mode()
def test_chunks_of_long_clips_in_a_batch_are_each_clips_own_and_none_is_dropped(tag, own, n_frames):
    # Chunks were reshaped across the batch, their embeddings averaged, and the last whole one was dropped.
    clips = [noise((n_frames - 1) * 160, seed=seed, level=level) for seed, level in ((0, 0.3), (1, 0.01), (2, 0.1))]
    together = tag(*clips)
    for clip, row in zip(clips, together, strict=True):
        chunks = own.front_end(clip[None]).split(1012, dim=2)
        assert len(chunks) == n_frames // 1012
        wanted = torch.cat([own.forward_spectrogram(chunk) for chunk in chunks]).mean(0)
        torch.testing.assert_close(row, wanted, atol=1e-5, rtol=0)
    assert (together[0] - together[1]).abs().max() > 1e-3


def test_a_clip_gets_neither_its_padding_nor_the_loudest_of_its_batch(tag):
    # Clips were filled up with zeros that were heard, and the dynamic range was clamped below the batch's peak.
    quiet, loud = noise(16000, level=1e-6), noise(200_000, seed=1, level=0.9)
    torch.testing.assert_close(tag(quiet, loud)[0], tag(quiet)[0], atol=1e-5, rtol=0)
    heard = tag(torch.cat([quiet, torch.zeros(len(loud) - len(quiet))]))[0]
    assert (heard - tag(quiet)[0]).abs().max() > 0.01


def test_the_loss_of_several_labels_is_computed(folder):
    # The loss "BCE" was looked up by that name, which none has, and labels were one class a clip.
    model = CedForAudioClassification.from_pretrained(folder)
    labels = torch.zeros(2, 527)
    labels[0, [3, 7]] = 1
    output = model(torch.randn(2, 101, 64), labels=labels)
    torch.testing.assert_close(output.loss, torch.nn.BCELoss()(output.logits.sigmoid(), labels), atol=1e-5, rtol=0)


def test_the_extractor_gives_numpy_as_well(folder):
    # It gave PyTorch tensors only.
    extractor = CedFeatureExtractor.from_pretrained(folder)
    values = extractor(noise(16000).numpy(), sampling_rate=16000, return_tensors="np")["input_values"]
    assert isinstance(values, np.ndarray)
    assert values.shape == (1, 101, 64)
