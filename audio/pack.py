"""Packing: a list of sound files becomes HDF5 shards, a manifest that names them, and a report.

Worker processes decode; one process writes, in the order of the list. Only a window of clips is in memory at a time.
All files appear together at the end, or none does.
"""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from audio.io import AudioReadError, decode, to_int16
from audio.manifest import name_fault, normalise, resolve
from audio.pack_report import Report
from audio.shards import LAYOUTS, ShardWriter
from common.errors import UserError, some
from common.files import whole_file, write_json

PUBLISHED = "published"  # the clips layout with base names for keys, which is all that CED's own tools read
PACK_LAYOUTS = (*LAYOUTS, PUBLISHED)
PUBLISHED_RATE = 16000  # Hz, which these tools take every pack for

_CLIPS_IN_FLIGHT = 8  # for each worker
_CLIPPED_RUN = 3  # neighbours at full scale
_CLIPPED_PEAK = 1.01  # 0.1 dB above full scale: a resampled peak may pass it by less


@dataclass(frozen=True)
class Clip:
    """A decoded clip, or why there is none.

    Attributes:
        samples: int16 (S,), or (2, S) in stereo; None when the file cannot be packed.
        fault: "unreadable", "empty", "nan", or "" when it can.
        reason: the fault in words.
        source_rate: of the file, in Hz.
        silent: every sample is zero.
        clipped: the sound passes full scale, or stays at it.
        warnings: what else is odd about the file, see `audio.io.AudioBlocks`.
    """

    samples: np.ndarray | None = None
    fault: str = ""
    reason: str = ""
    source_rate: int = 0
    silent: bool = False
    clipped: bool = False
    warnings: dict[str, str] = field(default_factory=dict)


def load_clip(path: str | Path, sample_rate: int, stereo: bool = False) -> Clip:
    """Decode one file for packing; a fault of the file is part of the answer, never an exception."""
    try:
        decoded = decode(path, sample_rate, mix_down=not stereo)
    except AudioReadError as error:
        return Clip(fault=error.kind, reason=error.reason)
    except Exception as error:  # whatever one file does, the others are packed
        return Clip(fault="unreadable", reason=f"decoding failed with {type(error).__name__}: {error}")
    waveform = decoded.waveform
    if stereo and waveform.shape[1] != 2:  # one channel to both sides; of more than two, their mean
        waveform = waveform.mean(axis=1, keepdims=True).repeat(2, axis=1)
    samples = to_int16(waveform)  # (S,) or (S, 2)
    return Clip(
        samples=np.ascontiguousarray(samples.T),
        source_rate=decoded.source_rate,
        silent=not samples.any(),
        clipped=_is_clipped(waveform, samples),
        warnings=decoded.warnings,
    )


def _is_clipped(waveform: np.ndarray, samples: np.ndarray) -> bool:
    """Whether the sound passes full scale by more than resampling makes it, or stays at it; a lone peak is fine."""
    if np.abs(waveform).max() > _CLIPPED_PEAK:
        return True
    full = (samples >= 32767) | (samples <= -32767)
    if np.count_nonzero(full) < _CLIPPED_RUN:
        return False
    run = full[: 1 - _CLIPPED_RUN or None]
    for shift in range(1, _CLIPPED_RUN):
        run = run[: len(full) - _CLIPPED_RUN + 1] & full[shift : len(full) - _CLIPPED_RUN + 1 + shift]
    return bool(run.any())


def load_clips(paths: Sequence[Path], load: Callable[[Path], Clip], n_workers: int) -> Iterator[Clip]:
    """Yield `load(path)` for each path, in order, computed by worker processes a window ahead.

    A file that brings its worker process down is reported as unreadable, and a new set of workers goes on behind it.

    Args:
        paths: sound files.
        load: what each worker does; it must be picklable.
        n_workers: processes; with 0 this one does the work itself.
    """
    if n_workers == 0:
        yield from map(load, paths)
        return
    position = 0
    while position < len(paths):
        with _workers(n_workers) as pool:
            try:
                for clip in _in_window(pool, load, paths[position:], n_workers * _CLIPS_IN_FLIGHT):
                    yield clip
                    position += 1
            except BrokenProcessPool:
                # Any file of the window may be the culprit: the next one in order is tried with a worker to itself.
                yield _load_alone(load, paths[position])
                position += 1


def _workers(n: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(n, initializer=_start_worker)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that writes: it stops the others
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)  # killed before it could stop its workers, which would wait for work for ever


def _in_window(
    pool: ProcessPoolExecutor, load: Callable[[Path], Clip], paths: Sequence[Path], window: int
) -> Iterator[Clip]:
    waiting: deque[Future[Clip]] = deque()
    try:
        for path in paths:
            waiting.append(pool.submit(load, path))
            if len(waiting) >= window:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def _load_alone(load: Callable[[Path], Clip], path: Path) -> Clip:
    with _workers(1) as pool:
        try:
            return pool.submit(load, path).result()
        except BrokenProcessPool:
            return Clip(fault="unreadable", reason="the decoder crashed or ran out of memory")


def pack(
    table: pd.DataFrame,
    list_path: str | Path,
    output: str | Path,
    name: str,
    *,
    sample_rate: int = 16000,
    layout: str = "flat",
    fullname: bool = False,
    stereo: bool = False,
    size_per_file: int = 50_000,
    n_workers: int = 4,
    add_duration: bool = False,
    hdf5_folder: str = "hdf5",
    index_folder: str = "labels",
    progress: bool = True,
) -> Report:
    """Pack the clips of a list into `output/hdf5/NAME_0.h5` ..., `output/labels/NAME.tsv` and `NAME.report.json`.

    Args:
        table: the list, as `read_manifest` gives it; `filename` names the sound files.
        list_path: where the list lies: relative names are looked for beside it first.
        output: folder to write to; as given, it becomes part of the column `hdf5path`.
        name: of the pack.
        sample_rate: of the pack in Hz; every clip is resampled to it.
        layout: of the shards, "flat" or "clips"; or "published": clips under their base names, without folders.
        fullname: in the published layout keep whole names as listed, as CED's own script does with --fullname.
        stereo: keep two channels (clips layout only).
        size_per_file: clips a shard.
        n_workers: decoding processes; 0 decodes in this one.
        add_duration: add a column `duration` in seconds.
        hdf5_folder: folder of the shards in `output`.
        index_folder: folder of the manifest in `output`.
        progress: show a progress bar.

    Returns:
        What became of every row. A clip that cannot be read is left out and listed.

    Raises:
        UserError: arguments that cannot be, or nothing could be packed; then nothing is written.
    """
    output = Path(output)
    manifest = output / index_folder / f"{name}.tsv"
    _check_arguments(list_path, manifest, sample_rate, layout, stereo, size_per_file, n_workers)
    report = Report(sample_rate, len(table))
    rows = _rows_to_pack(table, report)
    is_base = layout == PUBLISHED and not fullname
    if is_base:
        _refuse_equal_base_names([str(table["filename"].iat[row]) for row in rows], list_path)
    paths = [resolve(str(table["filename"].iat[row]), list_path) for row in rows]
    load = partial(load_clip, sample_rate=sample_rate, stereo=stereo)
    clips = load_clips(paths, load, min(n_workers, len(paths)))

    packed_rows: list[int] = []
    shard_paths: list[Path] = []
    seconds: list[float] = []
    with ExitStack() as until_all_are_written:
        writer: ShardWriter | None = None
        for row, clip in zip(
            rows, tqdm(clips, total=len(rows), desc=name, unit="clip", disable=not progress), strict=True
        ):
            clip_name = str(table["filename"].iat[row])
            if clip.samples is None:
                report.left_out[clip.fault].append((clip_name, clip.reason))
                continue
            if writer is None or len(packed_rows) == len(shard_paths) * size_per_file:
                if writer is not None:
                    writer.finish()
                shard_paths.append(output / hdf5_folder / f"{name}_{len(shard_paths)}.h5")
                writer = until_all_are_written.enter_context(
                    ShardWriter(shard_paths[-1], sample_rate, "clips" if layout == PUBLISHED else layout)
                )
            try:
                writer.append(Path(clip_name).name if is_base else clip_name, clip.samples)
            except ValueError as error:
                reason = f"the name cannot stand beside the others in the clips layout ({error})"
                report.left_out["duplicate"].append((clip_name, reason))
                continue
            packed_rows.append(row)
            seconds.append(clip.samples.shape[-1] / sample_rate)
            _note(report, clip_name, clip)
        if not packed_rows:
            raise UserError(_nothing_packed(list_path, report))
    packed = table.iloc[packed_rows].drop(columns="hdf5path", errors="ignore")
    packed["hdf5path"] = [str(shard_paths[i // size_per_file]) for i in range(len(packed))]
    if add_duration:
        packed["duration"] = [f"{value:.6g}" for value in seconds]
    with whole_file(manifest) as partial_file:
        packed.to_csv(partial_file, sep="\t", index=False)
    report_path = manifest.with_suffix(".report.json")
    report.files = [str(path) for path in [*shard_paths, manifest, report_path]]
    write_json(report_path, report.as_json())
    _remove_left_over(output / hdf5_folder, name, len(shard_paths))
    return report


def _check_arguments(
    list_path: str | Path,
    manifest: Path,
    sample_rate: int,
    layout: str,
    stereo: bool,
    size_per_file: int,
    n_workers: int,
) -> None:
    if sample_rate < 1 or size_per_file < 1 or n_workers < 0:
        raise UserError(
            f"found sample_rate {sample_rate}, size_per_file {size_per_file}, n_workers {n_workers}; wanted the first "
            "two above 0 and the last not below"
        )
    if layout == PUBLISHED and sample_rate != PUBLISHED_RATE:
        raise UserError(
            f"--layout {PUBLISHED} is for CED's own tools, which take every pack for {PUBLISHED_RATE} Hz; found "
            f"--sample_rate {sample_rate}: leave it out, or choose another layout"
        )
    if stereo and layout == "flat":
        raise UserError("two channels can be kept in the clips layout only: add --layout clips, or leave --stereo out")
    if manifest.resolve() == Path(list_path).resolve():
        raise UserError(
            f"{list_path}: the packed manifest would replace the list itself; choose another folder or --name"
        )


def _rows_to_pack(table: pd.DataFrame, report: Report) -> list[int]:
    """Return the positions of rows to decode, without those that have no name or one that came before."""
    rows, seen = [], set()
    for row, name in enumerate(table["filename"]):
        if not name:
            report.left_out["unreadable"].append((name, f"row {row + 1} has no filename"))
        elif fault := name_fault(name):
            report.left_out["unreadable"].append((name, fault))
        elif normalise(name) in seen:
            report.left_out["duplicate"].append((name, f"listed again in row {row + 1}; the first was kept"))
        else:
            seen.add(normalise(name))
            rows.append(row)
    return rows


def _refuse_equal_base_names(names: Sequence[str], list_path: str | Path) -> None:
    by_base: dict[str, list[str]] = {}
    for name in names:
        by_base.setdefault(Path(name).name, []).append(name)
    twice = [" and ".join(paths[:2]) for paths in by_base.values() if len(paths) > 1]
    if twice:
        raise UserError(
            f"{list_path}: --layout {PUBLISHED} knows clips by their base names, which several share: {some(twice)}; "
            "rename these files, or choose --layout clips or flat, which keep folders apart"
        )


def _note(report: Report, name: str, clip: Clip) -> None:
    report.n_packed += 1
    report.n_samples += clip.samples.shape[-1] if clip.samples is not None else 0
    report.source_rates[clip.source_rate] += 1
    for note, holds in (("silent", clip.silent), ("clipped", clip.clipped)):
        if holds:
            report.noted[note].append(name)
    for kind, text in clip.warnings.items():
        report.noted[kind].append(name)
        report.warnings.append((name, kind, text))


def _nothing_packed(list_path: str | Path, report: Report) -> str:
    faults = [f"{name}: {reason}" for rows in report.left_out.values() for name, reason in rows]
    beside = Path(list_path).parent.resolve()
    return (
        f"{list_path}: none of its {report.n_listed} clips could be packed, so nothing was written. The first: "
        f"{'; '.join(faults[:3])}. Relative names are looked for in {beside}, then in the working directory "
        f"{Path.cwd()}"
    )


def _remove_left_over(folder: Path, name: str, n_shards: int) -> None:
    """Remove the shards that an earlier, larger pack of this name had beyond the present ones."""
    number = n_shards
    while (old := folder / f"{name}_{number}.h5").exists():
        old.unlink()
        number += 1
