"""Probes of several tasks in one command: every task with every model, head and choice of layers, and a table of all.

TASKS.yaml ──► checked at once ──► a probe for each task, model, head and choice ──► OUTPUTPATH/NAME/*.pt, .json
                                   (those that are there are not repeated)       └─► probes.md, .json, .png
"""

import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import Faults, UserError, did_you_mean, some
from common.files import write_json
from common.options import read_options
from common.parsing import load_json, shorten
from common.places import describe_unusable_name
from models.weight_sources import needs_download
from probing.baseline import fit_baselines
from probing.comparison import Row, write_comparison
from probing.data import ProbeSet, open_clips
from probing.options import ProbeOptions
from probing.probe import Probe, check_probe, run_probe
from probing.source import EmbeddingSource, open_source
from training.settings import read_settings

logger = logging.getLogger(__name__)

# Options that are the same for all tasks.
SHARED = (
    *("model", "weights", "embeddings", "cache", "num_workers", "device", "mode", "tasks", "temporal_support"),
    *("name", "head", "layers", "outputpath", "overwrite"),
)
TASK_KEYS = tuple(name for name in ProbeOptions.model_fields if name not in SHARED)


@dataclass(frozen=True)
class Cell:
    """One probe of the table.

    Attributes:
        task: name of the task.
        row: name of the row.
        probe: what is trained; its baseline is that of the task.
    """

    task: str
    row: str
    probe: Probe


def probe_tasks(given: Mapping[str, Any], seed: int) -> str:
    """Run `run.py probe --tasks`, and return the table.

    Args:
        given: see `probing.options.ProbeOptions`; `model` and `weights` may name several.
        seed: of everything random.

    Raises:
        UserError: with every fault of the options, the tasks and the models, before anything is computed.
    """
    given = {key: value for key, value in given.items() if value is not None}
    faults = Faults(f"the probe of {given['tasks']}")
    tasks = read_tasks(str(given["tasks"]), faults)
    options = _read_shared(given, faults)
    shared = {} if options is None else {key: getattr(options, key) for key in TASK_KEYS if key in given}
    parts = {name: _open_task(name, task, shared, faults) for name, task in tasks.items()}
    sources = [] if options is None else _open_sources(options, given, faults)
    faults.raise_if_any()
    assert options is not None
    cells: list[Cell] = []
    for name, (task_options, clips) in parts.items():
        assert task_options is not None
        assert clips is not None
        cells += _list_cells(name, task_options, clips, sources, options, seed, faults)
    files = Counter(str(cell.probe.target) for cell in cells)
    if repeated := [file for file, count in files.items() if count > 1]:
        faults.add(f"several models would write {some(repeated)}: give each once, from folders of different names")
    with faults.noted():
        _check_table(Path(options.outputpath) / options.name, cells, options.overwrite)
    faults.raise_if_any()
    baselines = _run(cells)
    return _write(Path(options.outputpath) / options.name, cells, baselines)


def read_tasks(path: str, faults: Faults) -> dict[str, dict[str, Any]]:
    """Read a YAML of tasks, name → options in `TASK_KEYS`; its faults are added to `faults`."""
    own = Faults(path)
    tasks = read_settings(path, {}, own) or {}
    if not tasks and not own.sentences:
        own.add("it has no task; expected NAME: {data: PACK.tsv} for each")
    for name, task in tasks.items():
        if not isinstance(task, dict):
            own.add(f"task {shorten(name)}: expected options, such as {{data: PACK.tsv}}, found {shorten(repr(task))}")
            continue
        if fault := describe_unusable_name(name):
            own.add(f"task {shorten(repr(name))}: {fault}")
        for key in task:
            if key not in TASK_KEYS:
                hint = "; it is the same for all tasks: give it as an option" if key in SHARED else ""
                own.add(f"task {name}: unknown key {key!r}{hint or did_you_mean(str(key), TASK_KEYS)}")
    faults.add_all(own)
    return {
        name: {key: value for key, value in task.items() if key in TASK_KEYS}
        for name, task in tasks.items()
        if isinstance(task, dict)
    }


def _read_shared(given: Mapping[str, Any], faults: Faults) -> ProbeOptions | None:
    """Read the options that all tasks share; those of a task may be given as well, for tasks without."""
    models, weights = split_names(given.get("model")), split_names(given.get("weights"))
    if weights and len(weights) != len(models):
        faults.add(
            f"--weights has {len(weights)} values for {len(models)} models: give as many, in order, null for none"
        )
    named = {name: given[name] for name in ("data", "train_data", "valid_data", "test_data") if name in given}
    if named:
        faults.add(f"--{', --'.join(named)}: clips are those of the tasks; drop these options, or --tasks")
    first = dict(given) | {"model": models[0] if models else None, "weights": None}
    return read_options(ProbeOptions, {key: value for key, value in first.items() if key not in named}, faults)


def split_names(given: Any) -> list[str | None]:
    """Return the models or weights of an option, A,B, or None for null."""
    if given is None:
        return []
    names = given.split(",") if isinstance(given, str) else given if isinstance(given, list | tuple) else [given]
    return [None if str(name).strip() in ("null", "None") else str(name).strip() for name in names]


def _open_task(
    name: str, task: Mapping[str, Any], shared: Mapping[str, Any], faults: Faults
) -> tuple[ProbeOptions | None, ProbeSet | None]:
    """Read the options of a task and open its clips; its faults are added to `faults`.

    Args:
        name: of the task.
        task: its own options.
        shared: those in `TASK_KEYS` that were given for all tasks.
        faults: of the command.
    """
    own = Faults(f"task {name}")
    replaced = {"model": "none", "name": "task", "head": ["mlp"]}  # in every cell
    options = read_options(ProbeOptions, dict(shared) | dict(task) | replaced, own)
    clips = None if options is None else open_clips(options, own)
    faults.add_all(own)
    return options, clips


def _open_sources(options: ProbeOptions, given: Mapping[str, Any], faults: Faults) -> list[EmbeddingSource]:
    """Open every model, or the stores; before a download, which may take long, other faults are reported."""
    sources = []
    names = split_names(given.get("model")) or [None]
    weights_of = dict(enumerate(split_names(given.get("weights"))))
    for number, name in enumerate(names):
        weights = weights_of.get(number)
        one = options.model_copy(update={"model": name, "weights": weights})
        if faults.sentences and needs_download(weights or name):
            continue
        with faults.noted():
            source = open_source(one, faults)
            sources += [] if source is None else [source]
    return sources


def _list_cells(
    task: str,
    task_options: ProbeOptions,
    clips: ProbeSet,
    sources: list[EmbeddingSource],
    options: ProbeOptions,
    seed: int,
    faults: Faults,
) -> Iterable[Cell]:
    """Yield the probes of a task; their faults are added to `faults`."""
    own = {name: getattr(task_options, name) for name in TASK_KEYS}
    folder = str(Path(options.outputpath) / options.name)
    for source in sources:
        for head in options.head:
            for choice in ["last"] if head == "prototypes" else options.layer_choices:
                words = [source.name] * (len(sources) > 1) + [head, choice]
                file = "-".join(re.sub(r"[^\w.,]+", "_", word) for word in [task, *words])
                layers = [choice] if choice in ("last", "all") else [int(layer) for layer in choice.split(",")]
                update = own | {"model": source.name, "head": [head], "layers": layers, "tasks": None}
                update |= {"name": file, "outputpath": folder}
                probed = Faults(f"task {task}")
                with probed.noted():
                    yield Cell(
                        task, " ".join(words), check_probe(options.model_copy(update=update), clips, source, seed)
                    )
                faults.add_all(probed)


def _check_table(folder: Path, cells: list[Cell], overwrite: bool) -> None:
    """Refuse to replace a table by one that lacks some of its probes.

    Raises:
        UserError: there is one.
    """
    path = folder / "probes.json"
    if overwrite or not path.exists():
        return
    lost = {str(entry["file"]) for entry in load_json(path)["probes"]} - {str(cell.probe.target) for cell in cells}
    if lost:
        raise UserError(
            f"{path} is of {len(lost)} other probes as well: {some(sorted(lost))}; add their models, heads and tasks, "
            "choose another --name, or replace the table with --overwrite true"
        )


def _run(cells: list[Cell]) -> dict[str, float | None]:
    """Run the probes that are not there yet; return the baseline of each task."""
    baselines: dict[str, float | None] = {}
    for number, cell in enumerate(cells, 1):
        where = f"{number} of {len(cells)}: {cell.task}, {cell.row}"
        checked = cell.probe
        if cell.task not in baselines:
            baselines[cell.task] = _find_baseline([other for other in cells if other.task == cell.task])
        if checked.is_done:
            logger.info("%s: is there already", where)
            continue
        logger.info("%s", where)
        run_probe(checked, baselines[cell.task])
    return baselines


def _find_baseline(cells: list[Cell]) -> float | None:
    """Return the baseline of a task, of a probe that is there or computed; None without one."""
    for cell in cells:
        if cell.probe.is_done and (value := load_json(cell.probe.record_path).get("baseline")) is not None:
            return float(value)
    first = cells[0].probe
    return fit_baselines(first.clips) if first.options.baseline else None


def _write(folder: Path, cells: list[Cell], baselines: Mapping[str, float | None]) -> str:
    """Write table, picture and figures of all probes; return the table and what was written."""
    records = {(cell.row, cell.task): load_json(cell.probe.record_path) for cell in cells}
    tasks, names = list(dict.fromkeys(cell.task for cell in cells)), list(dict.fromkeys(cell.row for cell in cells))
    rows = [
        Row(
            name,
            {task: [100 * records[name, task]["value"]] for task in tasks},
            {task: tuple(100 * bound for bound in records[name, task]["interval"]) for task in tasks},
        )
        for name in names
    ]
    chance = Row("chance", {task: [100 * records[names[0], task]["chance"]] for task in tasks})
    baseline = Row(
        "baseline", {task: [100 * value for value in [baselines[task]] if value is not None] for task in tasks}
    )
    references = [*([baseline] if any(baseline.values.values()) else []), chance]
    text = write_comparison(folder, rows, references)
    metrics = {task: records[names[0], task]["metric"] for task in tasks}
    keys = ("value", "interval", "chance", "baseline", "n_train", "layer_weights")
    entries = [
        {"task": cell.task, "row": cell.row, "file": str(cell.probe.target), "metric": metrics[cell.task]}
        | {key: record[key] for key in keys if key in (record := records[cell.row, cell.task])}
        for cell in cells
    ]
    write_json(folder / "probes.json", {"tasks": metrics, "probes": entries, "baselines": dict(baselines)})
    figures = ", ".join(f"{metric} of {task}" for task, metric in metrics.items())
    return "\n".join([text, "", f"in percent: {figures}", f"written: {folder / 'probes.md'}, probes.json, probes.png"])
