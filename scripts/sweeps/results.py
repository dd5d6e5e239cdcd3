"""Results of a sweep over token merging as a table, CSV and a figure."""

import statistics
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

from common.columns import format_markdown_table
from scripts.sweeps.token_merging import Point, Row
from training.baseline import Metric
from training.figures import COLOURS, FAINT, INK, style

if TYPE_CHECKING:  # takes a second to import
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKERS = "osD^vP"
LEGEND: dict[str, Any] = {"fontsize": 9, "labelcolor": INK, "framealpha": 0.8, "edgecolor": "none"}
NOTE: dict[str, Any] = {"fontsize": 8, "color": INK, "loc": "right"}


def format_rows(rows: Sequence[Row], metric: Metric) -> str:
    """Lay out the rows as Markdown: groups side by side, one line for each r."""
    groups = _group_rows(rows)
    cells = {(row.group, row.r): _format_cells(row) for row in rows}
    lines = [["r", *(cell for group in groups for cell in (f"{group}: {metric}, %", "drop", "clips/s"))]]
    for r in sorted({row.r for row in rows}):
        lines.append([f"{r:g}", *(cell for group in groups for cell in cells.get((group, r), ["", "", ""]))])
    return format_markdown_table(lines, ">")


def _format_cells(row: Row) -> list[str]:
    speed = statistics.median(row.clips_per_second)
    drop = "" if row.drop is None else "0" if row.r == 0 else f"{row.drop:+.1f}"
    return [f"{row.value:.1f}", drop, f"{speed:.1f}" if speed < 100 else f"{speed:.0f}"]


def format_rows_csv(rows: Iterable[Row], metric: Metric) -> str:
    """Format the rows as CSV, values in percent."""
    names = ["group", "r", "checkpoints", metric, f"{metric}_std", "drop", "drop_std"]
    lines = []
    for row in rows:
        drop = (None, None) if row.drop is None else (row.drop.mean, row.drop.deviation)
        speed = row.clips_per_second
        speeds = [statistics.median(speed), min(speed), max(speed)]
        values = [row.value.mean, row.value.deviation, *drop, *speeds]
        lines.append([row.group, f"{row.r:g}", row.n_checkpoints, *values])
    return format_csv(lines, [*names, "clips_per_second", "lowest", "highest"])


def format_points_csv(points: Sequence[Point], values: Sequence[float], metric: Metric) -> str:
    """Format the value of every checkpoint at every r as CSV, in percent."""
    lines = [
        [point.group, f"{point.r:g}", point.source, point.test_data, value]
        for point, value in zip(points, values, strict=True)
    ]
    return format_csv(lines, ["group", "r", "checkpoint", "test_data", metric])


def format_csv(lines: Sequence[Sequence[object]], names: Sequence[str]) -> str:
    """Format lines below the names of their columns; numbers with six digits, nothing for None."""
    table = pd.DataFrame(lines, columns=list(names))
    return table.to_csv(index=False, float_format="%.6g", lineterminator="\n")


def _group_rows(rows: Iterable[Row]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row)
    return groups


def draw_sweep(rows: Sequence[Row], metric: Metric) -> "Figure":
    """Draw accuracy or mAP over r, with the standard deviation as a band, and beside it the speed over r."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.35, 1])
    _draw_values(left, rows, metric)
    _draw_speeds(right, rows)
    rs = sorted({row.r for row in rows})
    for axis in (left, right):
        style(axis)
        axis.set_xticks(rs if len(rs) <= 12 else axis.get_xticks())
        axis.set_xlabel("r, tokens merged in each block")
    return figure


def _draw_line(axis: "Axes", index: int, rs: list[float], values: list[float], label: str, colour: str) -> None:
    marker = MARKERS[index % len(MARKERS)]
    axis.plot(rs, values, color=colour, marker=marker, markersize=4.5, linewidth=1.8, label=label)


def _draw_values(axis: "Axes", rows: Sequence[Row], metric: Metric) -> None:
    for index, (group, members) in enumerate(_group_rows(rows).items()):
        colour = COLOURS[index % len(COLOURS)]
        counts = sorted({row.n_checkpoints for row in members})
        note = "" if counts == [1] else f", mean of {' to '.join(map(str, dict.fromkeys((counts[0], counts[-1]))))}"
        rs, means = [row.r for row in members], [row.value.mean for row in members]
        _draw_line(axis, index, rs, means, f"{group}{note}", colour)
        spread = [row.value.deviation or 0.0 for row in members]
        low, high = ([mean + sign * s for mean, s in zip(means, spread, strict=True)] for sign in (-1, 1))
        if len(members) > 1:
            axis.fill_between(rs, low, high, color=colour, alpha=0.15, linewidth=0)
        elif any(spread):
            axis.errorbar(rs, means, spread, color=colour, linewidth=1.2, capsize=3)
    axis.set_ylabel(f"{metric}, %")
    axis.legend(**LEGEND)
    if any(row.value.deviation is not None for row in rows):
        axis.set_title("bands: one standard deviation", **NOTE)


def _draw_speeds(axis: "Axes", rows: Sequence[Row]) -> None:
    """Draw one line for each network, whose speed its groups share."""
    networks: dict[str, dict[float, Row]] = {}
    for row in rows:
        networks.setdefault(row.network, {})[row.r] = row
    for network, by_r in networks.items():
        members = [by_r[r] for r in sorted(by_r)]
        groups = list(dict.fromkeys(row.group for row in rows if row.network == network))
        index = list(_group_rows(rows)).index(groups[0])
        colour = INK if len(networks) == 1 else COLOURS[index % len(COLOURS)]
        rs, speeds = [row.r for row in members], [statistics.median(row.clips_per_second) for row in members]
        _draw_line(axis, index, rs, speeds, ", ".join(groups), colour)
        low, high = ([bound(row.clips_per_second) for row in members] for bound in (min, max))
        axis.fill_between(rs, low, high, color=colour, alpha=0.15, linewidth=0)
        if 0.0 in by_r and len(members) > 1:
            ratio = f"{speeds[-1] / speeds[0]:.2f}x"
            axis.annotate(ratio, (rs[-1], speeds[-1]), (0, 7), textcoords="offset points", ha="center", color=colour)
    axis.set_ylabel("clips/s")
    axis.set_ylim(bottom=0)
    axis.margins(x=0.08, y=0.12)
    axis.axhline(0, color=FAINT, linewidth=0.6)
    axis.set_title("bands: slowest to fastest pass", **NOTE)
    if len(networks) > 1:
        axis.legend(**LEGEND)
