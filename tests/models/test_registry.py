import logging
import shutil
import subprocess
import sys

import pytest
import torch
from torch import nn

import models.registry
from common.errors import UserError
from models import AudioTagger, create_model, list_models, load_model, register_model, save_checkpoint
from models.base import Encoded
from models.ced_mel import CedMel
from tests.conftest import ROOT, run_command
from tests.models.sounds import noise

# Seconds to build and up to 300 MB to store; each is the twin of a model that is tested, but for its width or name.
WIDE = {"mn30_as", "mn40_as", "mn40_as_ext", "mn40_as_no_im_pre"}
WIDE |= {"audiotransformer_small", "audiotransformer_base", "audiotransformer_base_4740", "dymn20_as", "eres2net_base"}
WIDE |= {"resnet50_audio", "matpac_plus", "matpac_tiny", "matpac_small"}
WIDE |= {"dasheng_tiny", "dasheng_small", "dasheng_06b", "dasheng_12b"}
WIDE |= {f"{teacher}-{student}" for teacher in ("matpac", "m2d") for student in ("mobilenetv3", "dymn", "eres2net")}
# transformers that are built narrow, except those called pico
OF_PUBLISHED_SIZE = ("ast_", "passt_", "matpac", "m2d", "dasheng_")


@pytest.mark.parametrize("name", sorted(set(list_models()) - WIDE))
def test_every_model_learns_and_survives_a_checkpoint(name, tmp_path):
    torch.manual_seed(0)
    of_published_size = name.startswith(OF_PUBLISHED_SIZE) and not name.endswith("_pico")
    narrow = {"embed_dim": 64, "num_heads": 1, "depth": 1} if of_published_size else {}
    model = create_model(name, labels=["rain", "dog, barking", "sea"], **narrow)
    wave = noise(2 * model.sample_rate).reshape(2, -1)
    target = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    output = model(wave)
    assert output.shape == (2, 3)
    nn.functional.binary_cross_entropy(model.probabilities(output), target).backward()
    learns = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in learns)
    before = next(iter(model.parameters())).detach().clone()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert not torch.equal(before, next(iter(model.parameters())))

    save_checkpoint(tmp_path / "model.pt", model)
    again = load_model(tmp_path / "model.pt")
    assert (again.name, again.labels, again.sample_rate) == (name, model.labels, model.sample_rate)
    assert not again.training
    model.eval()
    with torch.inference_mode():
        torch.testing.assert_close(again.predict(wave), model.predict(wave), atol=0, rtol=0)
        clip, frames = again.embed(wave)
    assert clip.shape == (2, model.embed_dim)
    assert frames.shape == (2, model.n_steps(model.sample_rate), model.embed_dim)
    if not getattr(model, "n_prefix", 0):  # else the head reads tokens of its own
        torch.testing.assert_close(frames.mean(1), clip, atol=1e-4, rtol=1e-4)


def test_the_names_that_were_promised():
    assert list_models("ced_*") == ["ced_base", "ced_mini", "ced_small", "ced_tiny"]
    sizes = ["base", "base_4740", "mini", "nano", "pico", "small", "tiny"]
    assert list_models("audiotransformer_*") == [f"audiotransformer_{size}" for size in sizes]
    assert list_models("mn*_as") == [f"mn{width}_as" for width in ("01", "02", "04", "05", "10", "20", "30", "40")]


class Toy(AudioTagger):
    last_layer = "linear"

    def __init__(self, *, num_classes, power=1.0):
        super().__init__(CedMel(), num_classes=num_classes, embed_dim=64)
        self.power = power
        self.linear = nn.Linear(64, num_classes)

    def encode(self, mel, n_frames=None, *, keep=None, layers=()):
        return Encoded(len(mel), maps=mel[:, :, None])

    def classify(self, encoded):
        return self.linear(self.pool(encoded) / 100 * self.power)

    def pool(self, encoded):
        return encoded.maps.mean((2, 3))

    def frames(self, encoded):
        return encoded.maps.mean(2).mT

    def n_steps(self, n_frames):
        return n_frames


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setattr(models.registry, "_MODELS", dict(models.registry._MODELS))
    register_model("toy")(Toy)


@pytest.mark.usefixtures("toy")
def test_a_model_added_in_one_file_is_created_saved_and_loaded(tmp_path):
    model = create_model("toy", num_classes=4, power=2.0, activation="softmax").eval()
    save_checkpoint(tmp_path / "toy.pt", model, extra={"epoch": 3})
    again = load_model(tmp_path / "toy.pt")
    assert again.arguments == {"power": 2.0}
    clips = noise(16000).reshape(2, 8000)
    lengths = torch.tensor([8000, 4000])
    torch.testing.assert_close(again.predict(clips, lengths), model.predict(clips, lengths))
    torch.testing.assert_close(again.predict(clips).sum(1), torch.ones(2))
    torch.testing.assert_close(again.predict(clips, lengths)[1], again.predict(clips[1:, :4000])[0])


@pytest.mark.usefixtures("toy")
def test_a_model_without_layers_says_so():
    model = create_model("toy", num_classes=4)
    for use in (
        lambda: model.n_layers,
        lambda: model.embed_layers(torch.zeros(1, 64, 9)),
        lambda: model.check_layers([0]),
    ):
        with pytest.raises(UserError, match="toy has no layers"):
            use()


def test_an_incomplete_model_cannot_be_registered():
    with pytest.raises(TypeError, match=r"Half lacks encode, classify, .*pool, frames.*last_layer"):

        @register_model("half")
        class Half(AudioTagger):
            pass


@pytest.mark.usefixtures("toy")
def test_a_name_cannot_be_taken_twice():
    with pytest.raises(ValueError, match="'toy' is taken"):
        register_model("toy")(Toy)


def test_unknown_names_and_arguments_name_the_nearest():
    with pytest.raises(UserError, match=r"no model is called 'ced_tny'.*did you mean 'ced_tiny'"):
        create_model("ced_tny")
    with pytest.raises(UserError, match=r"(?s)2 faults.*'poling' \(did you mean 'pooling'.*'target_len'"):
        create_model("ced_tiny", poling="mean", target_len=3)
    with pytest.raises(UserError, match="activation must be one of sigmoid, softmax"):
        create_model("audiotransformer_pico", activation="tanh")
    with pytest.raises(UserError, match="2 labels were given for 3 classes"):
        create_model("audiotransformer_pico", num_classes=3, labels=["a", "b"])


def test_labels_are_audiosets_or_numbers():
    assert create_model("audiotransformer_pico").labels[1] == "Male speech, man speaking"
    assert create_model("audiotransformer_pico", num_classes=2).labels == ["0", "1"]


def test_importing_and_creating_proves_nothing(caplog):
    with caplog.at_level(logging.DEBUG):
        create_model("audiotransformer_pico")
    assert not caplog.records


def test_a_file_in_the_folder_of_models_is_found(tmp_path):
    shutil.copytree(ROOT / "models", tmp_path / "models")
    for name in ("common", "resources"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "models" / "tiny_resnet.py").write_text(
        "from models.registry import register_model\nfrom models.resnet import ResNet10\n\n"
        "@register_model()\ndef tiny_resnet(**arguments):\n    return ResNet10(width=4, **arguments)\n"
    )
    code = "from models import create_model; print(create_model('tiny_resnet', num_classes=3).num_classes)"
    done = run_command("-c", code, cwd=tmp_path)
    assert (done.stdout, done.stderr) == ("3\n", "")


def test_models_are_imported_without_the_exporter_and_the_runtime_of_onnx():
    code = "import sys, models; print(*sorted({'onnx', 'onnxscript', 'onnxruntime'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == ""
