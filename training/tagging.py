"""Tag sound files of any format and length: decode beside the model, batch chunks across files, keep the best."""

import csv
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch

from audio.dataset import pad_batch
from audio.io import AudioReadError, read_audio
from common.errors import UserError
from common.files import whole_file
from models.base import AudioTagger


@dataclass
class TaggedChunk:
    """One chunk of a file: from `start` to `end` seconds, its best labels with their probabilities, best first."""

    start: float
    end: float
    tags: list[tuple[str, float]] = field(default_factory=list)


@dataclass
class TaggedFile:
    """A file with its chunks in order, or the reason why it could not be read."""

    path: Path
    chunks: list[TaggedChunk] = field(default_factory=list)
    fault: str | None = None


def decode_ahead(paths: Iterable[Path], sample_rate: int, n_workers: int) -> Iterator[tuple[Path, torch.Tensor | str]]:
    """Decode files in threads, in order, at most two a thread ahead of the reader.

    Args:
        paths: the files.
        sample_rate: rate wanted in hertz.
        n_workers: threads; decoding and resampling happen outside Python's lock.

    Yields:
        Each path with its waveform (S,), or with the reason why it cannot be read.
    """

    def decode(path: Path) -> torch.Tensor | str:
        try:
            return torch.from_numpy(read_audio(path, sample_rate)[0])
        except AudioReadError as error:
            return error.reason

    rest = iter(paths)
    with ThreadPoolExecutor(n_workers) as pool:
        window: deque[tuple[Path, Future[torch.Tensor | str]]] = deque()
        while True:
            window.extend((path, pool.submit(decode, path)) for path in islice(rest, 2 * n_workers - len(window)))
            if not window:
                return
            path, future = window.popleft()
            yield path, future.result()


def tag_files(
    model: AudioTagger,
    paths: Iterable[Path],
    *,
    chunk_seconds: float = 10.0,
    top_k: int = 3,
    batch_size: int = 16,
    n_workers: int = 2,
    device: str | torch.device = "cpu",
) -> Iterator[TaggedFile]:
    """Tag files chunk by chunk; a batch holds chunks of as many files as it takes to fill it.

    Args:
        model: in evaluation mode, on `device`.
        paths: the files; any format, sample rate and length.
        chunk_seconds: length of a chunk; a file's last one is what remains, however short.
        top_k: labels to keep of each chunk (all of them when the model has fewer).
        batch_size: chunks a batch.
        n_workers: decoding threads.
        device: where the model is.

    Yields:
        One `TaggedFile` a path, in order.

    Raises:
        UserError: a model that gives NaN, see `AudioTagger.predict`.
    """
    size = max(round(chunk_seconds * model.sample_rate), 1)
    unfinished: deque[TaggedFile] = deque()
    batch: list[tuple[TaggedChunk, torch.Tensor]] = []

    def tag(chunks: list[tuple[TaggedChunk, torch.Tensor]]) -> None:
        waveform, lengths = pad_batch([samples for _, samples in chunks])  # (B,S), (B,)
        with torch.inference_mode():
            probabilities = model.predict(waveform.to(device), lengths.to(device)).float().cpu()  # (B,C)
        best = probabilities.topk(min(top_k, probabilities.shape[1]), dim=1)
        for (chunk, _), values, indices in zip(chunks, best.values.tolist(), best.indices.tolist(), strict=True):
            chunk.tags = [(model.labels[index], value) for index, value in zip(indices, values, strict=True)]

    for path, sound in decode_ahead(paths, model.sample_rate, max(n_workers, 1)):
        file = TaggedFile(path)
        unfinished.append(file)
        if isinstance(sound, str):
            file.fault = sound
        else:
            for start in range(0, len(sound), size):
                samples = sound[start : start + size]
                seconds = (start / model.sample_rate, (start + len(samples)) / model.sample_rate)
                file.chunks.append(TaggedChunk(*seconds))
                batch.append((file.chunks[-1], samples))
                if len(batch) == batch_size:
                    tag(batch)
                    batch = []
        while unfinished and all(chunk.tags for chunk in unfinished[0].chunks):
            yield unfinished.popleft()
    if batch:
        tag(batch)
    yield from unfinished


@contextmanager
def tag_writer(target: Path | None) -> Iterator[Callable[[TaggedFile], None]]:
    """Give a function that writes files' tags to `target`, which is there, whole, when the context ends without error.

    Args:
        target: `.csv` (filename, start, end, label, probability: one row a label, best first within its chunk) or
            `.jsonl` (one line a chunk, with its list of tags); None writes nothing.

    Raises:
        UserError: another extension.
    """
    if target is None:
        yield lambda file: None
        return
    extension = target.suffix.lower()
    if extension not in (".csv", ".jsonl"):
        raise UserError(f"--output {target}: the name must end in .csv or .jsonl")
    with (
        whole_file(target) as partial,
        open(partial, "w", newline="", encoding="utf-8", errors="surrogateescape") as stream,
    ):
        rows = csv.writer(stream, lineterminator="\n")
        if extension == ".csv":
            rows.writerow(["filename", "start", "end", "label", "probability"])

        def write(file: TaggedFile) -> None:
            for chunk in file.chunks:
                start, end = round(chunk.start, 4), round(chunk.end, 4)
                if extension == ".csv":
                    rows.writerows([file.path, start, end, label, f"{value:.6f}"] for label, value in chunk.tags)
                else:
                    tags = [{"label": label, "probability": round(value, 6)} for label, value in chunk.tags]
                    line = {"filename": str(file.path), "start": start, "end": end, "tags": tags}
                    stream.write(json.dumps(line, ensure_ascii=False) + "\n")

        yield write
