"""Settings that follow from the data: what `auto` stands for in a configuration.

The presets for one's own sounds (`trainconfig/own_*.yaml`) say `auto` where a good value depends on the clips: how long
they are, how many, up to which frequency they reach, whether each has one label or several. Each such key is chosen
once, by the rules of this file, before anything is built; the choice and its reason are logged and written into the
run's `config.yaml` and `run.json`, and a run that goes on takes them from there. Published configurations hold no
`auto`.

The rules were found on ESC-10 and on spoken words of 1 s and of 0.4 s at 8 kHz: figures are in RESULTS.md.
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
from models.loading import read_weights
from models.registry import ModelEntry, get_model_entry, list_models
from training.band_limit import measure_band_limits, usable_limit
from training.config import AUTO, TrainConfig
from training.labelled import open_pack
from training.settings import check_settings, read_settings
from training.student import starts_at_random
from training.teacher import load_teacher

logger = logging.getLogger(__name__)

MOST_SECONDS = 10.0  # a chunk has at most
MOST_RATE = 32_000  # Hz of a front-end; higher bands say little about what a sound is


@dataclass(frozen=True)
class DataFacts:
    """What the choices follow from.

    Attributes:
        n_clips: to learn from.
        median_seconds: of the clips.
        longest_seconds: likewise.
        equal_lengths: of their chunks of 10 s none is more than a tenth longer than another.
        sample_rate: of the pack, in Hz.
        band_limit: Hz above which the clips hold nothing; half the sample rate for most.
        single_label: every clip has exactly one; None where there are no labels.
        activation: of the teacher whose targets are learnt, "sigmoid" or "softmax"; None where labels are.
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
    """A value and why it was taken."""

    value: Any
    reason: str


def automatic_keys(settings: Mapping[str, Any]) -> list[str]:
    """Return the keys of a configuration that say `auto`, wholly or for the rest of a mapping."""
    values = {key: value for key, value in settings.items() if key != "device"}  # whose `auto` is a value of its own
    return [key for key, value in values.items() if value == AUTO or (isinstance(value, dict) and value.get(AUTO))]


def measure_pack(pack: Pack, activation: str | None = None) -> DataFacts:
    """Look at lengths, labels and spectra of the clips to learn from."""
    seconds = pack.n_samples / pack.sample_rate
    lengths = Chunks.cut(pack.n_samples, pack.sample_rate, MOST_SECONDS).n_samples
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
    """Choose a value for every key that says `auto` but those that take a timing (`TIMED`, see `training.budget`).

    Args:
        settings: of a training configuration, see `training.settings.read_settings`.
        facts: of its data.
        faults: gets keys that can never be automatic.

    Returns:
        Key → its value and the reason, in the order of the rules.
    """
    wanted = automatic_keys(settings)
    for key in wanted:
        if key not in RULES and key not in TIMED:
            faults.add(f"{key} says auto, which only {', '.join([*RULES, *TIMED])} can; give a value")
    chosen: dict[str, Choice] = {}
    current = dict(settings)
    for key, rule in RULES.items():
        if key not in wanted:
            continue
        try:
            choice = rule(current, facts)
        except UserError as error:
            faults.add(str(error))
            continue
        if isinstance(settings[key], dict):  # what the user gave stands
            own = {name: value for name, value in settings[key].items() if name != AUTO}
            choice = Choice({**choice.value, **own}, choice.reason)
        chosen[key] = choice
        current[key] = choice.value
    return chosen


def _model(settings: Mapping[str, Any], facts: DataFacts) -> Choice:
    if settings.get("logitspath") or settings.get("teacher"):
        return Choice("resnet10_small", "half as wide as what own_teacher.yaml trains")
    return Choice("resnet10", "convolutions learn more from few clips than a transformer does")


def _pretrained(settings: Mapping[str, Any], facts: DataFacts) -> Choice:
    """Start from the published tagger, else from the published initialisation where there is one."""
    name = str(settings.get("model"))
    twin = name.replace("audiotransformer_", "ced_")  # the same network; its published weights have another name
    for source in (name, twin):
        if source in list_models() and get_model_entry(source).weights:
            return Choice(source, "its published weights")
    if starts_at_random(name, None):
        return Choice(None, "no weights of it are published, so it starts from random ones")
    return Choice(None, "its published initialisation")


def _entry(settings: Mapping[str, Any]) -> ModelEntry | None:
    return get_model_entry(str(settings["model"])) if settings.get("model") in list_models() else None


def _starts_random(settings: Mapping[str, Any]) -> bool:
    return starts_at_random(str(settings.get("model")), settings.get("pretrained"))


def _model_args(settings: Mapping[str, Any], facts: DataFacts) -> Choice:
    """Fit a front-end and patches to the clips; what starts from weights keeps what these were trained with."""
    entry = _entry(settings)
    arguments: dict[str, Any] = {}
    if entry is None:
        return Choice(arguments, "as the checkpoint says")
    known = entry.arguments
    if "pooling" in known and "init_bn" in known:  # CED: logits
        arguments["pooling"] = "logit"
    given = settings["model_args"] if isinstance(settings.get("model_args"), dict) else {}
    if not _starts_random(settings):
        reason = "the front-end that its weights were trained with"
        if facts.band_limit < _highest_hz(entry, given):
            arguments["band_limit"] = usable_limit(facts.band_limit)
            reason += f", without what lies above: clips reach up to {facts.band_limit:g} Hz"
        return Choice(arguments, reason)
    seconds = min(facts.median_seconds, MOST_SECONDS)
    rate = int(given.get("sample_rate", min(facts.sample_rate, MOST_RATE)))  # hops and windows follow from it
    limit = rate / 2
    if facts.band_limit < min(limit, facts.sample_rate / 2):
        limit = usable_limit(facts.band_limit)
    reason = f"clips of {seconds:.3g} s that reach up to {min(facts.band_limit, rate / 2):g} Hz"
    if "sample_rate" in known and "hop_size" in known and "width" in known:  # networks of convolutions
        hop = 0.005 if seconds < 0.75 else 0.01 if seconds < 3 else 0.02
        window = 0.025
        arguments |= {"sample_rate": rate, "hop_size": round(hop * rate), "win_size": round(window * rate)}
        arguments |= {"n_fft": 2 ** math.ceil(math.log2(window * rate)), "n_mels": 64, "f_max": limit}
    elif "patch_stride" in known and "init_bn" in known:  # CED
        arguments |= {"f_max": min(limit, 8000.0)} if limit < 8000 else {}
        if seconds < 3:
            arguments |= {"patch_stride": 8, "target_length": _frames(min(facts.longest_seconds, MOST_SECONDS))}
    elif facts.band_limit < _highest_hz(entry, given):  # bands as they are, those above silent
        arguments["band_limit"] = usable_limit(facts.band_limit)
    return Choice(arguments, reason)


def _highest_hz(entry: ModelEntry, given: Mapping[str, Any]) -> float:
    """Upper edge in Hz of a model's mel bands, with the arguments that were given."""
    arguments = entry.defaults | {key: value for key, value in given.items() if value is not None}
    upper = [arguments.get("f_max"), arguments.get("band_limit"), arguments["sample_rate"] / 2]
    return min(float(hertz) for hertz in upper if hertz is not None)


def _frames(seconds: float) -> int:
    """Frames of 10 ms of a clip, up to a whole patch."""
    return 16 * math.ceil((seconds * 100 + 1) / 16)


def _loss(settings: Mapping[str, Any], facts: DataFacts) -> Choice:
    if facts.activation is not None:
        loss = "CrossEntropyLoss" if facts.activation == "softmax" else "BCEWithLogitsLoss"
        return Choice(loss, f"the teacher's probabilities come from a {facts.activation}")
    if facts.single_label:
        return Choice("CrossEntropyLoss", "each clip has exactly one label")
    return Choice("BCEWithLogitsLoss", "clips have several labels" if facts.single_label is False else "no labels")


def _chunk_length(settings: Mapping[str, Any], facts: DataFacts) -> Choice:
    seconds = math.ceil(1000 * min(facts.longest_seconds, MOST_SECONDS)) / 1000
    return Choice(seconds, f"the longest clip has {facts.longest_seconds:.3g} s, chunks at most {MOST_SECONDS:g} s")


def _fill_chunks(settings: Mapping[str, Any], facts: DataFacts) -> Choice:
    entry = _entry(settings)
    if facts.equal_lengths or (entry is not None and entry.masks_padding):
        return Choice(False, "clips of one length" if facts.equal_lengths else f"{settings['model']} masks padding")
    return Choice("repeat", f"clips of several lengths, which {settings['model']} cannot mask")


def _short(facts: DataFacts) -> bool:
    return facts.median_seconds < 3


def _wavtransforms(settings: Mapping[str, Any], facts: DataFacts) -> Choice:
    reach = 0.1 if _short(facts) else 0.5
    reason = f"clips of {facts.median_seconds:.3g} s are rolled by up to {reach:.0%} of their length"
    return Choice({"Shift": {"min_shift": -reach, "max_shift": reach, "p": 1.0}}, reason)


def _batch_size(settings: Mapping[str, Any], facts: DataFacts) -> Choice:
    size = 16 if facts.n_clips < 5000 else 32 if facts.n_clips < 50_000 else 128
    return Choice(size, f"{facts.n_clips:,} clips")


def _is_transformer(settings: Mapping[str, Any]) -> bool:
    entry = _entry(settings)
    return entry is not None and "num_heads" in entry.arguments


def _layer_decay(settings: Mapping[str, Any], facts: DataFacts) -> Choice:
    if _is_transformer(settings):
        return Choice(0.75, "a transformer: lower blocks change less")
    return Choice(None, "no transformer: all layers learn at one rate")


def _optimizer_args(settings: Mapping[str, Any], facts: DataFacts) -> Choice:
    transformer = _is_transformer(settings)
    if _starts_random(settings):
        lr, reason = (0.001, "a transformer from random weights") if transformer else (0.002, "from random weights")
    else:
        lr, reason = (0.0003, "a transformer that is fine-tuned") if transformer else (0.0005, "fine-tuned")
    return Choice({"lr": lr, "weight_decay": 0.05 if transformer else 0.01}, reason)


def resolve(settings: dict[str, Any], faults: Faults) -> dict[str, Choice]:
    """Look at the data of a configuration and choose for every `auto` but those that take a timing (`TIMED`).

    Args:
        settings: of a training configuration, see `training.settings.read_settings`.
        faults: gets keys that can never be automatic. What is wrong with the data is left to the code that opens them:
            where they cannot be opened, the choices are those for clips of 10 s.
    """
    quiet = Faults("the data")
    pack = open_pack(str(settings["train_data"]), quiet) if settings.get("train_data") else None
    return choose(settings, DataFacts() if pack is None else measure_pack(pack, _activation(settings)), faults)


def _activation(settings: Mapping[str, Any]) -> str | None:
    """Return what a teacher's probabilities come from; None where labels are learnt, or it cannot be read."""
    quiet = Faults("the teacher")
    with quiet.noted():
        if settings.get("logitspath"):
            return str(SoftTargetStore(str(settings["logitspath"])).meta.get("activation") or "sigmoid")
        if settings.get("teacher"):
            weights, heads = settings.get("teacher_weights"), settings.get("teacher_head")
            teacher = load_teacher(settings["teacher"], weights, heads=heads)
            return min(teacher.activations)
    return None


def name_model(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings in which a `model` that is a checkpoint or a run's folder has become its name and its weights.

    Raises:
        UserError: it cannot be read, or does not say which model it holds.
    """
    source = settings.get("model")
    if not isinstance(source, str) or source == AUTO or source in list_models() or not Path(source).exists():
        return settings
    config = read_weights(source)[1]
    if config.get("model") not in list_models():
        raise UserError(f"model: {source} does not say which model it holds; give --model NAME --weights {source}")
    arguments = settings.get("model_args")
    given = arguments if isinstance(arguments, dict) else {AUTO: True} if arguments == AUTO else {}
    stored = {key: value for key, value in (config.get("model_args") or {}).items() if key != "outputdim"}
    named = {"model": config["model"], "model_args": {**stored, **given}}
    return settings | named | ({"pretrained": source} if settings.get("pretrained") in (None, AUTO, True) else {})


def read_train_config(path: str | Path, overrides: dict[str, Any], faults: Faults) -> TrainConfig | None:
    """Read a training configuration with every `auto` chosen but those of `TIMED`, which get 1.

    Arguments as of `training.settings.read_config`.
    """
    settings = _read_chosen(path, overrides, faults)
    return None if settings is None else check_settings(TrainConfig, without_timed(settings), faults)


def describe_train_config(path: str | Path, overrides: dict[str, Any]) -> str:
    """Return a training configuration as YAML: every key, with what is chosen now; what takes a timing says `auto`.

    Raises:
        UserError: every fault of the configuration.
    """
    faults = Faults(str(path))
    settings = _read_chosen(path, overrides, faults)
    config = None if settings is None else check_settings(TrainConfig, without_timed(settings), faults)
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


def without_timed(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings in which 1 completes what is still to be timed."""
    return settings | {key: 1 for key in TIMED if settings.get(key) == AUTO}


TIMED = ("epochs", "valid_every", "warmup_epochs")
Rule = Callable[[Mapping[str, Any], DataFacts], Choice]
# In this order: a later rule sees what the earlier ones chose.
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
