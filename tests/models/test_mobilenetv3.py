import csv
import json

import numpy as np
import pytest
import soundfile
import soxr
import torch

from models import create_model, load_model, save_checkpoint
from tests.models.sounds import noise, padded


@pytest.fixture(scope="module")
def teacher(shared):
    return load_model("mn04_as", weights=shared / "data" / "teachers" / "mn04_as_mAP_432.pt")


def clip_at_32k(path):
    wave, rate = soundfile.read(path, dtype="float32", always_2d=True)
    return torch.from_numpy(soxr.resample(wave.mean(1), rate, 32000, "HQ"))


@pytest.mark.parametrize("name", ["mn04_as", "mn10_as", "dymn04_as", "dymn10_as"])
def test_names_and_shapes_are_the_published_ones(shared, name):
    published = json.loads((shared / "fixtures" / "state_dicts" / f"{name}.json").read_text())
    model = create_model(name)
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == published["state_dict"]
    assert sum(p.numel() for p in model.parameters()) == published["n_parameters"]


@pytest.mark.parametrize(("name", "millions"), [("mn20_as", 17.91), ("mn40_as_ext", 68.43)])
def test_wide_ones_have_the_published_number_of_parameters(name, millions):
    assert sum(p.numel() for p in create_model(name).parameters()) / 1e6 == pytest.approx(millions, abs=0.005)


@torch.inference_mode()
def test_the_real_teacher_gives_its_published_top_five(shared, teacher):
    for clip in json.loads((shared / "fixtures" / "mn04_esc10_top5.json").read_text())["clips"]:
        output = teacher.predict(clip_at_32k(shared / "data" / "esc10" / clip["filename"])[None])[0]
        classes, values = zip(*clip["top5"], strict=True)
        assert output.topk(5).indices.tolist() == list(classes)
        np.testing.assert_allclose(output[list(classes)], values, atol=1e-3, rtol=0)


@torch.inference_mode()
def test_the_real_teacher_is_right_on_esc10(shared, teacher):
    with open(shared / "data" / "esc10" / "esc10.tsv", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert len(rows) == 400
    mapped = sorted({int(label) for row in rows for label in row["labels"].split(";")})
    right = 0
    for row in rows:
        output = teacher.predict(clip_at_32k(shared / "data" / "esc10" / row["filename"])[None])[0]
        right += mapped[int(output[mapped].argmax())] in map(int, row["labels"].split(";"))
    assert right == pytest.approx(386, abs=2)  # what the published code gets; ties may break otherwise


@torch.inference_mode()
def test_a_clip_in_a_padded_batch_gives_what_it_gives_alone(teacher):
    clips = [noise(n, seed=n) for n in (32000, 1, 700, 50000, 32000)]
    batch, lengths = padded(clips)
    together = teacher.predict(batch, lengths)
    by_mel = teacher.forward_spectrogram(teacher.front_end(batch, lengths), teacher.front_end.n_frames(lengths))
    embedded, frames = teacher.embed(batch, lengths)
    for i, clip in enumerate(clips):
        torch.testing.assert_close(together[i], teacher.predict(clip[None])[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(by_mel[i].sigmoid(), together[i], atol=1e-5, rtol=0)
        alone, alone_frames = teacher.embed(clip[None])
        n_steps = teacher.n_steps(len(clip))
        assert alone_frames.shape[1] == n_steps
        torch.testing.assert_close(embedded[i], alone[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(frames[i, :n_steps], alone_frames[0], atol=1e-4, rtol=1e-4)
        assert torch.all(frames[i, n_steps:] == 0)


@torch.inference_mode()
def test_the_embedding_is_what_the_classifier_reads(teacher):
    wave = noise(32000)[None]
    clip, frames = teacher.embed(wave)
    assert clip.shape == (1, teacher.embed_dim)
    torch.testing.assert_close(teacher.classifier[2:](clip), teacher(wave), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(frames.mean(1), clip, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["mn01_as", "dymn04_as", "passt_pico"])
def test_random_band_edges_are_arguments_of_training_alone_and_kept_with_the_weights(name, tmp_path):
    torch.manual_seed(0)
    size = {"depth": 1} if name == "passt_pico" else {}
    plain = create_model(name, num_classes=3, **size)
    torch.manual_seed(0)
    model = create_model(name, num_classes=3, fmin_aug_range=10, fmax_aug_range=2000, **size)
    wave = noise(16000)[None]
    model.generator = torch.Generator()
    mels = []
    for seed in (1, 1, 2):
        model.generator.manual_seed(seed)
        mels.append(model.front_end(wave))
    assert torch.equal(mels[0], mels[1])
    assert (mels[0] - mels[2]).abs().max() > 0.01
    assert torch.equal(plain.front_end(wave), plain.eval().front_end(wave))
    save_checkpoint(tmp_path / "model.pt", model)
    loaded = load_model(tmp_path / "model.pt")
    assert loaded.arguments == {"fmin_aug_range": 10, "fmax_aug_range": 2000} | size
    with torch.inference_mode():
        assert torch.equal(loaded.predict(wave), plain.predict(wave))
        assert torch.equal(model.eval().predict(wave), plain.predict(wave))
