"""What `run.py probe` can be told: typed, checked before any data is read, every fault told at once."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from common.errors import Faults, did_you_mean
from common.keys import check_value_given
from probing.fit import Fitting
from training.config import Mode


def _listed(value: Any) -> Any:
    """Read `512,256` as a command line has it: text, a number, or several."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return list(value) if isinstance(value, list | tuple) else value if value is None else [value]


class ProbeOptions(BaseModel):
    """The options of a probe; `model` or `embeddings`, and `data` with folds or `train_data` and `test_data`."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=(), coerce_numbers_to_str=True)

    # --- whose embeddings
    model: str | None = None  # a run's folder, a checkpoint, or the name of a model
    weights: str | None = None  # for a model given by name
    embeddings: Annotated[list[str] | None, BeforeValidator(_listed)] = None  # or stores of embeddings, without a model
    chunk_length: float = Field(10.0, gt=0)  # seconds that are embedded at once; a clip is the mean over its chunks
    cache: str = "embeddings/"  # where the model's embeddings are kept
    num_workers: int = Field(4, ge=0)  # processes that read clips
    device: str = "auto"  # auto, cpu or cuda
    mode: Mode = "fp32"  # precision of the embeddings; noamp = fp32, amp = fp16, amp_bf16 = bf16

    # --- of which clips
    data: str | None = None  # TSV of a pack with a column of folds: each is tested once, by a head that saw the others
    fold_column: str = "fold"  # its name
    train_data: str | None = None  # or TSVs of packs: of the clips to learn from,
    valid_data: str | None = None  # of those that say when to stop,
    test_data: str | None = None  # and of those that the figures are of
    valid_fraction: float = Field(0.2, ge=0, lt=1)  # of the training clips, where there is no valid_data; 0 for none
    label_column: str = "labels"  # classes joined by ";"
    labels_csv: str | None = None  # index,mid,display_name, where the column holds numbers

    baseline: bool = True  # what simple features reach on the same clips, where that takes seconds

    # --- the head
    name: str = Field(min_length=1, pattern=r"^[^/\\]+$")  # of the head, which is written to OUTPUTPATH/NAME.pt
    head: Literal["linear", "mlp"] = "linear"  # one layer, or several
    # widths of the hidden layers of an mlp, 512,256; null = one of 512
    hidden_sizes: Annotated[list[Annotated[int, Field(ge=1)]] | None, BeforeValidator(_listed)] = None
    dropout: float = Field(0.0, ge=0, lt=1)  # of an mlp
    epochs: int = Field(300, ge=1)  # at most
    lr: float = Field(1e-3, gt=0)  # learning rate
    weight_decay: float = Field(0.01, ge=0)  # of AdamW
    batch_size: int = Field(64, ge=1)  # clips a step
    patience: int = Field(30, ge=1)  # epochs without a lower loss on the validation clips
    outputpath: str = "heads/"  # folder
    overwrite: bool = False  # replace a head of that name that was made otherwise

    @field_validator("*", mode="before")
    @classmethod
    def _has_value(cls, value: Any, info: ValidationInfo) -> Any:
        return check_value_given(cls, str(info.field_name), value)

    def disagreements(self) -> list[str]:
        """Return which options do not go together, a sentence each."""
        faults = []
        if (self.model is None) == (self.embeddings is None):
            found = "neither" if self.model is None else "both"
            faults.append(f"give a model (a run's folder, a checkpoint, a name) or --embeddings STORE, not {found}")
        if self.weights and self.model is None:
            faults.append("--weights belong to a model: give its name")
        if self.data and (self.train_data or self.valid_data or self.test_data):
            faults.append("--data PACK.tsv is tested fold by fold; drop it, or --train_data, --valid_data, --test_data")
        if not self.data and not (self.train_data and self.test_data):
            faults.append(
                "which clips? Give --data PACK.tsv, with a column of folds, or --train_data A.tsv and --test_data B.tsv"
            )
        if self.name in ("linear", "mlp"):
            faults.append(f"--name {self.name} means a new head in get_ssondo(head=...); give another name")
        if self.head == "linear" and (self.hidden_sizes or self.dropout):
            faults.append("--hidden_sizes and --dropout are of --head mlp; a linear head has no hidden layers")
        return faults

    def fitting(self, seed: int) -> Fitting:
        """Return how its heads are fitted."""
        hidden = () if self.head == "linear" else tuple(self.hidden_sizes or (512,))
        shared = {
            key: getattr(self, key) for key in ("epochs", "lr", "weight_decay", "dropout", "batch_size", "patience")
        }
        return Fitting(hidden_sizes=hidden, seed=seed, **shared)

    def packs(self) -> dict[str, str]:
        """Return the packs it names: what they are for -> TSV."""
        given = {"data": self.data, "train": self.train_data, "valid": self.valid_data, "test": self.test_data}
        return {part: path for part, path in given.items() if path}


def read_options(given: dict[str, Any], faults: Faults) -> ProbeOptions | None:
    """Check options of a command line.

    Args:
        given: option → value; None counts as not given.
        faults: gets every fault: an unknown option with the nearest, a value of the wrong type, a missing one.

    Returns:
        The options. Where there were faults: with the faulty ones at their defaults, so that the data they name can be
        checked in the same go; None if that is not possible.
    """
    settings = {key: value for key, value in given.items() if value is not None}
    try:
        options = ProbeOptions(**settings)
    except ValidationError as error:
        for fault in error.errors():
            key, message = str(fault["loc"][0]), fault["msg"]
            if fault["type"] == "extra_forbidden":
                faults.add(f"unknown option --{key}{did_you_mean(key, ProbeOptions.model_fields)}")
            elif fault["type"] == "missing":
                faults.add(f"--{key} is missing: it is what the head is saved under")
            elif key == "name":
                faults.add(
                    f"--name is {fault['input']!r}; wanted a name without / in it, and --outputpath for the folder"
                )
            else:
                faults.add(f"--{key} is {fault['input']!r}: {message[0].lower()}{message[1:]}")
            settings.pop(key, None)
        try:
            options = ProbeOptions(**{"name": "head", **settings})
        except ValidationError:
            return None
    for sentence in options.disagreements():
        faults.add(sentence)
    return options
