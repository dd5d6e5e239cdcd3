"""A session over a folder: what is left to do, progress, every output, and what could not be read."""

import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from common.errors import UserError
from common.files import sha256
from tagging.embeddings import Embeddings
from tagging.engines import Engine
from tagging.events import merge_events
from tagging.files import TaggedWindow, Wanted, create_windows, embedding_engine, tag_files
from tagging.outputs import check_form, check_ours, open_output, remove_output
from tagging.parts import ALONE, Output, Share, let_go, take
from tagging.pictures import Pictures
from tagging.rows import as_text, describe_warnings, has_lost_sound


@dataclass(frozen=True)
class Session:
    """How files are tagged.

    Attributes:
        engine: computes.
        wanted: what to keep of a window; with a threshold, neighbouring windows become events.
        chunk_seconds: length of a window.
        hop_seconds: from one window's start to the next; `chunk_seconds` when None.
        batch_size: windows a batch.
        n_decoders: threads that decode.
        share: this process's part of the work.
    """

    engine: Engine
    wanted: Wanted
    chunk_seconds: float = 10.0
    hop_seconds: float | None = None
    batch_size: int = 8
    n_decoders: int = 2
    share: Share = ALONE

    def check(self) -> None:
        """Check, before anything is removed or opened, that the engine can do what is wanted.

        Raises:
            UserError: it cannot.
        """
        create_windows(self.engine, self.chunk_seconds, self.hop_seconds)
        if self.wanted.embeddings:
            embedding_engine(self.engine)

    def made_with(self, source: str, weights: str | None, token_merging: Any = None) -> dict[str, Any]:
        """Say what tags are made with: what must be the same where they are added to.

        Args:
            source: the model, as it was given.
            weights: where they came from, if not with the model.
            token_merging: as it was given.
        """
        files = {name: Path(name) for name in (source, weights) if name and Path(name).exists()}
        return {
            "model": source,
            "weights": weights,
            "token_merging": token_merging,
            "files": {name: _fingerprint(path) for name, path in files.items()},
            "labels": hashlib.sha256("\n".join(self.engine.labels).encode()).hexdigest()[:16],
            "chunk_length": self.chunk_seconds,
            "hop": self.hop_seconds or self.chunk_seconds,
            "topk": self.wanted.top_k,
            "threshold": self.wanted.threshold,
        }

    def run(self, paths: list[Path], outputs: list[Output], quiet: bool = False) -> bool:
        """Tag this process's share of the files and write what is asked for.

        Args:
            paths: all files, of all processes.
            outputs: what to write; a file that all of them hold is not tagged again.
            quiet: do not print tags.

        Returns:
            Whether all went well; False where files could not be read, or have lost sound (truncated, damaged). Of
            several processes, the last one tells.
        """
        mine = paths[self.share.rank :: self.share.world_size]
        left = [path for path in mine if not outputs or any(str(path) not in output.done for output in outputs)]
        if len(left) < len(mine):
            print(f"{len(mine) - len(left)} of {len(mine)} files are done already", file=sys.stderr)
        warnings: dict[str, str] = {}
        faults: dict[str, str] = {}
        with _flushed(outputs), _Progress(len(left)) as progress:
            files = tag_files(
                self.engine,
                left,
                self.wanted,
                chunk_seconds=self.chunk_seconds,
                hop_seconds=self.hop_seconds,
                batch_size=self.batch_size,
                n_decoders=self.n_decoders,
                on_window=progress.count if self.hop_seconds is None else progress.count_overlapping(self.hop_seconds),
            )
            for file in files:
                if file.fault is not None:
                    faults[str(file.path)] = file.fault
                elif file.warnings:
                    warnings[str(file.path)] = describe_warnings(file.warnings) or ""
                shown = file if self.wanted.threshold is None else replace(file, windows=merge_events(file.windows))
                for output in outputs:
                    output.write(file if isinstance(output, Embeddings) else shown)
                if not quiet and file.fault is None:
                    progress.write("\n".join([as_text(str(file.path)), *lines(shown.windows)]))
                progress.update()
        closed = [output.close(paths) for output in outputs]
        is_last = all(closed[-1:])  # who is last there finds all others through with everything, and knows their faults
        for output in outputs:
            faults |= output.faults
            warnings |= output.warnings
        _tell(warnings, f"{len(warnings)} of {len(paths)} files are odd")
        _tell(faults, f"{len(faults)} of {len(paths)} files could not be read")
        return not (faults or any(map(has_lost_sound, warnings.values()))) or not is_last


def open_outputs(
    paths: list[Path],
    made_with: Mapping[str, Any],
    share: Share,
    *,
    output: Path | None = None,
    kind: str | None = None,
    embeddings: Path | None = None,
    plot: Path | None = None,
    overwrite: bool = False,
) -> list[Output]:
    """Open all that is to be written.

    Args:
        paths: all files, of all processes.
        made_with: see `Session.made_with`.
        share: this process's part of the work.
        output: a file of rows, or a folder of label tracks.
        kind: form of `output`, see `tagging.outputs.open_output`.
        embeddings: an HDF5 file.
        plot: a folder of pictures.
        overwrite: begin anew.

    Raises:
        UserError: something there was made otherwise, or another process is writing it.
    """
    if output is not None:
        check_form(output, kind)
    if share.world_size > 1 and output is None and embeddings is None and plot is None:
        raise UserError("several processes would print at once: give --output, where they put together what they tag")
    if overwrite and share.world_size > 1:
        raise UserError("--overwrite with several processes would remove what the others write: remove it beforehand")
    targets = [path for path in (output, embeddings, plot) if path is not None]
    outputs: list[Output] = []
    try:
        for path in targets:
            take(path, share)
        for path in targets if overwrite else []:
            check_ours(path)
        for path in targets if overwrite else []:
            remove_output(path)
        if output is not None:
            outputs.append(open_output(output, kind, paths, made_with, share))
        if embeddings is not None:
            outputs.append(Embeddings(embeddings, made_with, share))
        if plot is not None:
            outputs.append(Pictures(plot, paths, made_with, share))
    except BaseException:
        for path in targets:
            let_go(path)
        raise
    return outputs


@contextmanager
def _flushed(outputs: list[Output]) -> Iterator[None]:
    """Lose nothing that is through, however this ends."""
    try:
        yield
    finally:
        for output in outputs:
            output.flush()


def lines(windows: list[TaggedWindow]) -> list[str]:
    """Lay tags out as text, a line a window."""
    told = []
    for window in windows:
        tags = ", ".join(f"{label} {probability:.3f}" for label, probability in window.tags)
        told.append(f"  [{window.start:6.1f} - {window.end:6.1f} s]  {tags}".rstrip())
    return told


class _Progress:
    """A bar over files that also moves within a long one: hours done, and how much faster than real time."""

    def __init__(self, n_files: int) -> None:
        interval = 0.2 if sys.stderr.isatty() else 10.0  # seconds; a log wants fewer lines than a screen
        # miniters: else it waits for whole files
        self.bar = tqdm(total=n_files, unit="file", file=sys.stderr, miniters=0, mininterval=interval)
        self.began = time.perf_counter()
        self.seconds = 0.0

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *unused: object) -> None:
        self.bar.close()

    def count(self, seconds: float) -> None:
        """So much more was tagged; one call at a time."""
        self.seconds += seconds
        speed = self.seconds / (time.perf_counter() - self.began)
        self.bar.set_postfix_str(f"{self.seconds / 3600:.2f} h, {speed:.0f} x real time", refresh=False)
        self.bar.update(0)

    def count_overlapping(self, hop: float) -> Callable[[float], None]:
        """As `count`, for windows that lie `hop` seconds apart."""
        return lambda seconds: self.count(min(seconds, hop))

    def update(self) -> None:
        """One more file is through."""
        self.bar.update()

    def write(self, text: str) -> None:
        """Print above the bar."""
        self.bar.write(text, file=sys.stdout)


def _fingerprint(path: Path) -> str:
    """Of a file's bytes; of a folder, of the sizes and times of the weights in it."""
    if path.is_file():
        return sha256(path)[:16]
    inside = [
        (file.name, file.stat().st_size, file.stat().st_mtime_ns)
        for file in sorted(path.iterdir())
        if file.suffix in (".pt", ".safetensors")
    ]
    return hashlib.sha256(json.dumps(inside).encode()).hexdigest()[:16]


def _tell(files: dict[str, str], headline: str) -> None:
    if files:
        print(
            "\n".join([f"{headline}:", *(f"  {as_text(name)}: {reason}" for name, reason in files.items())]),
            file=sys.stderr,
        )
