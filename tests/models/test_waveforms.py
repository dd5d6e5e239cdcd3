"""What `predict` and `embed` accept: the right values for every form of sound, or one sentence."""

import numpy as np
import pytest
import torch

from common.errors import UserError
from models import Ensemble, attach_head, create_model, get_ssondo
from models.headed import Head
from models.onnx import export_onnx
from models.waveforms import as_waveform
from tagging.engines import TorchEngine
from tagging.onnx_engine import OnnxEngine

RATE = 16000
LENGTHS = (16000, 9600)


def build(name, **settings):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = create_model(name, num_classes=5, **settings).eval()
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                torch.nn.init.normal_(module.weight, std=0.2)
    return model


@pytest.fixture(scope="module")
def whole_numbers():
    """Two clips of 16-bit samples, (2,S)."""
    return np.random.default_rng(0).integers(-9000, 9000, (2, LENGTHS[0])).astype(np.int16)


@pytest.fixture(scope="module")
def clips(whole_numbers):
    """The same as float32 with full scale 1.0."""
    return torch.from_numpy(whole_numbers / np.float32(32768))


@pytest.fixture(scope="module", params=["audiotransformer_pico", "resnet10_small", "headed", "ensemble"])
def model(request):
    if request.param == "headed":
        return attach_head(build("audiotransformer_pico"), Head(64, 5))
    if request.param == "ensemble":
        return Ensemble([build("audiotransformer_pico"), build("resnet10_small")])
    return build(request.param)


FORMS = {
    "int16": lambda clips, whole: torch.from_numpy(whole),
    "int16 array": lambda clips, whole: whole,
    "float array": lambda clips, whole: clips.numpy(),
    "read-only array": lambda clips, whole: np.frombuffer(clips.numpy().tobytes(), np.float32).reshape(2, -1),
    "transposed array": lambda clips, whole: np.asfortranarray(clips.numpy()),
    "big-endian array": lambda clips, whole: whole.astype(">i2"),
    "float64": lambda clips, whole: clips.double(),
    "float64 array": lambda clips, whole: clips.double().numpy(),
    "list of tensors": lambda clips, whole: list(clips),
    "list of arrays": lambda clips, whole: list(whole),
    "list of lists": lambda clips, whole: clips.tolist(),
}


@pytest.mark.parametrize("form", FORMS)
def test_any_form_of_the_same_sound_gets_the_same_prediction_and_embedding(model, form, clips, whole_numbers):
    given = FORMS[form](clips, whole_numbers)
    wanted = model.predict(clips)
    assert (wanted[0] - wanted[1]).abs().max() > 1e-4
    torch.testing.assert_close(model.predict(given), wanted, atol=1e-6, rtol=0)
    if not isinstance(model, Ensemble):
        torch.testing.assert_close(model.embed(given)[0], model.embed(clips)[0], atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_a_clip_alone_is_a_batch_of_one(model, clips, whole_numbers):
    wanted = model.predict(clips[:1])
    for given in (clips[0], clips[0].numpy(), whole_numbers[0], clips[0].tolist(), [clips[0]], clips[0].double()):
        torch.testing.assert_close(model.predict(given), wanted, atol=1e-6, rtol=0)
    half = clips[:1].half()
    torch.testing.assert_close(model.predict(half), model.predict(half.float()), atol=0, rtol=0)


def test_clips_of_several_lengths_in_a_list_get_what_they_get_alone(model, clips):
    several = [clips[0], clips[1, : LENGTHS[1]].numpy()]
    alone = torch.cat([model.predict(clip) for clip in several])
    torch.testing.assert_close(model.predict(several), alone, atol=1e-5, rtol=0)
    for lengths in (torch.tensor(LENGTHS), list(LENGTHS), np.array(LENGTHS)):
        torch.testing.assert_close(model.predict(clips, lengths), alone, atol=1e-5, rtol=0)
        if not isinstance(model, Ensemble):
            found = model.embed(clips, lengths)[0]
            torch.testing.assert_close(found, torch.cat([model.embed(clip)[0] for clip in several]), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("given", "lengths", "sentence"),
    [
        (torch.zeros(2, 2, RATE), None, r"shape \(2, 2, 16000\); expected \(B,S\): average the channels"),
        (torch.zeros(RATE, 2), None, r"\(16000, 2\), which looks like \(S, channels\); expected \(B,S\)"),
        (np.zeros((RATE, 2)), None, r"looks like \(S, channels\)"),
        (torch.tensor(0.0), None, r"shape \(\); expected clips of one channel"),
        (torch.zeros(2, 0), None, r"shape \(2, 0\): no samples"),
        (torch.zeros(0), None, r"shape \(1, 0\): no samples"),
        (torch.zeros(0, RATE), None, r"\(0, 16000\): no clips"),
        ([], None, "an empty list"),
        ([torch.zeros(0), torch.zeros(9)], None, "clip 0 of the list has no samples"),
        ([torch.zeros(2, 9)], None, r"clip 0 of the list has shape \(2, 9\)"),
        (torch.zeros(2, RATE, dtype=torch.int32), None, r"torch.int32; .*floats with full scale 1.0, or int16"),
        (np.zeros(RATE, np.int32), None, r"int32; .*floats .* \(divide by full scale: 32768"),
        (np.zeros(RATE, np.uint8), None, r"uint8; .* \(subtract 128, then divide by 128\)"),
        ([0, 1, -1], None, "int64; .*floats"),
        (np.zeros(RATE, complex), None, "complex128; .*floats"),
        (torch.zeros(RATE, dtype=torch.complex64), None, "torch.complex64; .*floats"),
        (np.zeros(RATE, bool), None, "bool; .*floats"),
        ("sound.wav", None, "the waveform: found values of type <U9; .*floats"),
        (None, None, "object; .*floats"),
        ([[0.0, 1.0], [0.0]], torch.tensor([2, 2]), r"lengths \[2, 2\] must be one number per clip, 1 to \[2, 1\]"),
        (torch.full((2, RATE), float("nan")), None, "clips 0, 1 of the batch contain NaN or infinite"),
        (torch.zeros(2, RATE).index_fill(0, torch.tensor(1), 3.0), None, "clip 1 .* up to 3, like integer samples"),
        (torch.linspace(-32767.5, 32767.2, RATE), None, "clip 0 .* up to 32767.5, .* divide 16-bit samples by 32768"),
        (torch.zeros(2, RATE), torch.tensor([RATE]), "must be one number per clip"),
        (torch.zeros(2, RATE), [0, RATE], "must be one number per clip, 1 to 16000"),
        (torch.zeros(2, RATE), [1, RATE + 1], "must be one number per clip"),
        (torch.zeros(2, RATE), [0.5, 1.0], "lengths are of type torch.float32; expected whole numbers"),
        (torch.zeros(2, RATE), "all", "lengths are str; expected one whole number per clip"),
    ],
)
def test_what_is_no_waveform_is_a_sentence(given, lengths, sentence):
    model = build("resnet10_small")
    for function in (model.predict, model.embed, lambda *words: Ensemble([model]).predict(*words)):
        with pytest.raises(UserError, match=sentence):
            function(given, lengths)
    ssondo = get_ssondo(model)
    with pytest.raises(UserError, match=sentence):
        ssondo.get_embeddings(given, lengths)


def test_loud_sound_and_padding_that_is_no_number_pass(clips):
    loud = clips[:1] * 40  # some samples far beyond full scale, as floating-point mixes have
    loud[0, 100:] /= 40
    torch.testing.assert_close(as_waveform(loud)[0], loud)
    torch.testing.assert_close(as_waveform(torch.tensor([[1.0, -1.0, 0.0]]))[0], torch.tensor([[1.0, -1.0, 0.0]]))
    padded = clips.clone()
    padded[1, LENGTHS[1] :] = float("nan")
    model = build("resnet10_small")
    wanted = model.predict(clips, torch.tensor(LENGTHS))
    assert torch.equal(model.predict(padded, torch.tensor(LENGTHS)), wanted)


def test_a_waveform_as_networks_take_it_is_not_copied_and_keeps_its_gradient(clips):
    given = clips.clone().requires_grad_()
    assert as_waveform(given)[0] is given
    build("resnet10_small").embed(given)[0].sum().backward()
    assert given.grad is not None
    assert given.grad.abs().max() > 0


def test_sound_on_another_device_goes_to_the_models(clips):
    class Elsewhere(torch.Tensor):
        """A tensor that says where it was sent."""

        def to(self, device):
            sent.append(torch.device(device))
            return torch.Tensor(self.as_subclass(torch.Tensor))

    sent = []
    model = build("resnet10_small")
    found = model.predict(clips.as_subclass(Elsewhere))
    assert sent == [torch.device("cpu")]
    assert torch.equal(found, model.predict(clips))


def test_training_takes_float_batches_alone():
    model = build("resnet10_small").train()
    for given in (torch.zeros(RATE), torch.zeros(1, 1, RATE), torch.zeros(2, RATE, dtype=torch.int16)):
        with pytest.raises(UserError, match=r"expected \(B,S\), floats"):
            model(given)


def test_an_ensemble_of_several_rates_needs_each_and_embeds_not(clips):
    ensemble = Ensemble([build("resnet10_small"), build("resnet10_small", sample_rate=8000)])
    with pytest.raises(UserError, match=r"take \[8000, 16000\] Hz: give a dictionary from sample rate"):
        ensemble.predict(clips)
    with pytest.raises(UserError, match="dictionary from sample rate"):
        ensemble.predict({8000: clips, 16000: clips}, torch.tensor(LENGTHS))
    with pytest.raises(UserError, match="an ensemble has no embedding"):
        ensemble.embed(clips)


@torch.no_grad()
def test_the_wrapper_of_s_sondo_scales_integers(clips, whole_numbers):
    ssondo = get_ssondo(build("resnet10_small"))
    wanted = ssondo.get_embeddings(clips)
    for given in (whole_numbers, torch.from_numpy(whole_numbers), list(whole_numbers), clips.numpy()):
        torch.testing.assert_close(ssondo.get_embeddings(given), wanted, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(ssondo(given), ssondo(clips), atol=1e-6, rtol=1e-5)


def test_engines_take_what_models_take(clips, whole_numbers, tmp_path):
    model = build("resnet10_small")
    export_onnx(model, {"fp32": tmp_path / "a.onnx"}, waveform=True)
    several = [whole_numbers[0], clips[1, : LENGTHS[1]].double().numpy()]
    wanted = torch.cat([model.predict(clip) for clip in several]).numpy()
    for engine in (TorchEngine(model, n_threads=1), OnnxEngine(tmp_path / "a.onnx")):
        np.testing.assert_allclose(engine.predict(several), wanted, atol=1e-5)
        np.testing.assert_allclose(engine.predict(whole_numbers[0]), wanted[:1], atol=1e-5)
        np.testing.assert_allclose(engine.predict(clips[:1]), wanted[:1], atol=1e-5)
        for odd, sentence in (
            ([np.zeros((RATE, 2))], r"clip 0 has shape \(16000, 2\); expected one channel"),
            ([np.zeros(9), np.zeros(0)], "clip 1 has no samples"),
            ([], "found no clips"),
            ([np.zeros(9, np.uint8)], "clip 0: found values of type uint8; .*floats"),
        ):
            with pytest.raises(UserError, match=sentence):
                engine.predict(odd)
    embedded = TorchEngine(model, n_threads=1).embed(several)[0]
    np.testing.assert_allclose(embedded[:1], model.embed(clips[:1])[0].detach(), atol=1e-5)
