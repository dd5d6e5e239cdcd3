"""Automatic settings: chooses the values of keys that are `auto` in a configuration.

In the presets for own sounds (`trainconfig/own_*.yaml`), keys are `auto` whose best value depends on the clips: their
length, number, bandwidth, and whether each has one label or several. Each such key is chosen once, by the rules of this
file, before anything is built; value and reason are logged and written to the run's `config.yaml` and `run.json`, from
which a resumed run reads them. Published configurations have no `auto`.

The rules were tuned on ESC-10 and on spoken words of 1 s and of 0.4 s at 8 kHz: see docs/results.md.
"""

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from audio.cutting import Chunks
from audio.dataset import Pack
from common.errors import Faults, UserError
from distill.targets import SoftTargetStore
from models.registry import ModelEntry, get_model_entry, list_models
from models.weight_sources import read_weights
from training.band_limit import measure_band_limits, usable_limit
from training.config import AUTO, TrainConfig
from training.labelled import open_pack
from training.settings import check_settings, read_settings
from training.student import starts_at_random, starts_without_classes
from training.teacher import load_teacher

logger = logging.getLogger(__name__)

MAX_SECONDS = 10.0  # of a chunk
MAX_RATE = 32_000  # Hz, of a front-end; higher frequencies add little to the classification of sounds


@dataclass(frozen=True)
class DataFacts:
    """Facts about the training data that the choices depend on.

    Attributes:
        n_clips: number of training clips.
        median_seconds: median length of the clips.
        longest_seconds: largest length of the clips.
        equal_lengths: whether no chunk of at most 10 s is more than a tenth longer than another.
        sample_rate: of the pack, in Hz.
        band_limit: frequency in Hz above which the clips have no content; usually half the sample rate.
        single_label: whether every clip has exactly one label; None without labels.
        activation: activation of the teacher, "sigmoid" or "softmax"; None without soft targets.
    """

    n_clips: int = 1000
    median_seconds: float = 10.0
    longest_seconds: float = 10.0
    equal_lengths: bool = True
    sample_rate: int = 16_000
    band_limit: float = 8000.0
    single_label: bool | None = False
    activation: str | None = None


@dataclass(frozen=True)
class Choice:
    """A value and the reason for it."""

    value: Any
    reason: str


def list_automatic_keys(settings: Mapping[str, Any]) -> list[str]:
    """Return the keys of a configuration that are `auto`, or a mapping with further entries to be chosen."""
    values = {key: value for key, value in settings.items() if key != "device"}  # `device: auto` is an ordinary value
    return [key for key, value in values.items() if value == AUTO or (isinstance(value, dict) and value.get(AUTO))]


def measure_pack(pack: Pack, activation: str | None = None) -> DataFacts:
    """Return the facts about the clips of a pack: lengths, labels and bandwidth."""
    seconds = pack.n_samples / pack.sample_rate
    lengths = Chunks.cut(pack.n_samples, pack.sample_rate, MAX_SECONDS).n_samples
    single = None
    if "labels" in pack.table:
        single = not pack.table["labels"].str.strip().str.strip(";").str.contains(";").any()
    return DataFacts(
        n_clips=len(pack),
        median_seconds=float(np.median(seconds)),
        longest_seconds=float(seconds.max()),
        equal_lengths=bool(lengths.max() <= 1.1 * lengths.min()),
        sample_rate=pack.sample_rate,
        band_limit=measure_band_limits(pack).limit,
        single_label=single,
        activation=activation,
    )


def choose(settings: Mapping[str, Any], facts: DataFacts, faults: Faults) -> dict[str, Choice]:
    """Choose a value for every key that is `auto`, except those that need a timing (`TIMED`, see `training.budget`).

    Args:
        settings: a training configuration, see `training.settings.read_settings`.
        facts: facts about its data.
        faults: gets keys that cannot be `auto`.

    Returns:
        Key → value and reason, in the order of the rules.
    """
    automatic = list_automatic_keys(settings)
    for key in automatic:
        if key not in RULES and key not in TIMED:
            faults.add(f"{key} is auto, which is supported only for {', '.join([*RULES, *TIMED])}; give a value")
    chosen: dict[str, Choice] = {}
    current = dict(settings)
    for key, rule in RULES.items():
        if key not in automatic:
            continue
        try:
            choice = rule(current, facts)
        except UserError as error:
            faults.add(str(error))
            continue
        if isinstance(settings[key], dict):  # entries of the user have precedence
            given = {name: value for name, value in settings[key].items() if name != AUTO}
            choice = Choice({**choice.value, **given}, choice.reason)
        chosen[key] = choice
        current[key] = choice.value
    return chosen


def _model(settings: Mapping[str, Any], facts: DataFacts) -> Choice:
    if settings.get("logitspath") or settings.get("teacher"):
        return Choice("resnet10_small", "half as wide as the model of own_teacher.yaml")
    return Choice("resnet10", "with few clips, convolutional networks are better than transformers")


def _pretrained(settings: Mapping[str, Any], facts: DataFacts) -> Choice:
    """Choose the published tagger, else the published initialisation if there is one."""
    name = str(settings.get("model"))
    for source in (name, name.replace("audiotransformer_", "ced_")):  # names of the same network
        if source in list_models() and get_model_entry(source).weights:
            return Choice(source, "its published weights")
    if starts_at_random(name, None):
        return Choice(None, "random weights: none are published for it")
    return Choice(None, "its published initialisation")


def _entry(settings: Mapping[str, Any]) -> ModelEntry | None:
    return get_model_entry(str(settings["model"])) if settings.get("model") in list_models() else None


def _starts_random(settings: Mapping[str, Any]) -> bool:
    return starts_at_random(str(settings.get("model")), settings.get("pretrained"))


def _model_args(settings: Mapping[str, Any], facts: DataFacts) -> Choice:
    """Choose a front-end and patches for the clips; trained weights keep the front-end of their training."""
    entry = _entry(settings)
    arguments: dict[str, Any] = {}
    if entry is None:
        return Choice(arguments, "those of the checkpoint")
    supported = entry.arguments
    is_ced = "pooling" in supported and "init_bn" in supported
    if is_ced:
        arguments["pooling"] = "logit"
    given = settings["model_args"] if isinstance(settings.get("model_args"), dict) else {}
    if not _starts_random(settings):
        reason = "the front-end of its trained weights"
        if facts.band_limit < _highest_hz(entry, given):
            arguments["band_limit"] = usable_limit(facts.band_limit)
            reason += f", band-limited: clips have no content above {facts.band_limit:g} Hz"
        return Choice(arguments, reason)
    seconds = min(facts.median_seconds, MAX_SECONDS)
    rate = int(given.get("sample_rate", min(facts.sample_rate, MAX_RATE)))  # hops and windows depend on it
    limit = rate / 2
    if facts.band_limit < min(limit, facts.sample_rate / 2):
        limit = usable_limit(facts.band_limit)
    reason = f"clips of {seconds:.3g} s with content up to {min(facts.band_limit, rate / 2):g} Hz"
    if {"sample_rate", "hop_size", "width"} <= set(supported):  # convolutional networks
        hop = 0.005 if seconds < 0.75 else 0.01 if seconds < 3 else 0.02
        window = 0.025
        arguments |= {"sample_rate": rate, "hop_size": round(hop * rate), "win_size": round(window * rate)}
        arguments |= {"n_fft": 2 ** math.ceil(math.log2(window * rate)), "n_mels": 64, "f_max": limit}
    elif is_ced:
        arguments |= {"f_max": min(limit, 8000.0)} if limit < 8000 else {}
        if seconds < 3 and entry.defaults["patch_size"] == 16:  # Dasheng's patches are short as they are
            arguments |= {"patch_stride": 8, "target_length": _frames(min(facts.longest_seconds, MAX_SECONDS))}
    elif facts.band_limit < _highest_hz(entry, given):  # the same bands, those above the limit silent
        arguments["band_limit"] = usable_limit(facts.band_limit)
    return Choice(arguments, reason)


def _highest_hz(entry: ModelEntry, given: Mapping[str, Any]) -> float:
    """Return the upper edge in Hz of a model's mel bands with the given arguments."""
    arguments = entry.defaults | {key: value for key, value in given.items() if value is not None}
    upper = [arguments.get("f_max"), arguments.get("band_limit"), arguments["sample_rate"] / 2]
    return min(float(hertz) for hertz in upper if hertz is not None)


def _frames(seconds: float) -> int:
    """Return the number of frames of 10 ms of a clip, rounded up to a whole patch."""
    return 16 * math.ceil((seconds * 100 + 1) / 16)


def _loss(settings: Mapping[str, Any], facts: DataFacts) -> Choice:
    if facts.activation is not None:
        loss = "CrossEntropyLoss" if facts.activation == "softmax" else "BCEWithLogitsLoss"
        return Choice(loss, f"the teacher's activation is a {facts.activation}")
    if facts.single_label:
        return Choice("CrossEntropyLoss", "each clip has exactly one label")
    return Choice("BCEWithLogitsLoss", "clips have several labels" if facts.single_label is False else "no labels")


def _chunk_length(settings: Mapping[str, Any], facts: DataFacts) -> Choice:
    seconds = math.ceil(1000 * min(facts.longest_seconds, MAX_SECONDS)) / 1000
    return Choice(seconds, f"the longest clip has {facts.longest_seconds:.3g} s, a chunk at most {MAX_SECONDS:g} s")


def _fill_chunks(settings: Mapping[str, Any], facts: DataFacts) -> Choice:
    entry = _entry(settings)
    if facts.equal_lengths or (entry is not None and entry.masks_padding):
        return Choice(False, "clips of one length" if facts.equal_lengths else f"{settings['model']} masks padding")
    return Choice("repeat", f"clips of several lengths, and {settings['model']} does not mask padding")


def _wavtransforms(settings: Mapping[str, Any], facts: DataFacts) -> Choice:
    limit = 0.1 if facts.median_seconds < 3 else 0.5
    reason = f"clips of {facts.median_seconds:.3g} s are shifted by up to {limit:.0%} of their length"
    return Choice({"Shift": {"min_shift": -limit, "max_shift": limit, "p": 1.0}}, reason)


def _batch_size(settings: Mapping[str, Any], facts: DataFacts) -> Choice:
    size = 16 if facts.n_clips < 5000 else 32 if facts.n_clips < 50_000 else 128
    return Choice(size, f"{facts.n_clips:,} clips")


def _is_transformer(settings: Mapping[str, Any]) -> bool:
    entry = _entry(settings)
    return entry is not None and "num_heads" in entry.arguments


def _layer_decay(settings: Mapping[str, Any], facts: DataFacts) -> Choice:
    if _is_transformer(settings):
        return Choice(0.75, "a transformer: lower learning rates for lower blocks")
    return Choice(None, "no transformer: the same learning rate for all layers")


def _optimizer_args(settings: Mapping[str, Any], facts: DataFacts) -> Choice:
    transformer = _is_transformer(settings)
    if starts_without_classes(str(settings.get("model")), settings.get("pretrained")):
        start = "from random weights" if _starts_random(settings) else "from weights without classes"
        lr, reason = (0.001, f"a transformer {start}") if transformer else (0.002, start)
    else:
        lr, reason = (0.0003, "a fine-tuned transformer") if transformer else (0.0005, "fine-tuned")
    return Choice({"lr": lr, "weight_decay": 0.05 if transformer else 0.01}, reason)


def resolve(settings: dict[str, Any], faults: Faults) -> dict[str, Choice]:
    """Choose a value for every `auto` of a configuration from its data, except those that need a timing (`TIMED`).

    Args:
        settings: a training configuration, see `training.settings.read_settings`.
        faults: gets keys that cannot be `auto`. Errors of the data are reported later, when they are opened: if they
            cannot be opened here, the choices are those for clips of 10 s.
    """
    ignored = Faults("the data")
    pack = open_pack(str(settings["train_data"]), ignored) if settings.get("train_data") else None
    return choose(settings, DataFacts() if pack is None else measure_pack(pack, _activation(settings)), faults)


def _activation(settings: Mapping[str, Any]) -> str | None:
    """Return the activation of the teacher; None if there is none, or it cannot be read."""
    with Faults("the teacher").noted():  # its errors are reported later, when it is opened
        if settings.get("logitspath"):
            return str(SoftTargetStore(str(settings["logitspath"])).meta.get("activation") or "sigmoid")
        if settings.get("teacher"):
            weights, heads = settings.get("teacher_weights"), settings.get("teacher_head")
            teacher = load_teacher(settings["teacher"], weights, heads=heads)
            return min(teacher.activations)
    return None


def name_model(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings in which a `model` that is a checkpoint or a run's folder is replaced by its name and weights.

    Raises:
        UserError: it cannot be read, or has no name of a model.
    """
    source = settings.get("model")
    if not isinstance(source, str) or source == AUTO or source in list_models() or not Path(source).exists():
        return settings
    config = read_weights(source)[1]
    if config.get("model") not in list_models():
        raise UserError(f"model: {source} has no name of a model; give --model NAME --weights {source}")
    arguments = settings.get("model_args")
    given = arguments if isinstance(arguments, dict) else {AUTO: True} if arguments == AUTO else {}
    stored = {key: value for key, value in (config.get("model_args") or {}).items() if key != "outputdim"}
    named = {"model": config["model"], "model_args": {**stored, **given}}
    return settings | named | ({"pretrained": source} if settings.get("pretrained") in (None, AUTO, True) else {})


def read_train_config(path: str | Path, overrides: dict[str, Any], faults: Faults) -> TrainConfig | None:
    """Read a training configuration with every `auto` chosen, except those of `TIMED`, which get 1.

    Arguments as of `training.settings.read_config`.
    """
    settings = _read_chosen(path, overrides, faults)
    return None if settings is None else check_settings(TrainConfig, fill_timed(settings), faults)


def describe_train_config(path: str | Path, overrides: dict[str, Any]) -> str:
    """Return a training configuration as YAML: every key, with automatic choices; keys that need a timing are `auto`.

    Raises:
        UserError: every fault of the configuration.
    """
    faults = Faults(str(path))
    settings = _read_chosen(path, overrides, faults)
    config = None if settings is None else check_settings(TrainConfig, fill_timed(settings), faults)
    if config is not None:
        with faults.noted():
            get_model_entry(config.model)
    faults.raise_if_any()
    assert settings is not None
    assert config is not None
    timed = {key: AUTO for key in TIMED if settings.get(key) == AUTO}
    return yaml.safe_dump(config.model_dump() | timed, sort_keys=False, allow_unicode=True)


def _read_chosen(path: str | Path, overrides: dict[str, Any], faults: Faults) -> dict[str, Any] | None:
    settings = read_settings(path, overrides, faults)
    if settings is None:
        return None
    with faults.noted():
        settings = name_model(settings)
    return settings | {key: choice.value for key, choice in resolve(settings, faults).items()}


def fill_timed(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings with a placeholder, 1, for keys that need a timing."""
    return settings | {key: 1 for key in TIMED if settings.get(key) == AUTO}


TIMED = ("epochs", "valid_every", "warmup_epochs")
Rule = Callable[[Mapping[str, Any], DataFacts], Choice]
# In this order: rules use the choices of those before them.
RULES: dict[str, Rule] = {
    "model": _model,
    "pretrained": _pretrained,
    "loss": _loss,
    "model_args": _model_args,
    "chunk_length": _chunk_length,
    "fill_chunks": _fill_chunks,
    "wavtransforms": _wavtransforms,
    "batch_size": _batch_size,
    "optimizer_args": _optimizer_args,
    "layer_decay": _layer_decay,
}
