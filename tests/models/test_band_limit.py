"""A model's band limit: no more than the bands below it, for every front-end, in checkpoints and exports alike."""

import json

import numpy as np
import onnx
import pytest
import soxr
import torch

from common.errors import UserError
from models import create_model, load_model, load_weights, save_checkpoint
from models.ced_mel import CedMel
from models.efficientat_mel import EfficientAtMel
from models.frontends import build_front_end
from models.kaldi_mel import KaldiMel
from models.onnx import export_onnx
from models.slaney_mel import SlaneyMel
from scripts.hf.folder import export
from tagging.onnx_engine import OnnxEngine
from tests.models.sounds import noise, padded
from tests.scripts.test_export_hf import NAMES, own_probabilities, tagger
from tests.scripts.test_export_hf import loaded as ced_loaded
from tests.scripts.test_export_hf_resnet import loaded as resnet_loaded
from tests.scripts.test_export_hf_resnet import resnet

LIMIT = 3600.0
FRONT_ENDS = [CedMel, EfficientAtMel, KaldiMel, SlaneyMel]


def limited(kind, hertz=LIMIT, **settings):
    front_end = kind(**settings)
    front_end.limit_band(hertz)
    return front_end


@pytest.mark.parametrize("kind", FRONT_ENDS)
def test_bands_below_the_limit_are_as_without_it_and_those_above_are_silent(kind):
    sound = noise(16000)[None]
    plain, found = kind()(sound)[0], limited(kind)(sound)[0]
    below = kind().mel_edges_hz[2:] <= LIMIT
    assert 0 < below.sum() < len(below)
    torch.testing.assert_close(found[below], plain[below])
    silence = kind()(torch.zeros(1, 16000))[0]
    torch.testing.assert_close(found[~below], silence[~below], atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", FRONT_ENDS)
def test_what_a_sound_holds_above_the_limit_changes_nothing(kind):
    front_end = limited(kind)
    sound = noise(16000).numpy()
    spectrum = np.fft.rfft(noise(16000, seed=1, level=1.0).numpy())
    spectrum[np.fft.rfftfreq(16000, 1 / front_end.sample_rate) < LIMIT + 500] = 0
    bright = sound + np.fft.irfft(spectrum).astype(np.float32)
    # frames that reach over an edge of the clip hold what mirroring it there makes of any sound
    found = front_end(torch.from_numpy(np.stack([sound, bright])))[..., 3:-3]
    plain = kind()(torch.from_numpy(np.stack([sound, bright])))[..., 3:-3]
    # side lobes of the window leave a little
    assert (found[0] - found[1]).abs().mean() < 0.005 * (plain[0] - plain[1]).abs().mean()


@pytest.mark.parametrize("kind", FRONT_ENDS)
def test_a_limited_clip_in_a_padded_batch_has_the_features_it_has_alone(kind):
    front_end, clips = limited(kind), [noise(16000), noise(9000, seed=1, level=1e-3)]
    batch = front_end(*padded(clips))
    for row, clip in zip(batch, clips, strict=True):
        alone = front_end(clip[None])[0]
        torch.testing.assert_close(row[:, : alone.shape[1]], alone, atol=2e-4, rtol=0)


@pytest.mark.parametrize("kind", FRONT_ENDS)
def test_features_computed_elsewhere_are_silenced_to_those_with_the_limit(kind):
    sounds = torch.stack([noise(16000), noise(16000, seed=1, level=1e-3)])
    front_end = limited(kind)
    torch.testing.assert_close(front_end.silence_bands(kind()(sounds)), front_end(sounds), atol=1e-4, rtol=0)
    plain = kind()(sounds)
    assert kind().silence_bands(plain) is plain


@pytest.mark.parametrize("kind", FRONT_ENDS)
def test_a_limited_front_end_is_built_again_from_its_description(kind):
    description = json.loads(json.dumps(limited(kind).description))
    again = build_front_end(description)
    assert (again.band_limit, again.description) == (LIMIT, description)
    assert torch.equal(again(noise(9000)[None]), limited(kind)(noise(9000)[None]))
    assert "band_limit" not in kind().description


@pytest.mark.parametrize("hertz", [10.0, -1, float("nan"), True, "4000"])
def test_a_limit_that_leaves_no_band_is_refused(hertz):
    with pytest.raises(UserError, match=r"band_limit is .* expected hertz"):
        create_model("resnet10", num_classes=2, band_limit=hertz)


@pytest.mark.parametrize("name", ["audiotransformer_pico", "mn01_as", "resnet10_small"])
def test_checkpoints_keep_the_limit_and_weights_without_one_do_not_undo_it(name, tmp_path):
    torch.manual_seed(0)
    plain = create_model(name, num_classes=3).eval()
    torch.save(plain.state_dict(), tmp_path / "published.pt")  # CED's hold the mel filters, all of them
    model = create_model(name, num_classes=3, band_limit=LIMIT).eval()
    load_weights(model, tmp_path / "published.pt")
    sound = noise(round(model.sample_rate * 0.5))[None]
    torch.testing.assert_close(model.front_end(sound), plain.front_end.silence_bands(model.front_end(sound)))
    assert not torch.equal(model.front_end(sound), plain.front_end(sound))
    save_checkpoint(tmp_path / "mine.pt", model)
    again = load_model(tmp_path / "mine.pt")
    assert again.arguments["band_limit"] == LIMIT
    assert torch.equal(again.predict(sound), model.predict(sound))


@pytest.mark.parametrize("waveform", [True, False])
@pytest.mark.parametrize("name", ["audiotransformer_pico", "mn01_as"])
def test_exported_files_have_the_limit_also_where_other_programs_compute_the_features(name, waveform, tmp_path):
    torch.manual_seed(0)
    arguments = {"depth": 1} if name == "audiotransformer_pico" else {}
    model = create_model(name, labels=NAMES, band_limit=LIMIT, **arguments).eval()
    plain = create_model(name, labels=NAMES, **arguments).front_end
    torch.nn.init.normal_(model.get_submodule(model.last_layer).weight, std=0.3)
    export_onnx(model, {"fp32": tmp_path / "model.onnx"}, waveform=waveform)
    engine = OnnxEngine(tmp_path / "model.onnx")
    narrow = noise(model.sample_rate // 2).numpy()
    wide = soxr.resample(narrow, 7000, model.sample_rate)[: model.sample_rate]
    for sound in (narrow, wide):
        wanted = model.predict(torch.from_numpy(sound)[None]).detach().numpy()
        np.testing.assert_allclose(engine.predict([sound]), wanted, atol=1e-5)
        if not waveform:  # sherpa-onnx, say, knows of no limit
            mel = plain(torch.from_numpy(sound)[None]).numpy()
            np.testing.assert_allclose(engine.predict_spectrogram(mel), wanted, atol=1e-5)
    facts = {entry.key: entry.value for entry in onnx.load(tmp_path / "model.onnx").metadata_props}
    assert json.loads(facts["front_end"])["band_limit"] == LIMIT


@pytest.mark.parametrize(("make", "load"), [(tagger, ced_loaded), (resnet, resnet_loaded)])
@torch.inference_mode()
def test_hugging_face_folders_have_the_limit(make, load, tmp_path):
    model = make(labels=NAMES, band_limit=LIMIT)
    export(model, tmp_path / "hf")
    network, extractor = load(tmp_path / "hf")
    sounds = [noise(16000).numpy(), noise(9000, seed=1, level=0.01).numpy()]
    inputs = extractor(sounds, sampling_rate=16000, return_tensors="pt")
    wanted = own_probabilities(model, sounds)
    torch.testing.assert_close(network(**inputs).logits.sigmoid(), wanted, atol=1e-5, rtol=0)
    assert not torch.allclose(own_probabilities(make(labels=NAMES), sounds), wanted, atol=1e-3)
    again = load_model(tmp_path / "hf")
    assert again.arguments["band_limit"] == LIMIT
    assert torch.equal(own_probabilities(again, sounds), own_probabilities(model, sounds))
