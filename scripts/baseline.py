"""Evaluate simple features with scikit-learn on a labelled pack, as a baseline for any network.

    python scripts/baseline.py --train_data data/mine/labels/train.tsv --test_data data/mine/labels/test.tsv
    python scripts/baseline.py --train_data T.tsv --valid_data V.tsv --test_data E.tsv --output baseline.json

The features are mean and standard deviation over time of 40 log-mels or 20 MFCCs, of whole clips or of each quarter,
the classifier a logistic regression or an RBF SVM: eight variants. One is chosen on the validation clips, or by
cross-validation of the training clips (clips with the same `group`, `speaker` or `fold` in the list stay together),
never on the test clips, and fitted to training and validation clips. The metric is accuracy if each clip has one label,
otherwise mAP. Large data are subsampled, which is reported. It takes seconds on a CPU.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project is used from its folder, not installed

# First: signals are handled from here on, also during the slow imports.
from common.entry_points import print_user_errors  # isort: split

import logging
import math

from audio.dataset import Pack
from audio.labels import parse_labels
from common.columns import align_columns
from common.errors import Faults
from common.files import write_json
from common.options import Options, parse_arguments
from probing.data import collect_classes, warn_of_overlap
from probing.scores import COVERAGE, Score, compute_score
from training.baseline import Baseline, fit_baseline
from training.labelled import LabelledPack, open_pack

SEED = 0  # of the bootstrap


class BaselineOptions(Options):
    """The options of baseline.py."""

    train_data: str  # TSV of the pack to fit to, with a column `labels`
    test_data: str  # TSV of the pack to evaluate on
    valid_data: str | None = None  # TSV of the pack to choose a variant by
    output: str | None = None  # JSON file for everything that is printed, and more figures


@print_user_errors
def main(arguments: list[str] | None = None) -> None:
    """Print the table of the variants and the figures of the chosen one."""
    options = parse_arguments(BaselineOptions, __doc__, arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    faults = Faults("the command")
    given = {"train": options.train_data, "test": options.test_data, "valid": options.valid_data}
    parts, labels = _open_packs({part: path for part, path in given.items() if path}, faults)
    faults.raise_if_any()
    baseline = fit_baseline(parts["train"], parts["test"], parts.get("valid"))
    test = parts["test"]
    result = compute_score(baseline.scores, test.multi_hot(), labels, baseline.metric, SEED)
    interval = _centre_interval(result)
    print(_format_report(baseline, result, interval))
    if options.output:
        facts = {"interval": list(interval), "chance": result.chance, "data": given, "clips_tested": len(test.pack)}
        write_json(options.output, baseline.as_dict() | facts)
        print(f"written: {options.output}")


def _open_packs(paths: dict[str, str], faults: Faults) -> tuple[dict[str, LabelledPack], list[str]]:
    """Open packs with the classes that occur in any of them; invalid packs are added to `faults`."""
    packs: dict[str, Pack] = {}
    for part, path in paths.items():
        pack = open_pack(path, faults, labelled=True)
        if pack is not None:
            packs[part] = pack
    labels = collect_classes([str(cell) for pack in packs.values() for cell in pack.table["labels"]])
    opened = {}
    for part, pack in packs.items():
        with faults.noted():
            opened[part] = LabelledPack(pack, parse_labels(pack.table["labels"], labels, pack.names), len(labels))
    warn_of_overlap(packs)
    return opened, labels


def _format_report(baseline: Baseline, result: Score, interval: tuple[float, float]) -> str:
    """Lay out the variants, and the figures of the chosen one on the test clips."""
    rows = [("features", "statistics of", "model", f"{baseline.choice_metric} in selection", "")]
    for variant, value in baseline.choices:
        scope = "whole clip" if variant.parts == 1 else "each quarter"
        mark = "chosen" if variant == baseline.variant else ""
        rows.append((variant.spectrum, scope, variant.model, _format_value(value, baseline.choice_metric), mark))
    reached, chance, low, high = (
        _format_value(each, result.metric) for each in (result.value, result.chance, *interval)
    )
    return (
        f"{align_columns(rows)}\n\ntest: {result.metric} {reached}, {100 * COVERAGE:.0f} % interval {low} to {high}; "
        f"chance {chance}; {result.metrics.n_clips:,} clips\n{baseline.sentence}"
    )


def _centre_interval(result: Score) -> tuple[float, float]:
    """Return the interval of a figure, centred on the figure if it does not contain it.

    A clip that a bootstrap draws twice ranks its class higher: mAP over classes of very few clips is too high in every
    draw, and the interval may miss the figure. Its width is valid then, its location is not.
    """
    low, high = result.interval
    if low <= result.value <= high:
        return low, high
    return result.value - (high - low) / 2, result.value + (high - low) / 2


def _format_value(value: float, metric: str) -> str:
    if math.isnan(value):
        return "-"
    return f"{100 * value:.1f} %" if metric == "accuracy" else f"{value:.4f}"


if __name__ == "__main__":
    main()
