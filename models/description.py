"""Descriptions of models in files, checked before anything is built: names, types and bounds of their entries."""

from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any, Literal, TypeVar

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from torch import Tensor

from common.class_names import find_label_fault, is_writable
from common.errors import Faults, UserError
from common.parsing import describe_faults
from models.base import Activation
from models.headed import Head
from models.labels import MAX_CLASSES
from models.other_heads import create_head

Kind = TypeVar("Kind", bound=BaseModel)

FORMAT_VERSION = 1
Width = Annotated[int, Field(ge=1, le=65536)]
Layer = Annotated[int, Field(ge=0, le=1023)]
Count = Annotated[int, Field(ge=1, le=2**31)]
_MAX_HIDDEN = 16  # layers of a head
_MAX_LAYERS = 1024  # of a model that a head takes
# arguments of each kind of head
_ARGUMENTS = {
    "mlp": ("hidden_sizes", "dropout", "layers", "widths"),
    "knn": ("n_examples", "n_neighbours", "layers", "widths"),
    "prototypes": ("n_prototypes", "stride"),
}
Labels = list[str] | tuple[str, ...]
Dropout = Annotated[float, Field(ge=0, lt=1)]


def _check_writable(text: str) -> str:
    if not is_writable(text):
        raise ValueError("expected characters that can be written as UTF-8")
    return text


Text = Annotated[str, AfterValidator(_check_writable)]


class Description(BaseModel):
    """Entries of a file; those with other names are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore", protected_namespaces=())


class HeadFacts(Description):
    """The facts of a head's training that this project reads."""

    name: Text | None = None
    model: Text | None = None
    weights_sha256: str | None = None
    chunk_length: Annotated[float, Field(gt=0, le=86400)] = 10.0
    data: Text | None = None
    metric: Text | None = None
    value: Annotated[float, Field(allow_inf_nan=True)] | None = None


class HeadDescription(Description):
    """The config of a head, see `models.headed.Head.config`."""

    embed_dim: Width
    num_classes: Annotated[int, Field(ge=1, le=MAX_CLASSES)]
    labels: Labels
    activation: Activation
    kind: Literal["mlp", "knn", "prototypes"] = "mlp"
    hidden_sizes: Annotated[list[Width] | tuple[Width, ...], Field(max_length=_MAX_HIDDEN)] = ()
    dropout: Dropout = 0.0
    layers: Annotated[list[Layer] | tuple[Layer, ...], Field(max_length=_MAX_LAYERS)] = ()
    widths: Annotated[list[Width] | tuple[Width, ...], Field(max_length=_MAX_LAYERS)] = ()
    n_examples: Count = 1
    n_neighbours: Count = 1
    n_prototypes: Count = 1
    stride: Count = 1
    padded: bool
    facts: HeadFacts

    @model_validator(mode="after")
    def _check_labels(self) -> "HeadDescription":
        if fault := find_label_fault(self.num_classes, self.labels):
            raise ValueError(fault)
        return self


class ModelDescription(Description):
    """The config of a checkpoint, see `models.loading.save_checkpoint`; every entry may be missing."""

    format_version: Annotated[int, Field(ge=1, le=FORMAT_VERSION)] | None = None
    model: Annotated[str, Field(max_length=200)] | None = None
    model_args: dict[str, Any] | None = None
    num_classes: Annotated[int, Field(ge=0, le=MAX_CLASSES)] | None = None
    labels: Labels | None = None
    activation: Activation | None = None
    sample_rate: Annotated[int, Field(ge=1)] | None = None
    projection: Annotated[int, Field(ge=0)] | None = None
    head: HeadDescription | None = None

    @field_validator("model_args")
    @classmethod
    def _check_plain(cls, arguments: Any) -> Any:
        if not _is_plain(arguments):
            raise ValueError("expected text, numbers, lists and names with these")
        return arguments

    @model_validator(mode="after")
    def _check_labels(self) -> "ModelDescription":
        if self.labels:
            n_classes = len(self.labels) if self.num_classes is None else self.num_classes
            if fault := find_label_fault(n_classes, self.labels):
                raise ValueError(fault)
        return self


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(each) for key, each in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def check_description(kind: type[Kind], given: Mapping[str, Any], subject: str) -> Kind:
    """Check the entries of a file.

    Args:
        kind: class of the description.
        given: the entries.
        subject: the file, for the message.

    Raises:
        UserError: entries are missing or have wrong values; all of them are listed.
    """
    try:
        return kind.model_validate(dict(given))
    except ValidationError as error:
        faults = Faults(subject, limit=10)
        for sentence in describe_faults(error):
            faults.add(sentence)
        faults.raise_if_any()
        raise


def restore_head(config: Mapping[str, Any], state: Mapping[str, Tensor], origin: str) -> Head:
    """Rebuild a head from its config and state dict.

    Args:
        config: see `Head.config`.
        state: its state dict.
        origin: file of both, for messages.

    Returns:
        The head, in evaluation mode.

    Raises:
        UserError: entries are missing, or the tensors do not fit the config.
    """
    described = check_description(HeadDescription, config, f"{origin}: its head")
    given = {name: getattr(described, name) for name in ("labels", "activation", *_ARGUMENTS[described.kind])}
    make = partial(create_head, described.kind, described.embed_dim, described.num_classes, **given)
    with torch.device("meta"):  # which allocates nothing
        n_described = sum(map(Tensor.numel, make().state_dict().values()))
    if n_described > sum(map(Tensor.numel, state.values())):
        raise UserError(f"{origin}: its head is described as larger than it is: train it again with `run.py probe`")
    head = make()
    try:
        head.load_state_dict(dict(state), strict=True)
    except RuntimeError as error:
        raise UserError(f"{origin}: is an incomplete head ({error}): train it again with `run.py probe`") from error
    for name, value in head.state_dict().items():
        if not bool(value.isfinite().all()):
            raise UserError(f"{origin}: the tensor {name} of its head holds NaN or infinite values")
    head.facts, head.padded = dict(config["facts"]), described.padded
    return head.eval()
