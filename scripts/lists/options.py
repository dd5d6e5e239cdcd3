"""The options of make_lists.py and make_subset.py, and how labels and lists follow from them."""

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from pydantic import Field

from audio import ontology
from audio.ontology import Ontology
from audio.selection import SelectionSettings
from common.options import Options


class SelectionOptions(Options):
    """The clips to choose by their labels, see `audio.selection`."""

    MANY: ClassVar[tuple[str, ...]] = ("labels",)

    labels: list[str] = Field([])  # only clips of these, each in quotes: names of the list, or AudioSet's MIDs
    # clips without any of --labels, which are drawn; null = as many as there are clips with one, or all others
    negatives: int | None = Field(None, ge=0)
    negative_label: str = "Other"  # of these
    min_clips: int = Field(
        1, ge=1
    )  # fewest clips of a label; of all labels, where none is given, rarer ones are left out
    balanced: bool = False  # draw as many clips of each label as the rarest has (and as many others)
    # AudioSet's ontology.json: clips of a kind of a label (Bark) count as clips of the label (Dog); null = the file of
    # that name beside the list, none = no ontology
    ontology: str | None = None
    seed: int = Field(42, ge=0)  # of everything that is drawn

    @property
    def selection(self) -> SelectionSettings:
        """What to choose."""
        return SelectionSettings(
            self.labels, self.negatives, self.min_clips, self.balanced, self.seed, self.negative_label
        )

    def find_ontology(self, path: str) -> str | None:
        """Return the path of the ontology for a list, None for none."""
        beside = Path(path).parent / ontology.FILE
        if self.ontology is None:
            return str(beside) if beside.is_file() else None
        return None if self.ontology == "none" else self.ontology

    def read_ontology(self, path: str) -> Ontology | None:
        """Read the ontology for a list, if there is one."""
        found = self.find_ontology(path)
        return None if found is None else Ontology.read(found)


class ListOptions(SelectionOptions):
    """What make_lists.py was given."""

    POSITIONAL: ClassVar[tuple[str, ...]] = ("folder",)

    folder: str  # of sounds; searched with all below it: links are followed, hidden files left out
    output: str = "data"  # folder for the lists; lists that this command made are replaced

    # --- labels
    pattern: str = ""  # of names, such as '{label}_{speaker}_{}.wav', see above
    table: str = ""  # a tsv or csv with a header; its rows name files of FOLDER and their labels
    filename_column: str = ""  # of the table; guessed from usual names where it is not given
    label_column: str = ""  # of the table; guessed where it is not given; none for lists without labels
    label_separator: str = ";"  # between the labels of a cell of the table; ";" separates in any case
    # which folder is the label: first (below FOLDER), last, a number such as 2, or none for lists without labels
    label_level: str = ""

    # --- lists
    # what stays in one list: a name of the pattern, a column of the table, folder (the deepest one), or several with
    # commas; none for no groups
    group: str = ""
    valid: float = Field(0.2, ge=0, lt=1)  # share of the clips; 0 for no valid.tsv
    test: float = Field(0.2, ge=0, lt=1)  # share of the clips; 0 for no test.tsv
    # number of folds, which become the column fold of folds.tsv (for run.py probe --data); test.tsv is the first of
    # them, valid.tsv the second, train.tsv all others
    folds: int | None = Field(None, ge=2)
    # of the table or the pattern, whose lists or folds are kept (split or fold, where there is one); none to draw new
    # ones
    split_column: str = ""
    compare_content: bool = True  # keep files of the same bytes in one list; only files of equal size are read
    overwrite: bool = False  # replace lists in the output folder that this command did not make

    @property
    def selects(self) -> bool:
        """Whether clips are chosen by their labels."""
        return bool(self.labels or self.balanced or self.min_clips > 1)

    @property
    def given_shares(self) -> list[str]:
        """The options that decide how clips are split, as far as they were given."""
        return [f"--{name}" for name in ("valid", "test", "folds") if name in self.model_fields_set]

    def conflicts(self) -> Iterator[str]:
        """Yield a sentence for each group of options that cannot be given together."""
        if not self.folds and self.valid + self.test >= 1:
            yield f"--valid {self.valid:g} and --test {self.test:g} leave no clips to train on; expected a sum below 1"
        if self.negatives is not None and not self.labels:
            yield f"--negatives {self.negatives} is the number of clips without any of --labels, which are missing"
        for name in ("valid", "test"):
            if self.folds and getattr(self, name) and name in self.model_fields_set:
                yield (
                    f"--{name} {getattr(self, name):g} cannot be combined with --folds {self.folds}, whose first fold "
                    f"is test and second fold valid; leave it out, or give --{name} 0 for no such list"
                )
