"""Traps around weights: swallowed mismatches, downloads nobody asked for, code in checkpoints, cut labels."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from common.errors import UserError
from models import audioset_labels, create_model, load_model, load_weights, save_checkpoint
from models.huggingface import to_huggingface

ROOT = Path(__file__).resolve().parents[2]


def pico(**arguments):
    return create_model("audiotransformer_pico", **{"num_classes": 3, **arguments})


@pytest.mark.parametrize("fault", ["missing", "unexpected", "another shape"])
def test_no_mismatch_is_swallowed(tmp_path, fault):
    # `strict=False` inside nine factories loaded half a network without a word.
    state = pico().state_dict()
    if fault == "missing":
        del state["blocks.2.mlp.fc2.weight"]
    elif fault == "unexpected":
        state["blocks.9.mlp.fc2.weight"] = torch.zeros(2)
    else:
        state["blocks.2.mlp.fc2.weight"] = torch.zeros(2, 2)
    torch.save(state, tmp_path / "wrong.pt")
    with pytest.raises(UserError, match=rf"(?s){fault}.*blocks\.\d\.mlp\.fc2\.weight"):
        load_weights(pico(), tmp_path / "wrong.pt")


def test_weights_of_another_size_do_not_load(shared):
    with pytest.raises(UserError, match=r"(?s)does not fit 'ced_mini'.*another shape"):
        load_model("ced_mini", weights=shared / "fixtures" / "ced_tiny_random.pt")


def test_a_head_of_another_size_is_never_replaced_silently(tmp_path, caplog):
    torch.save(pico(num_classes=5).state_dict(), tmp_path / "five.pt")
    with caplog.at_level(logging.WARNING):
        load_weights(pico(num_classes=3), tmp_path / "five.pt")
    assert "last layer has 5 classes, the model has 3: the last layer is initialised anew" in caplog.text


def test_creating_a_published_model_fetches_nothing(monkeypatch):
    # `pretrained=True` was hard-coded: no run without a network.
    def refuse(*args, **kwargs):
        raise AssertionError("tried to fetch")

    monkeypatch.setattr("models.downloads.transfer", refuse)
    monkeypatch.setattr("urllib.request.urlopen", refuse)
    for name in ("ced_tiny", "mn04_as", "audiotransformer_tiny"):
        create_model(name, num_classes=2)


def test_importing_works_in_any_folder_without_network_and_leaves_the_random_state_alone(tmp_path):
    code = (
        "import socket\n"
        "def refuse(*args, **kwargs): raise OSError('network')\n"
        "socket.socket.connect = refuse\n"
        "import torch; before = torch.get_rng_state().clone()\n"
        "import models; assert models.audioset_labels()[0] == 'Speech'\n"
        "assert torch.equal(before, torch.get_rng_state())\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)


class Trap:
    def __reduce__(self):
        return os.mkdir, (os.environ["TRAP"],)


def test_code_in_a_checkpoint_is_not_run(tmp_path, monkeypatch):
    # Whole modules and transforms were pickled: reading somebody's file ran their code.
    monkeypatch.setenv("TRAP", str(tmp_path / "sprung"))
    torch.save({"model": pico().state_dict(), "config": Trap()}, tmp_path / "trap.pt")
    with pytest.raises(UserError, match="never executed"):
        load_model(tmp_path / "trap.pt")
    assert not (tmp_path / "sprung").exists()


def test_a_three_class_model_reloads_as_a_three_class_model(tmp_path):
    # Reloading a fine-tuned model met a head of 527 classes.
    save_checkpoint(tmp_path / "three.pt", pico(labels=["rain", "sea", "wind"]))
    model = load_model(tmp_path / "three.pt")
    assert (model.num_classes, model.labels) == (3, ["rain", "sea", "wind"])


def test_cut_class_names_of_hugging_face_folders_are_read_in_full(tmp_path, caplog):
    # The published converter split label lines at commas: "Male speech, man speaking" became "Male speech".
    torch.manual_seed(0)
    state = create_model("audiotransformer_pico").state_dict()
    save_file(to_huggingface(state), tmp_path / "model.safetensors")
    id2label = {str(index): name.split(",")[0] for index, name in enumerate(audioset_labels())}
    config = {"model_type": "ced", "embed_dim": 64, "depth": 4, "num_heads": 1, "id2label": id2label}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with caplog.at_level(logging.WARNING):
        model = load_model(tmp_path)
    assert model.labels == audioset_labels()
    assert "cut at a comma" in caplog.text
    assert torch.equal(model.time_pos_embed, state["time_pos_embed"])


def test_a_mobilenet_has_no_room_for_transformer_weights(shared):
    with pytest.raises(UserError, match=r"weights of CED, not of 'mn04_as': found time_pos_embed.*expected features"):
        load_model("mn04_as", weights=shared / "fixtures" / "ced_tiny_random.pt")
