"""Sources of embeddings for `training.store_writer`: a model, any Python function, or a folder of .npz files.

Letters: B batch, S samples, E embedding width, M items (chunks of clips).
"""

import hashlib
import importlib
import inspect
import os
import sys
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn, Protocol

import numpy as np
import torch
from torch import Tensor

from audio.cutting import Chunks
from audio.dataset import Pack
from audio.manifest import NameIndex
from common.errors import Faults, UserError, some
from common.files import sha256
from distill.batch import Batch
from models.ensemble import ComputeSpectrogram
from models.loading import weights_hash
from training.config import SoftTargetConfig
from training.teacher import load_teacher

NPZ_KEY = "embed"  # S-SONDO's
MAX_REPORTED = 3  # files with errors


class Embedder(Protocol):
    """Computes the embeddings of batches of chunks.

    An optional attribute `missing`, bool (M,), marks items without an embedding.
    """

    @property
    def name(self) -> str:
        """Name for the folder of the store."""

    @property
    def sample_rates(self) -> list[int]:
        """Sample rates in hertz at which a batch must have waveforms; empty if no sound is needed."""

    def to(self, device: torch.device) -> Any:
        """Move to a device; return the embedder."""

    def describe(self) -> Any:
        """Return everything that the embeddings depend on, as plain values."""

    def embeddings(self, batch: Batch, spectrogram: ComputeSpectrogram) -> Tensor:
        """Return (B, E), float32.

        Args:
            batch: on the embedder's device.
            spectrogram: computes the augmented input of a model with its front-end; other sources use the waveforms.
        """


class FunctionEmbedder:
    """Any Python callable: waveforms (B, S) float32 in [-1, 1] and lengths (B,) int64 -> embeddings (B, E).

    Args:
        name: `package.module:function`, or `package.module:factory` if arguments are given: the factory is called with
            them and returns the callable.
        arguments: arguments of the factory; None if the name is the callable itself.
        sample_rate: sample rate of its input in hertz.

    Raises:
        UserError: the name cannot be imported or is not callable.
    """

    def __init__(self, name: str, arguments: Mapping[str, Any] | None, sample_rate: int) -> None:
        module, _, attribute = name.partition(":")
        if not module or not attribute:
            raise UserError(f"callable is {name!r}; expected `package.module:function`")
        if os.getcwd() not in sys.path:  # a module beside the user's own files
            sys.path.insert(0, os.getcwd())
        try:
            imported = getattr(importlib.import_module(module), attribute)
            self.function: Callable[[Tensor, Tensor], Any] = imported if arguments is None else imported(**arguments)
        except (ImportError, AttributeError, TypeError) as error:
            raise UserError(
                f"callable {name}: {error}; give `package.module:function` that Python can import"
            ) from None
        if not callable(self.function):
            raise UserError(f"callable {name} is a {type(self.function).__name__}, which is not callable")
        self.full_name, self.arguments = name, None if arguments is None else dict(arguments)
        self.name = attribute
        self.sample_rates = [sample_rate]

    def to(self, device: torch.device) -> "FunctionEmbedder":
        """Move the callable if it is a module; return the embedder."""
        if isinstance(self.function, torch.nn.Module):
            self.function.to(device).eval()
        return self

    def describe(self) -> Any:
        """Return name, arguments, rate, and the SHA-256 of source, weights and files, as far as they are accessible."""
        try:
            source = inspect.getsource(self.function if inspect.isfunction(self.function) else type(self.function))
        except (OSError, TypeError):
            source = ""
        digest = hashlib.sha256(source.encode())
        module = getattr(self.function, "__self__", self.function)  # of a method, the object that it belongs to
        if isinstance(module, torch.nn.Module):
            digest.update(weights_hash(module).encode())
        for value in (self.arguments or {}).values():
            if isinstance(value, str) and Path(value).is_file():
                digest.update(sha256(value).encode())
        facts = {"callable": self.full_name, "arguments": self.arguments, "sample_rate": self.sample_rates[0]}
        return [facts | {"sha256": digest.hexdigest()}]

    @torch.no_grad()
    def embeddings(self, batch: Batch, spectrogram: ComputeSpectrogram) -> Tensor:
        """Return (B, E), float32; masks of spectrograms are not applied."""
        rate = self.sample_rates[0]
        waveform, lengths = batch.waveforms[rate], batch.lengths[rate]
        if lengths is None:
            lengths = torch.full((len(waveform),), waveform.shape[1], device=waveform.device)
        embeddings = torch.as_tensor(self.function(waveform, lengths)).float()
        if embeddings.ndim != 2 or len(embeddings) != len(waveform):
            raise UserError(
                f"callable {self.full_name} returned {tuple(embeddings.shape)} for waveforms {tuple(waveform.shape)}; "
                "expected one embedding a clip, (B, E)"
            )
        return embeddings


class NpzEmbedder:
    """Embeddings in a folder with one `.npz` file a clip, the layout of S-SONDO; no model is needed.

    NAME.npz, anywhere in the folder, is the file of the clip NAME; subfolders are compared only if stems are ambiguous.
    Its array `embed` is (E,), for all chunks of the clip, or (n, E), one row a chunk. If the last chunk, shorter than
    the others, has no row (S-SONDO drops such tails), it is skipped.

    Args:
        folder: folder of the files.
        pack: the clips.
        chunks: their M chunks.

    Raises:
        UserError: the folder does not exist; clips without a file, or with a file that does not fit, all at once.
    """

    sample_rates: list[int] = []  # noqa: RUF012

    def __init__(self, folder: str | Path, pack: Pack, chunks: Chunks) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise UserError(f"npz: {folder} is not a folder; expected one with a .npz file a clip, array {NPZ_KEY!r}")
        self.name = self.folder.resolve().name
        files = sorted(self.folder.rglob("*.npz"))
        index = NameIndex([str(path.relative_to(self.folder)).removesuffix(".npz") for path in files])
        place = index.find_all(pack.names)
        faults = Faults(f"the folder of embeddings {folder}")
        unmatched = [name for name, position in zip(pack.names, place, strict=True) if position < 0]
        if unmatched:
            found = some((str(path.relative_to(self.folder)) for path in files), 3) or "no files"
            faults.add(
                f"{len(unmatched)} of the {len(pack)} clips of {pack.manifest} have no .npz file: "
                f"{some(unmatched)} (found {found}); add the files, or remove these clips from the list"
            )
        self.chunks, self.names = chunks, pack.names
        self.files = [files[position] for position in place]
        self.first = np.searchsorted(chunks.clip, np.arange(len(pack)))  # the first item of each clip
        self.n_chunks = np.bincount(chunks.clip, minlength=len(pack))
        self.missing = np.zeros(len(chunks), bool)
        mismatches = Faults("chunks")
        for clip in np.flatnonzero((self.n_chunks > 1) & (place >= 0)).tolist():
            with mismatches.noted():
                self._check_chunks(clip)
        faults.sentences += mismatches.sentences[:MAX_REPORTED]
        if len(mismatches.sentences) > MAX_REPORTED:
            faults.add(f"and {len(mismatches.sentences) - MAX_REPORTED} more of these")
        faults.raise_if_any()

    def _check_chunks(self, clip: int) -> None:
        """Check which chunks of a long clip have rows."""
        n_rows, n_chunks = len(self._read_file(clip)), int(self.n_chunks[clip])
        last = int(self.first[clip]) + n_chunks - 1
        length, whole = self.chunks.n_samples[[last, last - 1]]
        if n_rows == n_chunks - 1 and n_rows > 1 and length < whole:
            self.missing[last] = True
        elif n_rows not in (1, n_chunks):
            self._raise_mismatch(clip, n_rows)

    def _raise_mismatch(self, clip: int, n_rows: int) -> NoReturn:
        raise UserError(
            f"{self.files[clip]}: {NPZ_KEY!r} has {n_rows} rows, but {self.names[clip]} has {self.n_chunks[clip]} "
            "chunks; expected (E,) for the whole clip or (n, E), a row a chunk: set the chunk_length of these files"
        )

    def to(self, device: torch.device) -> "NpzEmbedder":
        """Return the embedder: there is nothing to move."""
        return self

    def describe(self) -> Any:
        """Return the number of files, and the SHA-256 of their names, sizes and times."""
        digest = hashlib.sha256()
        for path in sorted(set(self.files)):
            facts = path.stat()
            digest.update(f"{path.relative_to(self.folder)} {facts.st_size} {facts.st_mtime_ns}\n".encode())
        return [{"npz": str(self.folder), "files": len(set(self.files)), "sha256": digest.hexdigest()}]

    def embeddings(self, batch: Batch, spectrogram: ComputeSpectrogram) -> Tensor:
        """Return (B, E), float32, of the batch's items."""
        items = batch.item.tolist()
        found = [self._read_item(item) for item in items]
        for item, embedding in zip(items, found, strict=True):
            if len(embedding) != len(found[0]):
                one, other = (self.files[self.chunks.clip[i]] for i in (item, items[0]))
                raise UserError(
                    f"{one}: {NPZ_KEY!r} has width {len(embedding)}, that of {other} {len(found[0])}; expected the "
                    "same width in all files"
                )
        return torch.from_numpy(np.stack(found)).to(batch.item.device)

    def _read_item(self, item: int) -> np.ndarray:
        clip = int(self.chunks.clip[item])
        rows = self._read_file(clip)
        if len(rows) == 1:
            return rows[0]
        chunk = item - int(self.first[clip])
        if chunk >= len(rows) or self.n_chunks[clip] == 1:
            self._raise_mismatch(clip, len(rows))
        return rows[chunk]

    def _read_file(self, clip: int) -> np.ndarray:
        """Read a file: (n, E) float32."""
        path = self.files[clip]
        try:
            with np.load(path, allow_pickle=False) as file:
                found = np.asarray(file[NPZ_KEY], np.float32)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(
                f"{path}: expected an array {NPZ_KEY!r} of numbers ({error}); repair or remove that file"
            ) from None
        if found.ndim not in (1, 2) or not found.size:
            raise UserError(f"{path}: {NPZ_KEY!r} is {found.shape}; expected (E,), or (n, E) with a row a chunk")
        return np.atleast_2d(found)


def open_embedder(config: SoftTargetConfig, pack: Pack) -> Embedder:
    """Open the source of embeddings of a configuration: its `model`, `callable` or `npz`.

    Raises:
        UserError: it cannot be opened.
    """
    chunks = Chunks.cut(pack.n_samples, pack.sample_rate, config.chunk_length, not config.keep_tails)
    if config.npz is not None:
        return NpzEmbedder(config.npz, pack, chunks)
    if config.callable is not None:
        return FunctionEmbedder(config.callable, config.callable_args, config.sample_rate or pack.sample_rate)
    assert config.model is not None
    return load_teacher(config.model, config.weights, config.model_args, same_labels=False)
