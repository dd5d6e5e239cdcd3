"""What a sweep over token merging found, as a table, as CSV and as a picture."""

import statistics
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

from common.columns import align_columns
from scripts.sweeps.token_merging import Metric, Point, Row, Spread
from training.figures import COLOURS, FAINT, INK, style

if TYPE_CHECKING:  # takes a second to import
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKERS = "osD^vP"
LEGEND: dict[str, Any] = {"fontsize": 9, "labelcolor": INK, "framealpha": 0.8, "edgecolor": "none"}
NOTE: dict[str, Any] = {"fontsize": 8, "color": INK, "loc": "right"}


def markdown(rows: Sequence[Row], metric: Metric) -> str:
    """Lay out the rows: groups side by side, one line an r."""
    groups = _by_group(rows)
    head, rule = ["r"], ["---:"]
    for group in groups:
        head += [f"{group}: {metric}, %", "drop", "clips/s"]
        rule += ["---:"] * 3
    lines = [head, rule]
    for r in sorted({row.r for row in rows}):
        line = [f"{r:g}"]
        for own in groups.values():
            row = next((row for row in own if row.r == r), None)
            line += _cells(row) if row else ["", "", ""]
        lines.append(line)
    return "\n".join(f"| {line} |" for line in align_columns(lines, ">", ">", " | "))


def _cells(row: Row) -> list[str]:
    speed = statistics.median(row.clips_per_second)
    drop = "" if row.drop is None else "0" if row.r == 0 else _text(row.drop, "+.1f")
    return [_text(row.value, ".1f"), drop, f"{speed:.1f}" if speed < 100 else f"{speed:.0f}"]


def _text(spread: Spread, form: str) -> str:
    deviation = "" if spread.deviation is None else f" ± {spread.deviation:.1f}"
    return f"{round(spread.mean, 1) + 0.0:{form}}{deviation}"  # without a zero that is negative


def rows_csv(rows: Iterable[Row], metric: Metric) -> str:
    """Write the rows as CSV, values in percent."""
    names = ["group", "r", "checkpoints", metric, f"{metric}_std", "drop", "drop_std"]
    lines = []
    for row in rows:
        drop = (None, None) if row.drop is None else (row.drop.mean, row.drop.deviation)
        speed = row.clips_per_second
        speeds = [statistics.median(speed), min(speed), max(speed)]
        values = [row.value.mean, row.value.deviation, *drop, *speeds]
        lines.append([row.group, f"{row.r:g}", row.n_checkpoints, *values])
    return write_csv(lines, [*names, "clips_per_second", "lowest", "highest"])


def points_csv(points: Sequence[Point], values: Sequence[float], metric: Metric) -> str:
    """Write the value of every checkpoint at every r as CSV, in percent."""
    lines = [
        [point.group, f"{point.r:g}", point.source, point.test_data, value]
        for point, value in zip(points, values, strict=True)
    ]
    return write_csv(lines, ["group", "r", "checkpoint", "test_data", metric])


def write_csv(lines: Sequence[Sequence[object]], names: Sequence[str]) -> str:
    """Write lines below the names of their columns; numbers with six digits, nothing for None."""
    table = pd.DataFrame(lines, columns=list(names))
    return table.to_csv(index=False, float_format="%.6g", lineterminator="\n")


def _by_group(rows: Iterable[Row]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row)
    return groups


def figure(rows: Sequence[Row], metric: Metric) -> "Figure":
    """Draw accuracy or mAP over r, with the standard deviation as a band, and beside it the speed over r."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(10.5, 4.2), layout="constrained")
    left, right = drawn.subplots(1, 2, width_ratios=[1.35, 1])
    _draw_values(left, rows, metric)
    _draw_speeds(right, rows)
    for axis in (left, right):
        style(axis)
        axis.set_xticks(sorted({row.r for row in rows}) if len({row.r for row in rows}) <= 12 else axis.get_xticks())
        axis.set_xlabel("r, tokens merged away in each block")
    return drawn


def _draw_values(axis: "Axes", rows: Sequence[Row], metric: Metric) -> None:
    for index, (group, own) in enumerate(_by_group(rows).items()):
        colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
        counts = sorted({row.n_checkpoints for row in own})
        each = "" if counts == [1] else f", mean of {' to '.join(map(str, dict.fromkeys((counts[0], counts[-1]))))}"
        rs, means = [row.r for row in own], [row.value.mean for row in own]
        axis.plot(rs, means, color=colour, marker=marker, markersize=4.5, linewidth=1.8, label=f"{group}{each}")
        spread = [row.value.deviation or 0.0 for row in own]
        low, high = ([mean + sign * s for mean, s in zip(means, spread, strict=True)] for sign in (-1, 1))
        if len(own) > 1:
            axis.fill_between(rs, low, high, color=colour, alpha=0.15, linewidth=0)
        elif any(spread):
            axis.errorbar(rs, means, spread, color=colour, linewidth=1.2, capsize=3)
    axis.set_ylabel(f"{metric}, %")
    axis.legend(**LEGEND)
    if any(row.value.deviation is not None for row in rows):
        axis.set_title("bands: one standard deviation", **NOTE)


def _draw_speeds(axis: "Axes", rows: Sequence[Row]) -> None:
    """Draw one line a network: groups of one network share its speed."""
    networks: dict[str, dict[float, Row]] = {}
    for row in rows:
        networks.setdefault(row.network, {})[row.r] = row
    for network, by_r in networks.items():
        own = [by_r[r] for r in sorted(by_r)]
        sharing = list(dict.fromkeys(row.group for row in rows if row.network == network))
        index = list(_by_group(rows)).index(sharing[0])
        colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
        if len(networks) == 1:
            colour = INK
        rs, speeds = [row.r for row in own], [statistics.median(row.clips_per_second) for row in own]
        axis.plot(rs, speeds, color=colour, marker=marker, markersize=4.5, linewidth=1.8, label=", ".join(sharing))
        low, high = ([bound(row.clips_per_second) for row in own] for bound in (min, max))
        axis.fill_between(rs, low, high, color=colour, alpha=0.15, linewidth=0)
        if 0.0 in by_r and len(own) > 1:
            ratio = f"{speeds[-1] / speeds[0]:.2f}x"
            axis.annotate(ratio, (rs[-1], speeds[-1]), (0, 7), textcoords="offset points", ha="center", color=colour)
    axis.set_ylabel("clips/s")
    axis.set_ylim(bottom=0)
    axis.margins(x=0.08, y=0.12)
    axis.axhline(0, color=FAINT, linewidth=0.6)
    axis.set_title("bands: slowest to fastest pass", **NOTE)
    if len(networks) > 1:
        axis.legend(**LEGEND)
