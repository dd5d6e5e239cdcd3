"""The report of a run, `report.html`: one page without references to other files; and the plot `curves.png`."""

import base64
import importlib.metadata
import math
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from common.files import write_bytes, write_text
from training.baseline import Baseline, compare_with_baseline
from training.detection_figure import detection_figure
from training.figures import confusion_figure, curves_figure, render_png
from training.metrics import MAX_CURVES, Metrics, format_threshold

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "torchaudio", "timm", "numpy", "pandas", "h5py", "soundfile", "soxr", "safetensors")
MAX_DRAWN_CLASSES = 50  # of a readable confusion matrix
RANKED = 10  # best classes, and worst classes
PAIRS = 10  # most-confused pairs, below a plot
PAIRS_ALONE = 30  # and without one
DEFINITIONS = {
    "mAP": ("mAP", "average precision, mean over the classes that occur"),
    "mAUC": ("mAUC", "area under the ROC curve, mean over classes"),
    "mEER": ("mEER", "equal error rate of false alarms and misses, mean over classes (lower is better)"),
    "d_prime": ("d\u2032", "√2 times the normal quantile of mAUC"),
    "lwlrap": ("lwlrap", "label-weighted label-ranking average precision"),
    "top1": ("top-1", "clips whose highest score is their label"),
    "hit1_among_present": ("hit-1", "clips whose highest score, among the classes that occur, is one of their labels"),
}


def draw_curves(folder: Path, entries: list[dict[str, Any]]) -> None:
    """Write `curves.png`: losses, validation mAP, learning rate and speed over the steps of `entries`."""
    write_bytes(Path(folder) / "curves.png", render_png(curves_figure(entries)))


def write_report(
    folder: Path,
    *,
    title: str,
    facts: dict[str, str],
    config: dict[str, Any],
    entries: list[dict[str, Any]],
    results: Metrics | None,
    results_name: str,
    selection: str,
    baseline: Baseline | None = None,
    alert: str | None = None,
) -> Path:
    """Write `report.html`, which refers to no other file and no network.

    Args:
        folder: of the run.
        title: of the page.
        facts: facts about the run by name: model, data, seed, duration, device.
        config: configuration of the run.
        entries: the lines of `metrics.jsonl`.
        results: metrics of the final model, or None without evaluation data.
        results_name: name of the evaluation data.
        selection: how the checkpoint was chosen, as a sentence.
        baseline: the baseline on the same data, shown beside `results`.
        alert: a warning shown on top; lines after the first are items of a list.

    Returns:
        The path of the page.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # labels and file names are user input
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["threshold"] = format_threshold
    environment.filters["metric"] = lambda value: "-" if value is None or math.isnan(value) else f"{value:.4f}"
    page = environment.get_template("report.html.jinja").render(
        title=title,
        alert=None if alert is None else [line.removeprefix("  - ") for line in alert.splitlines()],
        facts=facts,
        selection=selection,
        curves=_data_uri(render_png(curves_figure(entries))) if entries else None,
        results_name=results_name,
        results=None if results is None else _results(results),
        baseline=None if results is None else baseline,
        warning=compare_with_baseline(results, baseline) if results and baseline else None,
        definitions=DEFINITIONS,
        config=yaml.safe_dump(config, sort_keys=False, allow_unicode=True),
        versions=collect_versions(),
        command=shlex.join(["python", *sys.argv]),
    )
    target = Path(folder) / "report.html"
    write_text(target, page)
    return target


def collect_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages, and the git commit of the checkout, if any."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # some packages are optional
            continue
    commit = _git_commit()
    return found | ({"git commit": commit} if commit else {})


def _git_commit() -> str | None:
    """Return the commit of this checkout, with "-dirty" appended if files differ from it, or None."""
    if not (ROOT / ".git").exists():  # an unpacked archive, perhaps inside another repository
        return None
    command = ["git", "--no-optional-locks", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        result = subprocess.run(
            [*command, "--exclude=*"], capture_output=True, text=True, timeout=5, check=True, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip() or None


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _results(metrics: Metrics) -> dict[str, Any]:
    """Return the values of `metrics` for the template."""
    table = metrics.per_class
    scored = table[table.n_positive > 0].sort_values("AP", ascending=False, kind="stable")
    n_worst = min(RANKED, len(scored) // 2)  # with few classes, none is listed twice
    return {
        "metrics": metrics,
        "chance": (scored.n_positive / metrics.n_clips).mean(),
        "best": scored.head(min(RANKED, len(scored) - n_worst)).to_dict("records"),
        "worst": scored.tail(n_worst).iloc[::-1].to_dict("records"),
        "per_class": table.to_dict("records"),
        "few_classes": len(table) <= MAX_CURVES,
        "curves": _data_uri(render_png(detection_figure(metrics.curves))) if metrics.curves else None,
        "confusion": None if metrics.confusion is None else _confusion(metrics.confusion, table.label.tolist()),
    }


def _confusion(confusion: np.ndarray, labels: list[str]) -> dict[str, Any]:
    """Return the plot (None for too many classes) and the most-confused pairs."""
    drawn = len(labels) <= MAX_DRAWN_CLASSES
    pairs = find_most_confused(confusion, PAIRS if drawn else PAIRS_ALONE)
    totals = confusion.sum(axis=1)
    return {
        "picture": _data_uri(render_png(confusion_figure(confusion, labels))) if drawn else None,
        "wide": len(labels) > 8,
        "most_drawn": MAX_DRAWN_CLASSES,
        "pairs": [(labels[true], labels[predicted], count, count / totals[true]) for true, predicted, count in pairs],
        "n_wrong": confusion.sum() - confusion.trace(),
    }


def find_most_confused(confusion: np.ndarray, most: int) -> list[tuple[int, int, int]]:
    """Return the most frequent confusions, (true class, predicted class, number of clips), the most frequent first."""
    wrong = confusion.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:most]
    pairs = ((*divmod(int(cell), len(wrong)), int(wrong.flat[cell])) for cell in order)
    return [pair for pair in pairs if pair[2]]
