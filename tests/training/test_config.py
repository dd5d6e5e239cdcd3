from pathlib import Path

import pytest
import yaml

from common.errors import Faults, UserError
from training.automatic import read_train_config
from training.config import SoftTargetConfig, TrainConfig
from training.settings import read_config

ROOT = Path(__file__).resolve().parents[2]
TRAINING = sorted((ROOT / "trainconfig").glob("*.yaml"))
TEACHING = sorted((ROOT / "logitconfig").glob("*.yaml"))
PUBLISHED = [p for p in TRAINING if "nsemble5014" in p.name]


def read(kind, path, **overrides):
    faults = Faults(str(path))
    if kind is TrainConfig:  # with what is automatic chosen
        config = read_train_config(path, overrides, faults)
    else:
        config = read_config(kind, path, overrides, faults)
    faults.raise_if_any()
    return config


@pytest.mark.parametrize("path", TRAINING, ids=lambda p: p.stem)
def test_every_training_configuration_is_valid(path):
    read(TrainConfig, path)


@pytest.mark.parametrize("path", TEACHING, ids=lambda p: p.stem)
def test_every_soft_target_configuration_is_valid(path):
    read(SoftTargetConfig, path)


@pytest.mark.parametrize("path", TRAINING + TEACHING, ids=lambda p: p.stem)
def test_every_configuration_opens_with_its_command_and_what_to_expect(path):
    head = [line for line in path.read_text().splitlines() if line.startswith("#")]
    text = "\n".join(head)
    assert f"{path.parent.name}/{path.name}" in text
    assert "Command:" in text
    assert any(word in text for word in ("Measured:", "Makes:"))


def test_the_eight_published_files_hold_the_published_values():
    assert len(PUBLISHED) == 8
    for path in PUBLISHED:
        config = read(TrainConfig, path)
        size = config.model.removeprefix("audiotransformer_")
        full = path.name.startswith("full")
        assert config.loss == "BCEWithLogitsLoss"
        assert config.mode == "amp"
        assert config.model_args["pooling"] == "logit"
        assert config.optimizer == "Adam8bit"
        assert config.optimizer_args == {"lr": 1e-3 if size in ("tiny", "mini") else 3e-4}
        assert (config.epochs, config.early_stop, config.n_saved, config.num_workers) == (300, 10, 4, 4)
        assert (config.batch_size, config.mixup) == ((128, None) if full else (32, 0.5))
        assert (config.warmup_iters, config.valid_every) == ((62500, 3) if full else (5000, 5))
        assert config.epoch_length == (6250 if full else None)
        assert config.label_type == "zero"


def test_published_defaults(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("train_data: a.tsv\nmodel: audiotransformer_tiny\nlogitspath: logits\n")
    config = read(TrainConfig, path)
    assert (config.outputpath, config.logfile, config.mode) == ("experiments/", "train.log", "noamp")
    assert (config.batch_size, config.epochs, config.warmup_iters, config.decay_frac) == (32, 120, 5000, 0.1)
    assert (config.label_type, config.loss, config.optimizer) == ("zero", "BCELoss", "Adam8bit")
    assert config.optimizer_args == {"lr": 0.001}
    assert (config.max_aug_epochs, config.use_scheduler, config.average, config.n_saved) == (0, True, True, 4)


def test_all_faults_are_reported_together_with_the_nearest_valid_key(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("model: x\nepoch: 3\nbatch_size: many\nlabel_type: last_men\nlos: BCELoss\n")
    with pytest.raises(UserError) as error:
        read(TrainConfig, path)
    text = str(error.value)
    assert "has 5 faults" in text
    for part in (
        "'epoch' (did you mean 'epochs'?)",
        "batch_size is 'many'",
        "did you mean 'last_mean'?",
        "'train_data' is missing",
    ):
        assert part in text
    assert "'los'" in text


def test_every_key_can_be_overridden_nested_ones_with_a_dot(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump({"train_data": "a.tsv", "model": "m", "mixup": 0.5, "label_type": 527}))
    overrides = {"epochs": 3, "mixup": "null", "optimizer_args.lr": "1e-3", "model_args.pooling": "logit"}
    config = read(TrainConfig, path, **overrides)
    assert config.epochs == 3
    assert config.mixup is None
    assert config.optimizer_args == {"lr": 0.001}
    assert config.model_args == {"pooling": "logit"}
    assert config.label_type == "527"


@pytest.mark.parametrize(("text", "stores"), [("a/b", ["a/b"]), ("a/b, c", ["a/b", "c"]), ("[a, b]", ["a", "b"])])
def test_several_stores_on_the_command_line_have_commas_between(text, stores, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump({"train_data": "a.tsv", "model": "m", "teacher": "t"}))
    config = read(TrainConfig, path, embeddingspath=text, teacher="null")
    assert (config.embedding_stores, config.stores, config.teacher) == (stores, stores, None)


def test_disable_consistency_needs_stored_targets(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump({"train_data": "a.tsv", "model": "m", "disable_consistency": True}))
    with pytest.raises(UserError, match=r"disable_consistency is for stored targets.*give logitspath"):
        read(TrainConfig, path)
    assert read(TrainConfig, path, logitspath="logits").disable_consistency
    assert read(TrainConfig, path, disable_consistency=False).schedule == "ced"


@pytest.mark.parametrize(
    ("argument", "sentence"), [({"lrr": 1}, "did you mean 'lr'"), ({"lr": "abc"}, "expected a number")]
)
def test_arguments_of_the_optimizer_are_checked_with_the_rest(tmp_path, argument, sentence):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump({"train_data": "a", "model": "m", "optimizer": "AdamW", "optimizer_args": argument}))
    with pytest.raises(UserError, match=f"2 faults(?s:.*){sentence}"):
        read(TrainConfig, path, epoch=3)


@pytest.mark.parametrize("content", ["- a\n- b\n", "a: [1\n", ""])
def test_a_file_that_is_no_configuration_is_a_sentence(tmp_path, content):
    path = tmp_path / "c.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=r"c\.yaml has 1 fault"):
        read(TrainConfig, path)
    with pytest.raises(UserError, match="it does not exist"):
        read(TrainConfig, tmp_path / "absent.yaml")
