"""Checks numbers in a column of labels, which are read as indices into the classes of a model.

AudioSet's lists have indices into its 527 classes. A list of another data set may have indices into its own classes;
the metrics of a model would then be wrong.
"""

import logging

from audio.dataset import Pack
from audio.labels import list_classes, split_labels
from common.errors import Faults, some
from models.labels import audioset_labels

logger = logging.getLogger(__name__)


def check_label_numbers(pack: Pack, labels: list[str], faults: Faults) -> None:
    """Add numbers that cannot be indices into a model's classes to `faults`; log the names of others.

    A data set with classes of its own numbers them from 0 and has clips of each. So if every clip has one label, the
    numbers are 0 to K - 1 with none missing, and the model's classes are AudioSet's 527, the numbers are refused: the
    first K classes of AudioSet are kinds of speech, which its own lists label twice ("0;1").

    Args:
        pack: a pack with a column `labels`.
        labels: the classes of the model.
        faults: gets the errors.
    """
    cells = [split_labels(str(cell)) for cell in pack.table["labels"].unique()]
    found = list_classes(map(str, pack.table["labels"].unique()))
    numbers = [int(name) for name in found if name.isascii() and name.isdigit()]
    if len(numbers) < len(found) or not numbers or numbers[-1] >= len(labels) or labels[numbers[-1]].isdigit():
        return
    examples = some((f"{number} is {labels[number]!r}" for number in numbers), 3)
    counts_from_zero = len(numbers) > 1 and numbers == list(range(len(numbers))) and len(numbers) < len(labels)
    one_each = all(len(cell) == 1 for cell in cells)
    if counts_from_zero and one_each and labels == audioset_labels():
        faults.add(
            f"{pack.manifest} has the numbers 0 to {numbers[-1]} as labels, one a clip, which seem to be classes of "
            f"its own; the model's {len(labels)} classes are AudioSet's, where {examples}. Write AudioSet's names "
            "into the column, train a head on your classes (`run.py probe`), or fine-tune"
        )
        return
    level = logging.WARNING if one_each else logging.INFO
    logger.log(level, "%s: numbers are read as indices into the model's classes: %s", pack.manifest, examples)
