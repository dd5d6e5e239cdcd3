import json
import logging

import pytest
import torch
import torchaudio
from torch import nn

from common.errors import UserError
from models import create_model, get_ssondo, list_models, load_model, load_weights, save_checkpoint
from models.fourier import PortableFrontEnd
from models.frontends import build_front_end
from models.headed import Head
from models.heads import save_head
from models.slaney_mel import SlaneyMel
from tests.models.sounds import noise

RATE = 32000


def lively(model):
    """Give the batch norms of a fresh network statistics of sound, so that its embeddings are of the usual size."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None
    with torch.no_grad():
        model.train()(noise(4 * 16000).reshape(4, -1) * torch.tensor([0.01, 0.1, 1.0, 4.0])[:, None])
    return model.eval()


@pytest.fixture(scope="module")
def student():
    torch.manual_seed(0)
    return lively(create_model("mobilenetv3", num_classes=6, width=0.1))


def training_config(model, head_width, **student):
    return {
        "student_model": {"model_name": model, "sr": RATE, **student},
        "classification_head": {"head_type": "mlp", "n_classes": head_width, "pooling": "mean"},
        "preprocess": {
            "slice_audio": {"win_len": 10, "step_size": 10},
            "logmelspec": {"win_len": 0.032, "hop_len": 0.016, "n_mels": 128, "f_min": 50, "f_max": None},
            "normalize": {"mean": 0.0, "std": 1.0},
        },
        "knowledge_distillation": {"lambda": 0, "loss": "cosine_similarity"},
    }


def published(path, model, config, **more):
    """Write a checkpoint as S-SONDO's training does, around the weights of `model`."""
    state = {f"student_model.{key}": value for key, value in model.state_dict().items()}
    state["preprocess.1.MelSpectrogram.spectrogram.window"] = torch.hann_window(1024)
    content = {"epoch": 3, "pytorch-lightning_version": "2.4.0", "callbacks": {}, "state_dict": state}
    torch.save({**content, "training_config": config, **more}, path)
    return path


def test_the_front_end_is_torchaudios_in_slaneys_scale():
    front_end, sound = SlaneyMel(), torch.stack([noise(10 * RATE, 1, 0.001), noise(10 * RATE, 2)])
    reference = torchaudio.transforms.MelSpectrogram(
        *(RATE, 1024, 1024, 512, 50.0, 16000.0), n_mels=128, center=False, norm="slaney", mel_scale="slaney"
    )
    mel = front_end(sound)
    assert mel.shape == (2, 128, 624)
    torch.testing.assert_close(mel, (reference(sound) + 1e-3).log(), atol=1e-5, rtol=0)
    torch.testing.assert_close(PortableFrontEnd(front_end)(sound), mel, atol=1e-4, rtol=0)
    again = build_front_end(json.loads(json.dumps(front_end.description)))
    torch.testing.assert_close(again(sound), mel, atol=0, rtol=0)


def test_the_front_end_reads_silence_behind_a_clip():
    front_end = SlaneyMel(min_frames=3)
    clips = torch.stack([noise(5000), noise(5000, 1)])
    mel = front_end(clips, torch.tensor([5000, 1]))
    torch.testing.assert_close(mel[0], front_end(clips[:1])[0])
    torch.testing.assert_close(mel[1, :, :3], front_end(clips[1:, :1])[0])
    assert mel[1, :, 3:].flatten().tolist() == pytest.approx([front_end.power_db_to_value(-100)] * 128 * 5)
    constant = front_end.mel_weights.sum(0).mean().item()  # of power 1 in every bin
    assert front_end.compress(torch.tensor([[[constant]]]), None).item() == pytest.approx(
        front_end.power_db_to_value(10 * torch.tensor(constant).log10().item())
    )


@pytest.mark.parametrize("name", ["mobilenetv3", "dymn"])
def test_names_and_shapes_are_the_published_ones(shared, name):
    listing = json.loads((shared / "fixtures" / "state_dicts" / f"ssondo_{name}.json").read_text())
    model = create_model(name, num_classes=3840)
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == listing["state_dict"]
    assert sum(p.numel() for p in model.parameters()) == listing["n_parameters"]
    assert model.embed_dim == 960


def test_the_published_names_are_known():
    assert list_models("m*-*") == [f"{teacher}-{name}" for teacher in ("m2d", "matpac") for name in STUDENTS]


STUDENTS = ("dymn", "eres2net", "mobilenetv3")


@pytest.mark.parametrize(
    ("name", "arguments", "theirs"),
    [
        ("mobilenetv3", {"width": 0.1}, {"model_name": "mn10_im", "width_mult": 0.1, "strides": (2, 2, 2, 2)}),
        ("dymn", {"width": 0.1}, {"model_name": "dymn10_im", "width_mult": 0.1, "pretrain_final_temp": 2.0}),
        (
            "eres2net",
            {"m_channels": 4, "num_blocks": [1, 1, 1, 1, 1]},
            {"model_name": "ERes2Net", "m_channels": 4, "num_blocks": [1] * 5, "feat_dim": 128, "add_layer": True}
            | {"pooling_func": "TSTP"},
        ),
    ],
)
@torch.inference_mode()
def test_a_published_checkpoint_loads_and_its_projection_is_left_out(name, arguments, theirs, tmp_path, caplog):
    torch.manual_seed(0)
    model = lively(create_model(name, num_classes=24, **arguments, **({"temperature": 2.0} if name == "dymn" else {})))
    path = published(tmp_path / "student.ckpt", model, training_config(theirs.pop("model_name"), 24, **theirs))
    with caplog.at_level(logging.WARNING):
        again = load_model(path)
    assert "its last layer of 24 outputs is dropped" in caplog.text
    wave = noise(20000)[None]
    assert (again.name, again.num_classes, again.labels) == (name, 0, [])
    torch.testing.assert_close(again.embed(wave)[0], model.embed(wave)[0], atol=0, rtol=0)
    assert again(wave).shape == (1, 0)
    torch.testing.assert_close(load_model(path, num_classes=24)(wave), model(wave), atol=0, rtol=0)
    save_checkpoint(tmp_path / "own.pt", again)
    embeds = load_model(tmp_path / "own.pt")
    torch.testing.assert_close(embeds.embed(wave)[0], model.embed(wave)[0], atol=0, rtol=0)
    assert load_model(tmp_path / "own.pt", num_classes=5)(wave).shape == (1, 5)


def test_a_published_checkpoint_that_is_not_whole_or_not_ours_is_refused(student, tmp_path):
    config = training_config("mn10_im", 6, width_mult=0.1)
    lacking = student.state_dict()
    del lacking["model.features.3.block.0.0.weight"]
    path = tmp_path / "student.ckpt"
    torch.save({"state_dict": {f"student_model.{k}": v for k, v in lacking.items()}, "training_config": config}, path)
    with pytest.raises(UserError, match=r"1 tensors are missing: model\.features\.3\.block\.0\.0\.weight"):
        load_model(path)
    published(path, student, training_config("mn10_im", 6, width_mult=0.1, dilated=True, se_dims="f"))
    with pytest.raises(UserError, match=r"(?s)2 faults.*dilated is True, expected False.*se_dims is 'f', expected 'c'"):
        load_model(path)
    with pytest.raises(UserError, match="expected one of mn"):
        load_model(published(path, student, training_config("vgg", 6)))
    with pytest.raises(UserError, match="KeyError: 'width_mult'"):
        load_model(published(path, student, training_config("mn10_im", 6)))


def test_a_student_starts_from_a_network_for_pictures(tmp_path, caplog):
    torch.manual_seed(0)
    tagger = create_model("mn01_as", num_classes=1000)
    torch.save(tagger.state_dict(), tmp_path / "mn01_im.pt")
    model = create_model("mobilenetv3", num_classes=0, width=0.1)
    with caplog.at_level(logging.WARNING):
        load_weights(model, tmp_path / "mn01_im.pt", pre_training=True)
    assert "its classifier is left out" in caplog.text
    for key, value in tagger.state_dict().items():
        if not key.startswith("classifier"):
            torch.testing.assert_close(model.state_dict()[f"model.{key}"], value, atol=0, rtol=0)


@torch.inference_mode()
def test_clips_come_back_in_segments_and_as_their_mean(student):
    model = get_ssondo(student)
    long = noise(25 * RATE, 3) * torch.linspace(0.1, 3, 25 * RATE)
    clips = torch.stack([long, long.flip(0)])
    segments, whole = model(clips), model.get_embeddings(clips)
    assert segments.shape == (2, 3, model.embedding_dim)
    for clip, own, mean in zip(clips, segments, whole, strict=True):
        parts = [student.embed(part[None])[0][0] for part in clip.split(10 * RATE)]
        torch.testing.assert_close(own, torch.stack(parts), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(mean, (2 * parts[0] + 2 * parts[1] + parts[2]) / 5, atol=1e-5, rtol=1e-4)
    short = model.get_embeddings(clips, torch.tensor([25 * RATE, 9000]))
    torch.testing.assert_close(short[1], student.embed(clips[1:, :9000])[0][0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model(long), segments[:1], atol=1e-5, rtol=1e-4)
    mel = model.preprocess(clips)
    assert mel.shape == (2, 3, 128, 624)
    torch.testing.assert_close(mel[:, 0], student.front_end(clips[:, : 10 * RATE]))
    with pytest.raises(UserError, match=r"shape \(2, 1, 16000\); expected \(B,S\): average the channels"):
        model(torch.zeros(2, 1, 16000))


def test_heads_old_and_new(student, tmp_path):
    saved = Head(student.embed_dim, 4)
    saved.padded = True
    save_head(tmp_path / "mine.pt", saved)
    wave = noise(2 * 20000).reshape(2, -1)
    model = get_ssondo(student, head="mine", return_logits=True, heads_folder=tmp_path)
    logits, clip = model(wave)
    filled = nn.functional.pad(wave, (0, 10 * RATE - 20000))
    torch.testing.assert_close(clip, student.embed(filled)[0], atol=1e-5, rtol=1e-4)  # as the head was trained
    torch.testing.assert_close(logits, saved.eval()(clip))
    assert get_ssondo(student, head="linear", n_classes=10)(wave).shape == (2, 10)
    assert get_ssondo(student, head="mlp", n_classes=3).head.hidden_sizes == (512,)
    assert get_ssondo(student, head="mlp", n_classes=3, hidden_sizes=[8, 4]).head.hidden_sizes == (8, 4)
    with pytest.raises(UserError, match="head 'linear' needs n_classes"):
        get_ssondo(student, head="linear")


@torch.inference_mode()
def test_the_projection_of_a_published_checkpoint_is_kept_on_request(student, tmp_path):
    path = published(tmp_path / "student.ckpt", student, training_config("mn10_im", 6, width_mult=0.1))
    wave = noise(15 * RATE)
    segments, projected = get_ssondo(path, return_logits=True)(wave)
    by_hand = student.classification_head(segments[0])
    torch.testing.assert_close(projected[0], (2 * by_hand[0] + by_hand[1]) / 3, atol=1e-5, rtol=1e-4)
    save_checkpoint(tmp_path / "own.pt", load_model(path))
    with pytest.raises(UserError, match="has kept no projection"):
        get_ssondo(tmp_path / "own.pt", return_logits=True)
    model = get_ssondo(path)
    assert model.backbone is model.model.model
    assert list(dict(model.backbone.named_children())) == ["features"]


@torch.inference_mode()
def test_segments_are_as_long_as_a_checkpoint_says(student, tmp_path, caplog):
    """Its `slice_audio.win_len`, 10 s in the published ones; kept in a checkpoint of ours, and by a new head."""
    config = training_config("mn10_im", 6, width_mult=0.1)
    assert get_ssondo(published(tmp_path / "ten.ckpt", student, config)).segment_samples == 10 * RATE
    assert "segment_seconds" not in load_model(tmp_path / "ten.ckpt").arguments
    assert "side by side" not in caplog.text
    config["preprocess"]["slice_audio"] = {"win_len": 2.5, "step_size": 1}
    path = published(tmp_path / "student.ckpt", student, config)
    model, wave = get_ssondo(path), noise(7 * RATE)
    assert "its segments of 2.5 s began every 1 s" in caplog.text
    parts = [student.embed(part[None])[0][0] for part in wave.split(5 * RATE // 2)]
    torch.testing.assert_close(model(wave)[0], torch.stack(parts), atol=1e-4, rtol=1e-4)
    mean = (2.5 * parts[0] + 2.5 * parts[1] + 2 * parts[2]) / 7
    torch.testing.assert_close(model.get_embeddings(wave)[0], mean, atol=1e-4, rtol=1e-4)
    save_checkpoint(tmp_path / "own.pt", model.model)
    assert get_ssondo(tmp_path / "own.pt").segment_samples == 5 * RATE // 2
    fresh = get_ssondo(path, head="linear", n_classes=3)
    assert (fresh.segment_samples, fresh.head.chunk_seconds) == (5 * RATE // 2, 2.5)
    short = Head(student.embed_dim, 3)
    short.facts = {"chunk_length": 1.0}
    save_head(tmp_path / "short.pt", short)
    assert get_ssondo(path, head=tmp_path / "short.pt").segment_samples == RATE  # the head's own come first
    del config["preprocess"]["slice_audio"]
    assert get_ssondo(published(tmp_path / "silent.ckpt", student, config)).segment_samples == 10 * RATE
    with pytest.raises(UserError, match="segment_seconds is 0"):
        create_model("mobilenetv3", width=0.1, segment_seconds=0)


@torch.inference_mode()
def test_segments_are_as_long_as_those_a_head_was_trained_on(student, tmp_path):
    saved = Head(student.embed_dim, 3)
    saved.facts = {"chunk_length": 1.0}
    save_head(tmp_path / "short.pt", saved)
    model = get_ssondo(student, head=tmp_path / "short.pt")
    wave = noise(80000)
    assert model.preprocess(wave).shape[1] == 3  # 2.5 s at 32 kHz
    parts = [student.embed(part[None])[0] for part in wave.flatten().split(32000)]
    mean = (parts[0] + parts[1] + 0.5 * parts[2]) / 2.5
    torch.testing.assert_close(model.get_embeddings(wave), mean, atol=1e-4, rtol=1e-4)
