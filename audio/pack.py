"""Pack a list of sound files into HDF5 shards, a manifest and a report.

Worker processes decode; one process writes, in the order of the list. Only a window of clips is in memory at a time.
All files appear together at the end, or none does. A start that was stopped is continued by the next one, from the last
shard that was finished; see `audio.pack_progress`.
"""

import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pandas as pd
from tqdm import tqdm

from audio.clips import Clip, load_clip, load_clips
from audio.limits import DEFAULT_LIMITS, SoundLimits
from audio.manifest import name_fault, normalise, resolve
from audio.pack_progress import PackProgress, complete_publishing, get_progress_folder, lock_pack
from audio.pack_report import Report
from audio.shard_writer import ShardWriter
from common.errors import UserError, some
from common.files import whole_file, write_json
from common.interrupts import note_when_stopped

logger = logging.getLogger(__name__)

PUBLISHED = "published"  # the clips layout with base names as keys, the only one that CED's own tools read
PUBLISHED_RATE = 16000  # Hz, which these tools assume


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
    limits: SoundLimits = DEFAULT_LIMITS,
    add_duration: bool = False,
    hdf5_folder: str = "hdf5",
    index_folder: str = "labels",
    progress: bool = True,
    left_out: Sequence[tuple[str, str]] = (),
) -> Report:
    """Pack the clips of a list into `output/hdf5/NAME_0.h5` ..., `output/labels/NAME.tsv` and `NAME.report.json`.

    Args:
        table: the list, see `read_manifest`; `filename` is the column of sound files.
        list_path: path of the list: relative names are searched in its folder first.
        output: folder to write to; becomes part of the column `hdf5path` as it is given.
        name: of the pack.
        sample_rate: of the pack in Hz; every clip is resampled to it.
        layout: of the shards, "flat" or "clips"; or "published": clips under their base names, without folders.
        fullname: keep names as listed in the published layout, as CED's own script does with --fullname.
        stereo: keep two channels (clips layout only).
        size_per_file: clips a shard.
        n_workers: decoding processes; 0 decodes in this one.
        limits: of a sound file, and of what a clip takes in memory.
        add_duration: add a column `duration` in seconds.
        left_out: rows of the list that are not in `table`, with their faults, for the report.
        hdf5_folder: folder of the shards in `output`.
        index_folder: folder of the manifest in `output`.
        progress: show a progress bar.

    Returns:
        The result of every row. A clip that cannot be read is left out and listed.

    Raises:
        UserError: arguments are not valid, another process is making this pack, nothing could be packed, or the disk is
            full; an earlier pack of this name is then unchanged.
    """
    output = Path(output)
    manifest = output / index_folder / f"{name}.tsv"
    _check_arguments(list_path, manifest, sample_rate, layout, stereo, size_per_file, n_workers)
    report = Report(sample_rate, len(table) + len(left_out))
    report.left_out["unreadable"] += left_out
    rows = _select_rows(table, report)
    names = [str(table["filename"].iat[row]) for row in rows]
    keys = _use_base_names(names, list_path) if layout == PUBLISHED and not fullname else names
    paths = [resolve(clip_name, list_path) for clip_name in names]
    load = partial(load_clip, sample_rate=sample_rate, stereo=stereo, limits=limits, isolated=n_workers > 0)
    settings = {"sample_rate": sample_rate, "layout": layout, "stereo": stereo, "size_per_file": size_per_file}
    settings |= {"fullname": fullname, "limits": vars(limits), **_hash_list(list_path, table)}
    with lock_pack(output / hdf5_folder, name):
        complete_publishing(manifest, get_progress_folder(output / hdf5_folder, name))
        packing = PackProgress(output / hdf5_folder, name, settings, paths)
        first = packing.n_done
        if first:
            report = packing.finished[-1].report
            logger.warning("%s: continued after %d of %d clips", name, first, len(rows))
        clips = load_clips(paths[first:], load, min(n_workers, len(paths)))
        clips = tqdm(clips, desc=name, unit="clip", total=len(rows), initial=first, disable=not progress)
        decoded = zip(rows[first:], names[first:], keys[first:], clips, strict=True)
        try:
            _write_shards(packing, decoded, report, sample_rate, layout, size_per_file)
        except BaseException as error:
            error.add_note(_describe_kept(packing, len(rows)))
            if not packing.finished:
                packing.remove()
            raise
        lengths = {row: n for shard in packing.finished for row, n in shard.lengths.items()}
        if not lengths:
            packing.remove()
            raise UserError(_describe_failure(list_path, report))
        packed = table.iloc[list(lengths)].drop(columns="hdf5path", errors="ignore").assign(hdf5path="")
        if add_duration:
            packed["duration"] = [f"{n_samples / sample_rate:.6g}" for n_samples in lengths.values()]
        _publish(packing, manifest, packed, report, size_per_file)
    return report


def _hash_list(list_path: str | Path, table: pd.DataFrame) -> dict[str, str]:
    """Return the SHA-256 of a list's path, which need not be UTF-8, and of its rows."""
    rows = table.to_csv(index=False).encode("utf-8", "surrogateescape")
    contents = {"list": os.fsencode(Path(list_path).absolute()), "clips": rows}
    return {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}


def _describe_kept(packing: PackProgress, n_clips: int) -> str:
    """Return what is kept of a pack that is not finished."""
    if packing.finished:
        kept = f"{packing.n_done} of {n_clips} clips are kept in {packing.folder}"
        return f"{kept}, and the same command goes on behind them"
    return "nothing is kept, since no shard was finished (--size_per_file makes shards smaller)"


def _publish(packing: PackProgress, manifest: Path, packed: pd.DataFrame, report: Report, size_per_file: int) -> None:
    """Put the finished shards in their places, and write the manifest and the report."""
    report_path = manifest.with_suffix(".report.json")
    report.files = [str(packing.final_path(number)) for number in range(len(packing.finished))]
    report.files += [str(manifest), str(report_path)]
    with note_when_stopped("all clips are packed, and the same command puts the shards in their places"):
        packing.publish(partial(_write_manifest, manifest, packed, size_per_file))
        write_json(report_path, report.as_json())
        packing.remove()


def _write_manifest(manifest: Path, packed: pd.DataFrame, size_per_file: int, shards: Sequence[Path]) -> None:
    """Write the manifest, which names the shard of each clip."""
    packed["hdf5path"] = [str(shards[i // size_per_file]) for i in range(len(packed))]
    with whole_file(manifest) as file:
        packed.to_csv(file, sep="\t", index=False)


def _write_shards(
    packing: PackProgress,
    clips: Iterator[tuple[int, str, str, Clip]],
    report: Report,
    sample_rate: int,
    layout: str,
    size: int,
) -> None:
    """Write and record shards of `size` clips; clips are given as row, name, key and content."""
    layout = "clips" if layout == PUBLISHED else layout
    lengths: dict[int, int] = {}
    position = n_before = packing.n_done
    with ExitStack() as stack:
        shard: ShardWriter | None = None  # opened for its first clip, since all others may be unreadable
        for position, (row, name, key, clip) in enumerate(clips, n_before + 1):
            if shard is None and clip.samples is not None:
                shard = stack.enter_context(ShardWriter(packing.next_path, sample_rate, layout))
            n_samples = _add_clip(shard, key, clip, name, report)
            if n_samples is not None:
                lengths[row] = n_samples
            if len(lengths) == size:
                stack.close()  # finishes the shard
                packing.record(position, lengths, report)
                shard, lengths = None, {}
    if lengths:
        packing.record(position, lengths, report)


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
            f"found sample_rate {sample_rate}, size_per_file {size_per_file}, n_workers {n_workers}; expected the "
            "first two above 0 and the last at least 0"
        )
    if layout == PUBLISHED and sample_rate != PUBLISHED_RATE:
        raise UserError(
            f"--layout {PUBLISHED} is for CED's own tools, which assume {PUBLISHED_RATE} Hz; found --sample_rate "
            f"{sample_rate}: remove it, or choose another layout"
        )
    if stereo and layout == "flat":
        raise UserError("two channels are supported by the clips layout only: add --layout clips, or remove --stereo")
    if manifest.resolve() == Path(list_path).resolve():
        raise UserError(
            f"{list_path}: the packed manifest would replace the list itself; choose another folder or --name"
        )


def _select_rows(table: pd.DataFrame, report: Report) -> list[int]:
    """Return the indices of rows to decode, without those that have no valid name or an earlier row's."""
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


def _use_base_names(names: Sequence[str], list_path: str | Path) -> list[str]:
    """Return the base names of clips.

    Raises:
        UserError: several clips have the same.
    """
    by_base: dict[str, list[str]] = {}
    for name in names:
        by_base.setdefault(Path(name).name, []).append(name)
    twice = [" and ".join(paths[:2]) for paths in by_base.values() if len(paths) > 1]
    if twice:
        raise UserError(
            f"{list_path}: --layout {PUBLISHED} stores clips under their base names, which several share: "
            f"{some(twice)}; rename these files, or choose --layout clips or flat, which keep folders"
        )
    return [Path(name).name for name in names]


def _add_clip(shard: ShardWriter | None, key: str, clip: Clip, name: str, report: Report) -> int | None:
    """Write a clip and its result; returns its number of samples, None where it is left out."""
    if clip.samples is None or shard is None:
        report.left_out[clip.fault].append((name, clip.reason))
        return None
    try:
        shard.append(key, clip.samples)
    except ValueError as error:
        reason = f"the name cannot be stored beside the others in the clips layout ({error})"
        report.left_out["duplicate"].append((name, reason))
        return None
    n_samples = clip.samples.shape[-1]
    report.n_packed += 1
    report.n_samples += n_samples
    report.source_rates[clip.source_rate] += 1
    for note, holds in (("silent", clip.silent), ("clipped", clip.clipped)):
        if holds:
            report.noted[note].append(name)
    for kind, text in clip.warnings.items():
        report.noted[kind].append(name)
        report.warnings.append((name, kind, text))
    return n_samples


def _describe_failure(list_path: str | Path, report: Report) -> str:
    faults = [f"{name}: {reason}" for rows in report.left_out.values() for name, reason in rows]
    folder = Path(list_path).parent.resolve()
    return (
        f"{list_path}: none of its {report.n_listed} clips could be packed, so nothing was written. The first: "
        f"{'; '.join(faults[:3])}. Relative names are searched in {folder}, then in the working directory "
        f"{Path.cwd()}"
    )
