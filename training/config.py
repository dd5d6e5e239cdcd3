"""Configurations of training and of storing targets: typed, and checked before any data is read.

Keys and defaults of CED's published files are kept, so that they run unchanged; keys of this project's own are marked.
"""

import inspect
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from common.errors import did_you_mean, some
from common.options import FileName, Options
from distill.objectives.target import LOSSES
from distill.targets import LABEL_TYPES
from models.registry import get_model_entry, list_models

logger = logging.getLogger(__name__)

AUTO = "auto"  # in place of a value that `training.automatic` chooses from the data

Mode = Literal["fp32", "tf32", "bf16", "fp16", "noamp", "amp", "amp_bf16"]  # the last three are CED's names
# Names that other programs have for a key.
_OTHER_WORDS = {
    "learning_rate": "optimizer_args.lr",
    "lr": "optimizer_args.lr",
    "wd": "optimizer_args.weight_decay",
    "gpu": "device",
    "gpus": "device",
    "cuda": "device",
    "cpu": "device",
    "data": "train_data",
    "val_data": "valid_data",
    "test_data": "eval_data",
    "workers": "num_workers",
    "output": "outputpath",
    "patch_out": "model_args.time_patch_out",
    "k": "topk",
    "token_merging": "model_args.token_merging",
}

_Transforms = dict[str, dict[str, Any] | None]


def _read_transforms(value: Any) -> Any:
    return {} if value is None or value is False else value


def _read_transform_list(value: Any) -> Any:
    if value is None or value is False:
        return []
    return [{name: arguments} for name, arguments in value.items()] if isinstance(value, dict) else value


Transforms = Annotated[_Transforms, BeforeValidator(_read_transforms)]
TransformList = Annotated[list[_Transforms], BeforeValidator(_read_transform_list)]


class Config(Options):
    """Base of the configurations: null for empty mappings and lists, and messages about unknown keys."""

    SPELLING: ClassVar[str] = "{}"

    @field_validator("model_args", "objective_args", "loss_args", "optimizer_args", mode="before", check_fields=False)
    @classmethod
    def _no_arguments(cls, value: Any) -> Any:
        return {} if value is None else value

    @field_validator("freeze", mode="before", check_fields=False)
    @classmethod
    def _no_patterns(cls, value: Any) -> Any:
        return [] if value is None else value

    @classmethod
    def describe_unknown(cls, name: str, given: Mapping[str, Any]) -> str:
        """Return the sentence on an unknown key: the key of a mapping that is meant, or the nearest one."""
        if name == "head":
            return (
                "unknown key 'head': a run trains the student's own last layer. teacher_head is the head of its "
                "teacher; `run.py probe` trains a head on a finished model"
            )
        return f"unknown key {name!r}{_describe_nearest(cls, name, given)}"

    @classmethod
    def describe_missing(cls, name: str) -> str:
        """Return the sentence on a key that must be given."""
        return f"the key {name!r} is missing; add `{name}: ...` or give --{name}"


class TrainConfig(Config):
    """Configuration of `run.py train`."""

    # --- data
    train_data: str  # TSV of a pack
    eval_data: str | None = None  # TSV of a pack with a `labels` column, evaluated at the end
    valid_data: str | None = None  # ours: TSV of a pack with a `labels` column, to select checkpoints
    valid_fraction: float | None = Field(None, gt=0, lt=1)  # ours: hold out this part of the training clips for it
    logitspath: str | None = None  # folder of soft targets; null = the teacher's, or the `labels` column (ours)
    # ours: folder of a teacher's embeddings, for objectives with such targets; several, a folder each: A,B
    embeddingspath: str | list[str] | None = None
    # ours: name, checkpoint or run's folder of a model that is run during training; of several, probabilities are
    # averaged, and embeddings learned each with a projection and a loss of its own
    teacher: str | list[str] | None = None
    teacher_weights: str | list[str | None] | None = None  # ours: of each, for those given by name; null for others
    teacher_head: str | list[str | None] | None = None  # ours: a head on each (`run.py probe`); null = its own classes
    labels_csv: str | None = None  # ours: table index,mid,display_name; null = from the store or the column
    num_classes: int | None = Field(None, ge=1)  # null = as many as the targets have
    num_workers: int = Field(4, ge=0)  # processes that read clips; 0 = the training process itself
    verify: bool = False  # ours: compare every clip that is read with its checksum
    chunk_length: float = Field(10.0, gt=0)  # ours: seconds an item has at most, when training on labels
    # ours: pad shorter items to that length, for networks that need one: true = with silence, repeat = with the clip
    # itself, repeated, which does not change the statistics of batch norm
    fill_chunks: bool | Literal["repeat"] = False
    # balanced: probability of a clip inverse to the frequency of its rarest label; clusters (ours): to the size of its
    # cluster
    sampler: Literal["balanced", "clusters"] | None = None
    clusters: str | None = None  # ours: file written by scripts/cluster_embeddings.py

    # --- model
    model: str  # a name of models.list_models(), or a checkpoint or a run's folder to start from
    model_args: dict[str, Any] = {}  # arguments of the network: model_args.KEY VALUE
    # name, path or URL; true = the published initialisation of this model; null = the same, or random weights with a
    # warning where it is not available; false = random weights
    pretrained: bool | str | None = None
    init_from_data: bool = False  # ours: set input normalisation and head bias from the first batches
    freeze: list[str] = []  # ours: patterns of names of parameters that are not trained, `blocks.[0-5].*`

    # --- targets
    # ours: a name from distill/objectives/: target = loss on the targets alone; cmkd = labels and teacher; mae, matpac,
    # matpac++, eat = without labels; others are for embeddings
    objective: str = "target"
    objective_args: dict[str, Any] = {}  # its settings: lambda, tau, temperature, hidden, dropout, weights
    # BCELoss needs a network that outputs probabilities, BCEWithLogitsLoss logits; CrossEntropyLoss one label a clip
    loss: str = "BCELoss"
    loss_args: dict[str, Any] = {}  # arguments of the loss of that name in torch.nn
    label_type: str = "zero"  # value of classes outside the stored top k
    label_smoothing: float = Field(0.0, ge=0, lt=1)  # ours: weight of 0.5, or of 1/C under softmax
    max_aug_epochs: int = Field(0, ge=0)  # stored epochs to use; 0 = all
    # ours: verify that clips are those of the stored targets: compare all lengths, and the samples of all chunks up to
    # 5,000 and of 64 of more (sample), of all (all), or nothing (none), which allows other sounds
    check_sounds: Literal["sample", "all", "none"] = "sample"

    # --- augmentation; shift and masks come with stored soft targets, the last three here are for all other runs (ours)
    mixup: float | None = Field(None, gt=0)  # alpha of the Beta distribution; null or 0 = off
    mixup_on: Literal["spectrogram", "waveform"] = "spectrogram"  # ours: input of mixup
    # true = do not replay the augmentation of the teacher's input: clips are not shifted, and masks are drawn anew, as
    # in CED's published code
    disable_consistency: bool = False
    wavtransforms: Transforms = {}  # of the waveform: {Shift: {min_shift: -0.5, max_shift: 0.5}}; null = none
    spectransforms: TransformList = []  # masks: [{TimeMasking: {...}}, {FrequencyMasking: {...}}]; null = none
    mask_fill: Literal["0dB", "mean"] = "0dB"  # value under a mask

    # --- optimisation
    batch_size: int = Field(32, ge=1)  # clips an optimiser step, of all processes and accumulated parts
    accumulate: int = Field(1, ge=1)  # ours: number of parts of a batch for forward and backward, to save memory
    eval_batch_size: int | None = Field(None, ge=1)  # null = batch_size
    epochs: int = Field(120, ge=1)  # passes over the items, or over epoch_length batches
    budget: float | None = None  # ours: time on this machine for `epochs: auto`: 10m, 2h, 90s
    epoch_length: int | None = Field(None, ge=1)  # iterations; null = a full pass
    optimizer: Literal["Adam8bit", "Adam", "AdamW", "SGD"] = "Adam8bit"  # Adam8bit = Adam without bitsandbytes
    optimizer_args: dict[str, Any] = {"lr": 0.001}  # lr, weight_decay, betas, momentum ...: optimizer_args.lr 3e-4
    grad_clip: float | None = Field(None, gt=0)  # ours: largest norm of the gradient
    layer_decay: float | None = Field(None, gt=0, le=1)  # ours: learning rate of a block, relative to the one above it
    ema: float | None = Field(None, gt=0, lt=1)  # ours: decay per step of averaged weights, which are used and saved
    use_scheduler: bool = True  # false = constant learning rate
    # ours: learning rate over the run, see training/optim.py. ced = the published schedule: warm-up from 0 to the peak,
    # then a cosine over as many steps as the run has, which the run ends before it reaches decay_frac. cosine and
    # linear reach decay_frac at the end of the run, constant stays at the peak
    schedule: Literal["ced", "cosine", "linear", "constant"] = "ced"
    warmup_iters: int | None = Field(5000, ge=0)  # null or 0 = no warm-up
    warmup_epochs: int | None = Field(None, ge=0)  # in place of warmup_iters
    decay_frac: float = Field(0.1, ge=0, le=1)  # final fraction of the learning rate
    mode: Mode = "noamp"  # precision; noamp = fp32, amp = fp16, amp_bf16 = bf16
    compile: bool = False  # ours: torch.compile; minutes to start, then faster
    device: str = "auto"  # ours: auto, cpu or cuda

    # --- selection and output
    # data for the selection of checkpoints and early stopping: valid (valid_data or valid_fraction) or eval, as in
    # CED's published files. null = valid where it is given, else eval, with a warning that its figures are optimistic
    select_on: Literal["valid", "eval"] | None = None
    # ours: without validation data, the logged value that selects checkpoints: the smallest `loss`; with a minus sign
    # the largest, `-cosine`. null = the last weights are kept
    select_by: str | None = None
    valid_every: int = Field(1, ge=1)  # epochs
    early_stop: int = Field(10, ge=1)  # validations without a better mAP
    average: bool = True  # average the weights of the best checkpoints, where that improves the validation
    n_saved: int = Field(4, ge=1)  # best checkpoints that are kept
    checkpoint_every: int | None = Field(None, ge=1)  # ours: steps between resumable states; null = an epoch
    # ours: on SIGTERM, SIGHUP or Ctrl-C, finish the step and save a state; a second signal, 2 s later, ends the run at
    # once. false = stop within the step and resume from the last state
    checkpoint_on_stop: bool = True
    # ours: with several processes, seconds after which the others end if one of them is frozen or unreachable
    rank_timeout: float = Field(120.0, ge=5)
    log_every: int = Field(10, ge=1)  # ours: steps between readings of the loss, which synchronise with the device
    # ours: add the figures of scikit-learn with simple features on the same clips at the end, where that takes seconds
    baseline: bool = True
    smoke: bool = False  # ours: run everything within a minute on a CPU; missing data are replaced by generated ones
    outputpath: str = "experiments/"  # runs are written to OUTPUTPATH/CONFIG/MODEL/TIME
    logfile: str = "train.log"  # in the run's folder
    debug: bool = False  # log more

    @property
    def embedding_stores(self) -> list[str]:
        """Folders of the embeddings of each teacher."""
        given = self.embeddingspath or []
        return [given] if isinstance(given, str) else given

    @property
    def stores(self) -> list[str]:
        """Folders of stored targets, of either kind."""
        return [self.logitspath] if self.logitspath else self.embedding_stores

    def conflicts(self) -> Iterator[str]:
        """Yield a sentence for each group of keys that cannot be given together."""
        if self.valid_data and self.valid_fraction:
            yield "valid_data and valid_fraction are both given; drop one of them"
        if self.select_on == "valid" and not (self.valid_data or self.valid_fraction):
            yield "select_on is valid, which needs valid_data or valid_fraction; or set select_on: null"
        if self.select_on == "eval" and not self.eval_data:
            yield "select_on is eval, which needs eval_data; or set select_on: null"
        selecting = [key for key in ("valid_data", "valid_fraction", "select_on") if getattr(self, key)]
        if self.select_by and selecting:
            yield f"select_by and {selecting[0]} are both given, and both select checkpoints; drop one of them"
        if self.layer_decay is not None and "lr" not in self.optimizer_args:
            yield "layer_decay needs optimizer_args.lr, the learning rate of the topmost layer"
        if self.sampler == "clusters" and not self.clusters:
            yield (
                "sampler: clusters needs clusters, a file written by scripts/cluster_embeddings.py; add it, or drop "
                "the sampler"
            )
        yield from self._teacher_conflicts()

    def _teacher_conflicts(self) -> Iterator[str]:
        stored = [key for key in ("logitspath", "embeddingspath") if getattr(self, key)]
        if len(stored) > 1:
            yield "logitspath and embeddingspath are both given; drop one: targets are probabilities or embeddings"
        twice = [store for store, count in Counter(self.embedding_stores).items() if count > 1]
        if twice:
            yield f"embeddingspath lists {some(twice)} more than once; give each teacher's store once"
        if self.teacher and stored:
            yield (
                f"teacher and {stored[0]} are both given; drop {stored[0]} to run the teacher during training, or "
                "teacher to use its stored targets"
            )
        for key in ("teacher_weights", "teacher_head"):
            if getattr(self, key) and not self.teacher:
                yield f"{key} is given without teacher, the model that it belongs to; add it"
        if self.disable_consistency and self.teacher:
            yield (
                "disable_consistency is for stored targets; the input of a `teacher` is always that of the student: "
                "drop one of them"
            )
        elif self.disable_consistency and not stored:
            yield (
                "disable_consistency is for stored targets, whose augmentation is then not replayed; give logitspath "
                "or embeddingspath, or drop it"
            )

    @field_validator("mixup", mode="before")
    @classmethod
    def _off(cls, value: Any) -> Any:
        return None if value is False or value == 0 else value

    @field_validator("budget", mode="before")
    @classmethod
    def _minutes(cls, value: Any) -> float | None:
        return None if value is None else read_minutes(value)

    @field_validator("loss")
    @classmethod
    def _known_loss(cls, value: str) -> str:
        return _one_of(value, LOSSES)

    @field_validator("label_type", mode="before")
    @classmethod
    def _known_label_type(cls, value: Any) -> str:
        return _one_of(str(value), LABEL_TYPES)  # a YAML file may spell 527 as a number

    @field_validator("optimizer_args")
    @classmethod
    def _arguments(cls, value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        name = info.data.get("optimizer", "Adam")
        known = list(inspect.signature(getattr(torch.optim, name.removesuffix("8bit"))).parameters)[1:]
        for key, given in value.items():
            if key not in known:
                raise ValueError(f"{name} has no argument {key!r}{did_you_mean(key, known)}")
            if isinstance(_number(given), str):
                raise ValueError(f"{key} is {given!r}; expected a number")
        return {k: _number(v) for k, v in value.items()}  # YAML reads 1e-3 as text


_BELONGS_TO = {key: "model" for key in ("weights", "head", "model_args")} | {
    key: "callable" for key in ("callable_args", "sample_rate")
}


class SoftTargetConfig(Config):
    """Configuration of `save_logits.py`."""

    train_data: str  # TSV of a pack
    targets: Literal["probabilities", "embeddings"] = "probabilities"  # ours: what is stored
    model: str | list[str] | None = None  # names, checkpoints, or a list of them: an ensemble (of probabilities)
    npz: str | None = None  # ours: embeddings of a folder of .npz files, in place of a model
    # ours: embeddings of `package.module:function` in place of a model, which is called with waveforms (B, S) and
    # lengths (B,) at `sample_rate`
    callable: str | None = None
    callable_args: dict[str, Any] | None = None  # ours: the function is then a factory, called with these first
    sample_rate: int | None = Field(None, ge=1)  # of the callable, in hertz; null = the pack's
    keep_tails: bool = False  # ours: keep a last chunk that is shorter than half, which CED drops
    part_size: int = Field(8192, ge=1)  # ours: chunks per part, which is what an interruption can lose
    weights: str | list[str] | None = None  # ours: weights of each, for models given by name
    # ours: a head on each of them (`run.py probe`), whose classes are stored; null = the model's own classes
    head: str | list[str | None] | None = None
    model_args: dict[str, Any] = {}  # arguments of the network
    name: FileName | None = None  # ours: the folder's name; null = the models' names joined by "_"
    outputpath: str = "logits/"  # targets are written to OUTPUTPATH/NAME/LIST/chunk_SECONDS
    chunk_length: float = Field(10.0, gt=0)  # seconds
    epochs: int = Field(40, ge=1)  # passes, each with its own augmentation
    batch_size: int = Field(128, ge=1)  # chunks at once
    num_workers: int = Field(8, ge=0)  # processes that read clips
    verify: bool = False  # ours: compare every clip that is read with its checksum
    topk: int = Field(20, ge=1)  # largest probabilities of a chunk, which are stored
    mode: Mode | None = None  # precision; null = fp32
    device: str = "auto"  # ours: auto, cpu or cuda
    seed: int = Field(42, ge=0)  # ours: of the augmentation seeds
    # of the waveform; null = none
    wavtransforms: Transforms = {"Shift": {"min_shift": -0.5, "max_shift": 0.5}}
    # masks; null = none
    spectransforms: TransformList = [
        {"TimeMasking": {"time_mask_param": 192}},
        {"FrequencyMasking": {"freq_mask_param": 24}},
    ]
    mask_fill: Literal["0dB", "mean"] = "0dB"  # ours: what is under a mask
    # ours: published = base names, columns and meta.pt as CED's own code reads them, see distill/published_layout.py
    layout: Literal["native", "published"] = "native"

    @model_validator(mode="before")
    @classmethod
    def _embeddings_once(cls, given: Any) -> Any:
        """Set the defaults of embeddings: one pass without augmentation."""
        if isinstance(given, dict) and given.get("targets") == "embeddings":
            return {"outputpath": "embeddings/", "epochs": 1, "wavtransforms": {}, "spectransforms": []} | given
        return given

    def conflicts(self) -> Iterator[str]:
        """Yield a sentence for each group of keys that cannot be given together."""
        sources = [key for key in ("model", "npz", "callable") if getattr(self, key)]
        extra = [key for key in sources if key != "model"]
        if self.targets == "probabilities" and extra:
            yield f"{' and '.join(extra)} can only give embeddings; set targets: embeddings"
        elif self.targets == "probabilities" and not sources:
            yield self.describe_missing("model")
        elif len(sources) != 1:
            yield f"embeddings have one source: give model, npz or callable, not {' and '.join(sources) or 'none'}"
        misplaced = [key for key in _BELONGS_TO if getattr(self, key) and not getattr(self, _BELONGS_TO[key])]
        if misplaced and sources:
            yield f"{' and '.join(misplaced)} can only be given with {_BELONGS_TO[misplaced[0]]}; drop it"
        if self.head and self.targets == "embeddings":
            yield "head is for probabilities: embeddings are those of the model, with any head; drop it"
        if self.npz and (self.wavtransforms or self.spectransforms or self.epochs > 1):
            yield "npz files hold embeddings of clips without augmentation, once: drop the transforms and epochs"
        if self.layout == "published" and self.targets == "embeddings":
            yield "layout: published is for probabilities, the only targets that CED stores; drop it"
        if self.callable and self.spectransforms:
            yield "a callable takes waveforms, to which spectransforms do not apply: drop them"


_COMMANDS: dict[type[Config], str] = {TrainConfig: "run.py train", SoftTargetConfig: "save_logits.py"}


def find_other_command(kind: type[Config], given: Iterable[str]) -> tuple[str, list[str]]:
    """Return the command of the other class of configurations, and those of the given keys that only it has."""
    other = SoftTargetConfig if kind is TrainConfig else TrainConfig
    keys = [key for key in given if key not in kind.model_fields and key in other.model_fields]
    return _COMMANDS[other], keys


def _describe_nearest(kind: type[Config], key: str, given: Mapping[str, Any]) -> str:
    """Return a hint at the key that is meant: one of a mapping, of the other command, or the nearest."""
    nested: dict[str, str] = {}
    if kind is TrainConfig:
        optimizer = getattr(torch.optim, str(given.get("optimizer", "Adam")).removesuffix("8bit"), torch.optim.Adam)
        nested |= {name: f"optimizer_args.{name}" for name in list(inspect.signature(optimizer).parameters)[1:]}
    if given.get("model") in list_models():
        nested |= {name: f"model_args.{name}" for name in get_model_entry(str(given["model"])).arguments}
    meant = nested.get(key) or _OTHER_WORDS.get(key)
    if meant is not None and meant.partition(".")[0] in kind.model_fields:
        return f" (did you mean {meant!r}?)"
    command, found = find_other_command(kind, [key])
    return f", which is a key of `{command}`" if found else did_you_mean(key, [*kind.model_fields, *nested])


def _one_of(value: str, valid: Any) -> str:
    if value not in valid:
        raise ValueError(f"expected {', '.join(valid)}{did_you_mean(value, valid)}")
    return value


def _number(value: Any) -> Any:
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def read_minutes(value: Any) -> float:
    """Read a duration in minutes: 10, "10m", "2h", "90s".

    Raises:
        ValueError: the value is not a duration above zero.
    """
    found = re.fullmatch(r"(\d*\.?\d+) ?(|s|sec|seconds?|m|min|minutes?|h|hours?)", str(value).strip().lower())
    minutes = float(found[1]) * {"s": 1 / 60, "m": 1, "": 1, "h": 60}[found[2][:1]] if found else 0.0
    if minutes <= 0:
        raise ValueError("expected a time above zero, such as 10m, 2h or 90s")
    return minutes
