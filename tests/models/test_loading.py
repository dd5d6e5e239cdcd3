import logging
import pathlib
import shutil
import urllib.error

import pytest
import torch

from common.errors import UserError
from models import (
    create_model,
    get_model_entry,
    list_models,
    load_model,
    load_weights,
    save_checkpoint,
)
from models.weight_sources import fetch
from tests.models.sounds import noise


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty torch.hub folder and no network; gives the list of URLs that were asked for."""
    asked = []

    def refuse(url, *args, **kwargs):
        asked.append(url)
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr("models.downloads.transfer", refuse)
    return asked


@pytest.fixture(scope="module")
def random_ced(shared):
    return shared / "fixtures" / "ced_tiny_random.pt"


def small(**arguments):
    torch.manual_seed(0)
    return create_model("audiotransformer_pico", **{"num_classes": 3, **arguments}).eval()


def test_a_published_checkpoint_with_a_config_needs_no_name(random_ced, hub):
    model = load_model(random_ced)
    assert (model.name, model.num_classes, model.pooling) == ("audiotransformer_tiny", 527, "mean")
    assert model.labels[0] == "Speech"
    assert not hub


def test_arguments_override_those_of_the_checkpoint(random_ced):
    assert load_model("ced_tiny", weights=random_ced, pooling="logit").outputs == "logits"


def test_bare_published_weights_need_a_name(shared):
    weights = shared / "data" / "teachers" / "mn04_as_mAP_432.pt"
    with pytest.raises(UserError, match=r"does not name its model.*give `-m NAME --weights .*mn04_as_mAP_432.pt`"):
        load_model(weights)


def test_offline_the_message_has_what_to_fetch_and_where_to_put_it(hub, tmp_path):
    with pytest.raises(UserError) as error:
        load_model("ced_tiny")
    url = "https://zenodo.org/record/8275347/files/audiotransformer_tiny_mAP_4814.pt?download=1"
    assert hub == [url]
    path = tmp_path / "hub" / "checkpoints" / "audiotransformer_tiny_mAP_4814.pt"
    for part in (url, str(path), "--weights PATH"):
        assert part in str(error.value)
    assert not list(path.parent.iterdir())


def test_a_fetched_file_is_used_by_name_and_by_url_without_network(hub, tmp_path, random_ced):
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    shutil.copy(random_ced, folder / "audiotransformer_tiny_mAP_4814.pt")
    by_name = load_model("ced_tiny")
    by_url = load_model(get_model_entry("ced_tiny").weights)
    assert torch.equal(by_name.outputlayer[1].weight, by_url.outputlayer[1].weight)
    assert not hub


def test_a_download_is_kept_whole_or_not_at_all(hub, tmp_path, monkeypatch, random_ced):
    url = "https://example.org/files/ced.pt?download=1"
    content = random_ced.read_bytes()
    monkeypatch.setattr(
        "models.downloads.transfer", lambda url, path: pathlib.Path(path).write_bytes(content[: len(content) // 2])
    )
    with pytest.raises(UserError, match="cannot be downloaded"):
        fetch(url)
    assert not list((tmp_path / "hub" / "checkpoints").iterdir())
    monkeypatch.setattr("models.downloads.transfer", lambda url, path: pathlib.Path(path).write_bytes(content))
    copy = fetch(url)
    assert copy.parent == tmp_path / "hub" / "checkpoints"
    assert copy.name.endswith("-ced.pt")
    assert list(copy.parent.iterdir()) == [copy]
    assert load_model(url).num_classes == 527


def test_names_and_their_urls():
    assert get_model_entry("audiotransformer_tiny").weights is None
    assert "mae_as_10s" in get_model_entry("audiotransformer_tiny").initialisation
    assert all(
        get_model_entry(name).weights.startswith("https://") for name in list_models("ced_*") + list_models("mn*")
    )
    with pytest.raises(UserError, match=r"no published weights \('ced_tiny' has\).*--weights PATH"):
        load_model("audiotransformer_tiny")
    with pytest.raises(UserError, match="'audiotransformer_pico' has no published weights: give"):
        load_model("audiotransformer_pico")


def test_another_number_of_classes_starts_the_last_layer_anew_with_a_notice(random_ced, caplog):
    state = torch.load(random_ced, weights_only=True)["model"]
    with caplog.at_level(logging.WARNING):
        model = load_model("ced_tiny", weights=random_ced, num_classes=50)
    assert "has 527 classes, the model has 50" in caplog.text
    assert model.outputlayer[1].weight.shape == (50, 192)
    assert torch.equal(model.blocks[3].mlp.fc1.weight, state["blocks.3.mlp.fc1.weight"])
    assert torch.equal(model.outputlayer[0].weight, state["outputlayer.0.weight"])


def test_the_number_of_classes_is_read_from_bare_weights(tmp_path, caplog):
    model = small(num_classes=5)
    torch.save(model.state_dict(), tmp_path / "bare.pt")
    again = load_model("audiotransformer_pico", weights=tmp_path / "bare.pt")
    assert torch.equal(again.outputlayer[1].weight, model.outputlayer[1].weight)
    assert not caplog.records


def test_every_mismatch_is_reported_with_its_keys(tmp_path):
    state = small().state_dict()
    state["blocks.0.attn.proj.weight"] = torch.zeros(3, 3)
    state["teacher.weight"] = torch.zeros(1)
    del state["norm.bias"]
    torch.save({"model": state}, tmp_path / "wrong.pt")
    with pytest.raises(UserError) as error:
        load_weights(small(), tmp_path / "wrong.pt")
    text = str(error.value)
    assert "1 tensors are missing: norm.bias" in text
    assert "1 tensors are unexpected: teacher.weight" in text
    assert "blocks.0.attn.proj.weight is (3, 3), expected (64, 64)" in text


def test_a_failed_load_leaves_the_model_as_it_was(tmp_path):
    state = {key: value + 1 for key, value in small().state_dict().items()}
    del state["norm.bias"]
    torch.save(state, tmp_path / "wrong.pt")
    model = small()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(UserError):
        load_weights(model, tmp_path / "wrong.pt")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(("length", "columns", "word"), [(496, 31, "cropped"), (2024, 126, "interpolated")])
def test_the_time_embedding_follows_target_length_with_a_notice(random_ced, caplog, length, columns, word):
    given = torch.load(random_ced, weights_only=True)["model"]["time_pos_embed"]
    with caplog.at_level(logging.WARNING):
        model = load_model("ced_tiny", weights=random_ced, target_length=length)
    assert f"{word} from 63 to {columns}" in caplog.text
    own = model.time_pos_embed.detach()
    if word == "cropped":
        assert torch.equal(own, given[..., :columns])
    else:  # twice as many columns: a quarter of the way between neighbours
        torch.testing.assert_close(own[..., 1], 0.75 * given[..., 0] + 0.25 * given[..., 1])


def test_masked_pre_training_may_lack_the_last_layers_and_bring_a_decoder(tmp_path, caplog):
    source = small()
    state = {f"encoder.{key}": value for key, value in source.state_dict().items() if "outputlayer" not in key}
    torch.save({**state, "decoder.blocks.0.weight": torch.zeros(2), "mask_token": torch.zeros(1)}, tmp_path / "mae.pt")
    model = create_model("audiotransformer_pico", num_classes=9)
    with caplog.at_level(logging.WARNING):
        load_weights(model, tmp_path / "mae.pt", pre_training=True)
    assert "2 tensors of" in caplog.text
    assert "outputlayer.1.weight" in caplog.text
    assert torch.equal(model.blocks[1].attn.qkv.weight, source.blocks[1].attn.qkv.weight)
    with pytest.raises(UserError, match="unexpected"):
        load_weights(model, tmp_path / "mae.pt")


def test_a_checkpoint_keeps_what_the_model_is_and_what_is_added(tmp_path):
    model = small(pooling="logit", labels=["a", "b, c", "d"], activation="softmax")
    save_checkpoint(tmp_path / "m.pt", model, extra={"epoch": 7, "config": {"lr": 0.1}})
    content = torch.load(tmp_path / "m.pt", weights_only=True)
    assert content["epoch"] == 7
    assert content["config"] == {
        "lr": 0.1,
        "format_version": 1,
        "model": "audiotransformer_pico",
        "model_args": {"pooling": "logit"},
        "num_classes": 3,
        "labels": ["a", "b, c", "d"],
        "activation": "softmax",
        "sample_rate": 16000,
    }
    again = load_model(tmp_path / "m.pt")
    assert (again.labels, again.activation, again.outputs) == (model.labels, "softmax", "logits")
    torch.testing.assert_close(again.predict(noise(9000)[None]), model.predict(noise(9000)[None]), atol=0, rtol=0)


def test_what_cannot_be_read_back_is_not_written(tmp_path):
    save_checkpoint(tmp_path / "m.pt", small())
    before = (tmp_path / "m.pt").read_bytes()
    with pytest.raises(UserError, match="contains more than tensors"):
        save_checkpoint(tmp_path / "m.pt", small(), extra={"path": pathlib.Path("x"), "hook": pytest.raises})
    with pytest.raises(UserError, match="labels describe the model"):
        save_checkpoint(tmp_path / "m.pt", small(), extra={"config": {"labels": []}})
    assert (tmp_path / "m.pt").read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["m.pt"]


@pytest.mark.parametrize(
    ("files", "chosen"),
    [
        (["averaged.pt", "best.pt", "last.pt"], "averaged.pt"),
        (["best.pt", "last.pt"], "best.pt"),
        (["best_9_mAP=0.1500.pt", "best_7_mAP=0.2100.pt"], "best_7_mAP=0.2100.pt"),
        (["only.pt"], "only.pt"),
    ],
)
def test_a_runs_folder_gives_its_best_checkpoint(tmp_path, files, chosen):
    for file in files:
        save_checkpoint(tmp_path / file, small(labels=[file, "x", "y"]))
    assert load_model(tmp_path).labels[0] == chosen


def test_what_is_no_checkpoint_is_reported(tmp_path):
    with pytest.raises(UserError, match=r"no such file or folder, and no model of that name.*'ced_tiny'"):
        load_model("ced_tinny")
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(UserError, match=r"text\.pt"):
        load_model(tmp_path / "text.pt")
    torch.save({"epoch": 3}, tmp_path / "empty.pt")
    with pytest.raises(UserError, match="found entries epoch; expected a state dict"):
        load_model(tmp_path / "empty.pt")
    (tmp_path / "run").mkdir()
    with pytest.raises(UserError, match=r"found no \.pt files"):
        load_model(tmp_path / "run")
