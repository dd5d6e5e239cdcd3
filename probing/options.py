"""The options of `run.py probe`."""

from collections.abc import Iterator, Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from common.options import Options
from common.parsing import shorten
from common.places import describe_unusable_name
from probing.fit import FitSettings
from training.config import Mode

HeadName = Literal["linear", "mlp", "knn", "prototypes"]


class ProbeOptions(Options):
    """The options of a probe; `model` or `embeddings`, and `data` with folds or `train_data` and `test_data`."""

    POSITIONAL: ClassVar[tuple[str, ...]] = ("model",)
    SHORT: ClassVar[Mapping[str, str]] = {"model": "m"}

    # --- source of embeddings
    model: str | None = None  # a run's folder, a checkpoint, or the name of a model; with `tasks` also several, A,B
    weights: str | None = None  # for a model given by name
    embeddings: list[str] | None = None  # stores of embeddings, in place of a model
    chunk_length: float = Field(10.0, gt=0)  # seconds that are embedded at once; a clip is the mean over its chunks
    # compare chunks of these lengths in seconds, 0.25,0.5,1,2,5,10, by score and cost, and keep the head of the best
    temporal_support: list[Annotated[float, Field(gt=0)]] | None = None
    cache: str = "embeddings/"  # where the model's embeddings are kept
    num_workers: int = Field(4, ge=0)  # processes that read clips
    verify: bool = False  # compare every clip that is embedded with its checksum
    device: str = "auto"  # auto, cpu or cuda
    mode: Mode = "fp32"  # precision of the embeddings; noamp = fp32, amp = fp16, amp_bf16 = bf16

    # --- clips
    tasks: str | None = None  # YAML of several tasks, name: {data: ..}, in place of the other options of clips
    data: str | None = None  # TSV of a pack with a column of folds: each is tested by a head trained on the others
    fold_column: str = "fold"  # name of that column
    train_data: str | None = None  # TSV of a pack of training clips, in place of `data`
    valid_data: str | None = None  # TSV of a pack of validation clips, for early stopping
    test_data: str | None = None  # TSV of a pack of test clips
    # part of the training clips that is held out for early stopping without valid_data; 0 = none
    valid_fraction: float = Field(0.2, ge=0, lt=1)
    label_column: str = "labels"  # classes joined by ";"
    labels_csv: str | None = None  # index,mid,display_name, where the column holds numbers

    baseline: bool = True  # add the figures of simple features on the same clips, where that takes seconds

    # --- the head
    name: str = ""  # of the head, which is written to OUTPUTPATH/NAME.pt; must be given
    # one layer, or several; nearest neighbours; prototypes of time steps. With `tasks` also several, linear,knn
    head: list[HeadName] = Field(["linear"], min_length=1)
    # last: the model's embedding; all, or numbers 0,5,11: those layers, weighted. With `tasks` also several, last,all
    layers: list[Literal["last", "all"] | int] = Field(["last"], min_length=1)
    # widths of the hidden layers of an mlp, 512,256; null = one of 512
    hidden_sizes: list[Annotated[int, Field(ge=1)]] | None = None
    dropout: float = Field(0.0, ge=0, lt=1)  # of an mlp
    neighbours: int = Field(10, ge=1)  # of knn
    prototypes: int = Field(20, ge=1)  # for each class, of prototypes
    epochs: int = Field(300, ge=1)  # at most
    lr: float = Field(1e-3, gt=0)  # learning rate
    weight_decay: float = Field(0.01, ge=0)  # of AdamW
    batch_size: int = Field(64, ge=1)  # clips a step
    patience: int = Field(30, ge=1)  # epochs without a lower loss on the validation clips
    outputpath: str = "heads/"  # folder
    overwrite: bool = False  # replace a head of that name that was made otherwise

    def conflicts(self) -> Iterator[str]:
        """Yield a sentence for each group of options that cannot be given together."""
        if (self.model is None) == (self.embeddings is None):
            found = "neither" if self.model is None else "both"
            yield f"give a model (a run's folder, a checkpoint, a name) or --embeddings STORE, not {found}"
        if self.weights and self.model is None:
            yield "--weights belong to a model: give its name"
        if self.data and (self.train_data or self.valid_data or self.test_data):
            yield "--data PACK.tsv is tested fold by fold; drop it, or --train_data, --valid_data, --test_data"
        if not (self.data or self.tasks) and not (self.train_data and self.test_data):
            yield (
                "no clips are given: give --data PACK.tsv, with a column of folds, or --train_data A.tsv and "
                "--test_data B.tsv"
            )
        if not self.name:
            yield "--name is missing: the head is saved under that name"
        elif fault := describe_unusable_name(self.name):
            yield f"--name is {shorten(repr(self.name))}; {fault}, and --outputpath for the folder"
        if self.name in ("linear", "mlp"):
            yield f"--name {self.name} means a new head in get_ssondo(head=...); give another name"
        if "mlp" not in self.head and (self.hidden_sizes or self.dropout):
            yield "--hidden_sizes and --dropout are for --head mlp; other heads have no hidden layers"
        if not self.tasks and (len(self.head) > 1 or len(self.layer_choices) > 1):
            yield "several heads or choices of layers are compared with --tasks TASKS.yaml; give one of each without it"
        if "prototypes" in self.head and self.layer_choices != ["last"] and not self.tasks:
            yield "--head prototypes takes the time steps of the last layer; drop --layers, or give another head"
        if self.embeddings and (self.layer_choices != ["last"] or "prototypes" in self.head):
            yield "stores hold clip embeddings of the last layer: other layers, and prototypes, need a model"

        if self.temporal_support is not None:
            yield from self._support_conflicts()

    def _support_conflicts(self) -> Iterator[str]:
        if self.model is None:
            yield "--temporal_support computes embeddings of windows of each length: give a model, not --embeddings"
        if "chunk_length" in self.model_fields_set:
            yield "--temporal_support and --chunk_length are both lengths of the chunks; drop one"
        if len(set(self.temporal_support or ())) < 2:
            yield "--temporal_support compares lengths: give two or more, 0.25,0.5,1,2,5,10 for example"
        if self.tasks:
            yield "--temporal_support compares lengths on one task; give its clips in place of --tasks"
        if "knn" in self.head:
            yield "--temporal_support chooses by validation clips, which --head knn has none of; give another head"
        if not (self.valid_data or self.valid_fraction):
            yield "--temporal_support chooses by validation clips; give --valid_data, or --valid_fraction above 0"

    @property
    def layer_choices(self) -> list[str]:
        """The choices of layers: "last", "all", and all numbers together, such as "0,5,11"."""
        numbers = ",".join(str(layer) for layer in self.layers if isinstance(layer, int))
        words = dict.fromkeys(layer for layer in self.layers if not isinstance(layer, int))
        return [*words, *([numbers] if numbers else [])]

    def fitting(self, seed: int) -> FitSettings:
        """Return how its heads are fitted, on the model's clip embeddings."""
        (head,) = self.head
        hidden = tuple(self.hidden_sizes or (512,)) if head == "mlp" else ()
        keys = ("epochs", "lr", "weight_decay", "dropout", "batch_size", "patience", "neighbours", "prototypes")
        kind = "mlp" if head == "linear" else head
        return FitSettings(kind=kind, hidden_sizes=hidden, seed=seed, **{key: getattr(self, key) for key in keys})

    def packs(self) -> dict[str, str]:
        """Return the packs it names: what they are for -> TSV."""
        given = {"data": self.data, "train": self.train_data, "valid": self.valid_data, "test": self.test_data}
        return {part: path for part, path in given.items() if path}
