"""What simple features and scikit-learn reach on a labelled pack: the figure that any network has to beat.

    python scripts/baseline.py --train_data data/mine/labels/train.tsv --test_data data/mine/labels/test.tsv
    python scripts/baseline.py --train_data T.tsv --valid_data V.tsv --test_data E.tsv --output baseline.json

Mean and standard deviation over time of 40 log-mels or 20 MFCCs, of whole clips or of each quarter, and on them a
logistic regression or an RBF SVM: eight variants. The one that is reported is chosen on the validation clips, or, where
none are given, by cross-validation of the training clips (columns `group`, `speaker` or `fold` of the list keep clips
together), never on the test clips. It is fitted to training and validation clips. Clips with one label each: accuracy;
otherwise mAP. Large data are thinned out, and a line says so. It takes seconds and needs no GPU.
"""

import logging
import math
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project is used from its folder, not installed

from audio.dataset import Pack
from audio.labels import count_classes, describe_lookalikes, list_classes, parse_labels
from common.columns import align_columns
from common.errors import Faults, print_user_errors, some
from common.files import write_json
from common.options import Options, parse_arguments
from probing.data import in_order
from probing.scores import COVERAGE, Score, score
from training.baseline import Baseline, fit_baseline
from training.labelled import LabelledPack, open_pack

logger = logging.getLogger(__name__)

SEED = 0  # of the bootstrap


class BaselineOptions(Options):
    """The options of baseline.py."""

    train_data: str  # TSV of the pack to fit to, with a column `labels`
    test_data: str  # TSV of the pack to evaluate on
    valid_data: str | None = None  # TSV of the pack to choose a variant by
    output: str | None = None  # JSON file for everything that is printed, and more figures


@print_user_errors
def main(arguments: list[str] | None = None) -> None:
    """Fit, and print the table of the variants and the figures of the chosen one."""
    options = parse_arguments(BaselineOptions, __doc__, arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    faults = Faults("the command")
    given = {"train": options.train_data, "test": options.test_data, "valid": options.valid_data}
    parts, labels = _open({part: path for part, path in given.items() if path}, faults)
    faults.raise_if_any()
    baseline = fit_baseline(parts["train"], parts["test"], parts.get("valid"))
    test = parts["test"]
    judged = score(baseline.scores, test.multi_hot(), labels, baseline.metric, SEED)
    print(_report(baseline, judged))
    if options.output:
        write_json(options.output, _as_dict(baseline, judged) | {"data": given, "clips_tested": len(test.pack)})
        print(f"written: {options.output}")


def _open(paths: dict[str, str], faults: Faults) -> tuple[dict[str, LabelledPack], list[str]]:
    """Open packs with the classes that occur in any of them; what is wrong is noted."""
    packs: dict[str, Pack] = {}
    for part, path in paths.items():
        pack = open_pack(path, faults, labelled=True)
        if pack is not None:
            packs[part] = pack
    cells = [str(cell) for pack in packs.values() for cell in pack.table["labels"]]
    labels = sorted(list_classes(cells), key=in_order)
    if lookalikes := describe_lookalikes(count_classes(cells)):
        logger.warning(lookalikes)
    opened = {}
    for part, pack in packs.items():
        with faults.noted():
            opened[part] = LabelledPack(pack, parse_labels(pack.table["labels"], labels, pack.names), len(labels))
    for part in ("valid", "test"):
        twice = set(packs[part].names) & set(packs["train"].names) if {part, "train"} <= set(packs) else set()
        if twice:
            logger.warning("%d clips are in train_data and in %s_data: %s", len(twice), part, some(sorted(twice)))
    return opened, labels


def _report(baseline: Baseline, judged: Score) -> str:
    """Lay out the variants, and what the chosen one reaches on the test clips."""
    rows = [("features", "statistics of", "model", f"{baseline.choice_metric} where chosen", "")]
    for variant, value in baseline.choices:
        where = "whole clip" if variant.parts == 1 else "each quarter"
        mark = "chosen" if variant == baseline.variant else ""
        rows.append((variant.spectrum, where, variant.model, _text(value, baseline.choice_metric), mark))
    low, high = (_text(value, judged.metric) for value in _interval(judged))
    lines = [
        *align_columns(rows),
        "",
        f"test: {judged.metric} {_text(judged.value, judged.metric)}, {100 * COVERAGE:.0f} % interval {low} to {high}; "
        f"chance {_text(judged.chance, judged.metric)}; {judged.metrics.n_clips:,} clips",
        baseline.sentence,
    ]
    return "\n".join(lines)


def _interval(judged: Score) -> tuple[float, float]:
    """Return the interval of a figure, around that figure.

    A clip that a bootstrap draws twice helps to rank its class: mAP over classes of very few clips comes out too high
    in every draw, and the interval may lie beside the figure. Its width is right then, its place is not.
    """
    low, high = judged.interval
    if low <= judged.value <= high:
        return low, high
    return judged.value - (high - low) / 2, judged.value + (high - low) / 2


def _text(value: float, metric: str) -> str:
    if math.isnan(value):
        return "-"
    return f"{100 * value:.1f} %" if metric == "accuracy" else f"{value:.4f}"


def _as_dict(baseline: Baseline, judged: Score) -> dict[str, Any]:
    return baseline.as_dict() | {"interval": list(_interval(judged)), "chance": judged.chance}


if __name__ == "__main__":
    main()
