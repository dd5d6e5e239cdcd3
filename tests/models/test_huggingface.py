import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.errors import UserError
from models import audioset_labels, create_model, load_model
from models.huggingface import from_huggingface, to_huggingface, write_huggingface
from tests.models.sounds import noise


def published_folder(folder, state, **config):
    """What Hugging Face publishes of CED-tiny, written from the documented layout."""
    renamed = {}
    for key, value in state.items():
        if key.startswith("outputlayer."):
            renamed[key] = value
        elif key.startswith("init_bn.1."):
            renamed["encoder.init_bn." + key[len("init_bn.1.") :]] = value
        elif not key.startswith("front_end."):
            renamed["encoder." + key] = value
    folder.mkdir()
    save_file(renamed, folder / "model.safetensors")
    given = {"model_type": "ced", "embed_dim": 192, "depth": 12, "num_heads": 3, "outputdim": 527, "pooling": "mean"}
    given |= {"mlp_ratio": 4, "patch_size": 16, "patch_stride": 16, "target_length": 1012, "f_max": 8000, "n_mels": 64}
    given["id2label"] = {str(i): name for i, name in enumerate(audioset_labels())}
    (folder / "config.json").write_text(json.dumps(given | config))
    return folder


@pytest.fixture(scope="module")
def state(shared):
    return torch.load(shared / "fixtures" / "ced_tiny_random.pt", weights_only=True)["model"]


@torch.inference_mode()
def test_a_folder_gives_the_same_model_as_the_checkpoint(shared, state, tmp_path):
    model = load_model(published_folder(tmp_path / "hf", state))
    twin = load_model("ced_tiny", weights=shared / "fixtures" / "ced_tiny_random.pt")
    wave = noise(48000)[None]
    torch.testing.assert_close(model.predict(wave), twin.predict(wave), atol=1e-6, rtol=0)
    assert (model.name, model.labels) == ("audiotransformer_tiny", audioset_labels())


def test_own_labels_of_a_folder_are_kept(state, tmp_path):
    names = {str(i): f"class {i}" for i in range(527)}
    assert load_model(published_folder(tmp_path / "hf", state, id2label=names)).labels[5] == "class 5"


@torch.inference_mode()
def test_writing_and_reading_gives_the_same_model(tmp_path):
    model = create_model(
        "audiotransformer_pico", labels=["rain", "dog, barking"], pooling="token", target_length=496, depth=3
    ).eval()
    write_huggingface(tmp_path / "hf", model)
    again = load_model(tmp_path / "hf")
    wave = noise(160000)[None]
    torch.testing.assert_close(again.predict(wave), model.predict(wave), atol=1e-6, rtol=0)
    assert again.labels == model.labels
    assert again.target_length == 496


def test_names_are_the_published_ones_both_ways(state, tmp_path):
    renamed = to_huggingface(state)
    assert set(renamed) == set(load_file(published_folder(tmp_path / "hf", state) / "model.safetensors"))
    assert set(from_huggingface(renamed)) == {key for key in state if not key.startswith("front_end.")}


def test_another_number_of_classes_is_noticed(state, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        model = load_model(published_folder(tmp_path / "hf", state), num_classes=3)
    assert model.num_classes == 3
    assert "has 527 classes, the model has 3" in caplog.text


def test_other_kinds_of_folders_are_refused(state, tmp_path):
    with pytest.raises(UserError, match="model_type 'wav2vec2'; expected 'ced'"):
        load_model(published_folder(tmp_path / "hf", state, model_type="wav2vec2"))
    (tmp_path / "hf" / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"model\.safetensors is a text file, not a checkpoint"):
        load_model(tmp_path / "hf")
