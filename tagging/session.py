"""Tag a folder: what remains to be done, progress, all outputs, and the files with faults or warnings."""

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

from audio.limits import DEFAULT_LIMITS, SoundLimits
from common.errors import UserError
from common.files import sha256
from tagging.base import Engine
from tagging.embeddings import EmbeddingFile
from tagging.events import merge_events
from tagging.files import TaggedFile, TaggedWindow, TagOptions, create_windows, require_embeddings, tag_files
from tagging.outputs import check_format, check_removable, open_output, remove_output
from tagging.parts import SINGLE_PROCESS, Output, Share, lock, unlock
from tagging.pictures import Pictures
from tagging.rows import describe_warnings, has_lost_sound, make_printable


@dataclass(frozen=True)
class Session:
    """How files are tagged.

    Attributes:
        engine: computes the probabilities.
        options: what to keep of a window; with a threshold, neighbouring windows become events.
        chunk_seconds: length of a window.
        hop_seconds: from one window's start to the next; `chunk_seconds` when None.
        batch_size: windows a batch; the engine's when None.
        n_decoders: processes that decode.
        share: this process's share of the work.
        limits: of a sound file.
    """

    engine: Engine
    options: TagOptions
    chunk_seconds: float = 10.0
    hop_seconds: float | None = None
    batch_size: int | None = 8
    n_decoders: int = 2
    share: Share = SINGLE_PROCESS
    limits: SoundLimits = DEFAULT_LIMITS

    def check(self) -> None:
        """Check that the engine supports the options, before anything is removed or opened.

        Raises:
            UserError: it does not.
        """
        create_windows(self.engine, self.chunk_seconds, self.hop_seconds)
        if self.options.embeddings:
            require_embeddings(self.engine)

    def get_provenance(
        self, source: str, weights: str | None, token_merging: Any = None, head: str | None = None
    ) -> dict[str, Any]:
        """Return the provenance of tags, which must be the same where tags are added to others.

        Args:
            source: the model, as it was given.
            weights: its weights, as they were given.
            token_merging: as it was given.
            head: as it was given.
        """
        files = {name: Path(name) for name in (source, weights) if name and Path(name).exists()}
        provenance = {
            "model": source,
            "weights": weights,
            "token_merging": token_merging,
            "files": {name: _fingerprint(path) for name, path in files.items()},
            "labels": hashlib.sha256("\n".join(self.engine.labels).encode()).hexdigest()[:16],
            "chunk_length": self.chunk_seconds,
            "hop": self.hop_seconds or self.chunk_seconds,
            "topk": self.options.top_k,
            "threshold": self.options.threshold,
        }
        if head is not None:
            from models.heads import load_head
            from models.loading import weights_hash

            provenance |= {"head": head, "head_sha256": weights_hash(load_head(head))[:16]}
        return provenance

    def run(self, paths: list[Path], outputs: list[Output], quiet: bool = False) -> bool:
        """Tag this process's share of the files and write all outputs.

        Args:
            paths: all files, of all processes.
            outputs: a file that all of them hold is not tagged again.
            quiet: do not print tags; those of an engine without labels are never printed.

        Returns:
            False where files could not be read or have lost sound (truncated, damaged). With several processes only
            the last one returns False: a failed process would make torchrun stop the others.
        """
        mine = paths[self.share.rank :: self.share.world_size]
        remaining = [path for path in mine if not outputs or any(str(path) not in output.done for output in outputs)]
        if len(remaining) < len(mine):
            print(f"{len(mine) - len(remaining)} of {len(mine)} files are done already", file=sys.stderr)
        warnings: dict[str, str] = {}
        faults: dict[str, str] = {}
        with _flush_at_end(outputs), _Progress(len(remaining), self.hop_seconds) as progress:
            for file in self._tag(remaining, progress.count):
                if file.fault is not None:
                    faults[str(file.path)] = file.fault
                elif file.warnings:
                    warnings[str(file.path)] = describe_warnings(file.warnings) or ""
                shown = file if self.options.threshold is None else replace(file, windows=merge_events(file.windows))
                for output in outputs:
                    output.write(file if isinstance(output, EmbeddingFile) else shown)
                if not quiet and self.engine.labels and file.fault is None:
                    progress.write("\n".join(map(make_printable, [str(file.path), *format_windows(shown.windows)])))
                progress.update()
        closed = [output.close(paths) for output in outputs]
        # The last process at the last output: all others have finished every output, so their faults are known.
        is_last = all(closed[-1:])
        for output in outputs:
            faults |= output.faults
            warnings |= output.warnings
        _print_list(warnings, f"{len(warnings)} of {len(paths)} files have warnings")
        _print_list(faults, f"{len(faults)} of {len(paths)} files could not be read")
        return not is_last or not (faults or any(map(has_lost_sound, warnings.values())))

    def _tag(self, paths: list[Path], on_window: Callable[[float], None]) -> Iterator[TaggedFile]:
        return tag_files(
            self.engine,
            paths,
            self.options,
            chunk_seconds=self.chunk_seconds,
            hop_seconds=self.hop_seconds,
            batch_size=self.batch_size or self.engine.batch_size,
            n_decoders=self.n_decoders,
            limits=self.limits,
            on_window=on_window,
        )


def check_labels(engine: Engine, source: str) -> None:
    """Check that a model has classes to tag with.

    Raises:
        UserError: it has none.
    """
    if not engine.labels:
        raise UserError(
            f"{source} embeds sounds and has no classes to tag them with: give --head NAME (`run.py probe` trains "
            "heads), or --embeddings OUT.h5 alone"
        )


def open_outputs(
    paths: list[Path],
    provenance: Mapping[str, Any],
    share: Share,
    *,
    output: Path | None = None,
    output_format: str | None = None,
    embeddings: Path | None = None,
    plot: Path | None = None,
    overwrite: bool = False,
    limits: SoundLimits = DEFAULT_LIMITS,
) -> list[Output]:
    """Open all outputs.

    Args:
        paths: all files, of all processes.
        provenance: see `Session.get_provenance`.
        share: this process's share of the work.
        output: a table of tags, or a folder of label tracks.
        output_format: of `output`, see `tagging.outputs.open_output`.
        embeddings: an HDF5 file.
        plot: a folder of pictures.
        overwrite: remove existing outputs.
        limits: of a sound file, which pictures decode again.

    Raises:
        UserError: an existing output was made with other settings, or is locked by another process.
    """
    if output is not None:
        check_format(output, output_format)
    if share.world_size > 1 and output is None and embeddings is None and plot is None:
        raise UserError("several processes would print at once: give --output, into which they join their tags")
    if overwrite and share.world_size > 1:
        raise UserError("--overwrite with several processes would remove what the others write: remove it beforehand")
    targets = [path for path in (output, embeddings, plot) if path is not None]
    outputs: list[Output] = []
    try:
        for path in targets:
            lock(path, share)
        if overwrite:
            for path in targets:  # all of them, before any is removed
                check_removable(path)
            for path in targets:
                remove_output(path)
        if output is not None:
            outputs.append(open_output(output, output_format, paths, provenance, share))
        if embeddings is not None:
            outputs.append(EmbeddingFile(embeddings, provenance, share))
        if plot is not None:
            outputs.append(Pictures(plot, paths, provenance, share, limits))
    except BaseException:
        for path in targets:
            unlock(path)
        raise
    return outputs


@contextmanager
def _flush_at_end(outputs: list[Output]) -> Iterator[None]:
    """Flush all outputs, also on an error or Ctrl-C."""
    try:
        yield
    finally:
        for output in outputs:
            output.flush()


def format_windows(windows: list[TaggedWindow]) -> list[str]:
    """Format the tags of windows as text, a line a window."""
    lines = []
    for window in windows:
        tags = ", ".join(f"{label} {probability:.3f}" for label, probability in window.tags)
        lines.append(f"  [{window.start:6.1f} - {window.end:6.1f} s]  {tags}".rstrip())
    return lines


class _Progress:
    """A progress bar over files that also moves within a long one: hours done, and the factor to real time.

    Args:
        n_files: number of files.
        hop_seconds: from one window's start to the next; None where windows do not overlap.
    """

    def __init__(self, n_files: int, hop_seconds: float | None) -> None:
        interval = 0.2 if sys.stderr.isatty() else 10.0  # seconds; fewer lines in a log than on a screen
        # miniters=0: by default tqdm adapts it to whole files, and does not refresh between them
        self.bar = tqdm(total=n_files, unit="file", file=sys.stderr, miniters=0, mininterval=interval)
        self.hop_seconds = hop_seconds
        self.start = time.perf_counter()
        self.seconds = 0.0

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *unused: object) -> None:
        self.bar.close()

    def count(self, seconds: float) -> None:
        """Count a tagged window; sound that windows share counts once. Must not be called twice at once."""
        self.seconds += min(seconds, self.hop_seconds or seconds)
        speed = self.seconds / (time.perf_counter() - self.start)
        self.bar.set_postfix_str(f"{self.seconds / 3600:.2f} h, {speed:.0f} x real time", refresh=False)
        self.bar.update(0)

    def update(self) -> None:
        """Count a file."""
        self.bar.update()

    def write(self, text: str) -> None:
        """Print above the bar."""
        self.bar.write(text, file=sys.stdout)


def _fingerprint(path: Path) -> str:
    """Hash a file's bytes; of a folder, the sizes and times of the weights in it."""
    if path.is_file():
        return sha256(path)[:16]
    inside = [
        (file.name, file.stat().st_size, file.stat().st_mtime_ns)
        for file in sorted(path.iterdir())
        if file.suffix in (".pt", ".safetensors")
    ]
    return hashlib.sha256(json.dumps(inside).encode()).hexdigest()[:16]


def _print_list(files: dict[str, str], headline: str) -> None:
    if files:
        lines = [f"{headline}:", *(make_printable(f"  {name}: {reason}") for name, reason in files.items())]
        print("\n".join(lines), file=sys.stderr)
