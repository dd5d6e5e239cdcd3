"""Embeddings of clips from wherever they are to be had: a model of ours, any function, or files that somebody left.

What they have in common is the face `Embedder`, which `training.teaching` asks and stores.

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
MOST_TOLD = 3  # files that do not fit


class Embedder(Protocol):
    """Embeds the chunks of a batch.

    One attribute may be left out: `lacking`, bool (M,), the items that have no embedding.
    """

    @property
    def name(self) -> str:
        """What its store's folder is called."""

    @property
    def sample_rates(self) -> list[int]:
        """Hertz at which a batch must hold waveforms; empty where no sound is needed."""

    def to(self, device: torch.device) -> Any:
        """Move to a device; return the embedder."""

    def describe(self) -> Any:
        """Return what decides its answers, as plain values."""

    def embeddings(self, batch: Batch, spectrogram: ComputeSpectrogram) -> Tensor:
        """Return (B, E), float32.

        Args:
            batch: on the embedder's device.
            spectrogram: the input of a model through its front-end, masks included; others get the waveforms.
        """


class FunctionEmbedder:
    """Any Python callable: waveforms (B, S) float32 in [-1, 1] and lengths (B,) int64 -> embeddings (B, E).

    Args:
        name: `package.module:function`, or `package.module:factory` where arguments are given, which then are the
            factory's and make the callable.
        arguments: of the factory; None where the name is the callable itself.
        sample_rate: of the waveforms that it takes, in hertz.

    Raises:
        UserError: no such module or name, or not to be called.
    """

    def __init__(self, name: str, arguments: Mapping[str, Any] | None, sample_rate: int) -> None:
        module, _, attribute = name.partition(":")
        if not module or not attribute:
            raise UserError(f"callable is {name!r}; wanted `package.module:function`")
        if os.getcwd() not in sys.path:  # a module beside the user's own files
            sys.path.insert(0, os.getcwd())
        try:
            found = getattr(importlib.import_module(module), attribute)
            self.function: Callable[[Tensor, Tensor], Any] = found if arguments is None else found(**arguments)
        except (ImportError, AttributeError, TypeError) as error:
            raise UserError(
                f"callable {name}: {error}; give `package.module:function` that Python can import"
            ) from None
        if not callable(self.function):
            raise UserError(f"callable {name} is a {type(self.function).__name__}, which cannot be called")
        self.full_name, self.arguments = name, None if arguments is None else dict(arguments)
        self.name = attribute
        self.sample_rates = [sample_rate]

    def to(self, device: torch.device) -> "FunctionEmbedder":
        """Move what is a module; return the embedder."""
        if isinstance(self.function, torch.nn.Module):
            self.function.to(device).eval()
        return self

    def describe(self) -> Any:
        """Return name, arguments, rate, and the SHA-256 of source, weights and files, as far as they can be seen."""
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
        """Return (B, E), float32; masks of spectrograms are not for it."""
        rate = self.sample_rates[0]
        waveform, lengths = batch.waveforms[rate], batch.lengths[rate]
        if lengths is None:
            lengths = torch.full((len(waveform),), waveform.shape[1], device=waveform.device)
        found = torch.as_tensor(self.function(waveform, lengths)).float()
        if found.ndim != 2 or len(found) != len(waveform):
            raise UserError(
                f"callable {self.full_name} gave {tuple(found.shape)} for waveforms {tuple(waveform.shape)}; wanted "
                "one embedding a clip, (B, E)"
            )
        return found


class NpzEmbedder:
    """Embeddings that lie in a folder, one `.npz` file a clip, as S-SONDO keeps them; no model is needed.

    NAME.npz, anywhere in the folder, is of the clip NAME; names are matched as everywhere, folders where stems do not
    tell clips apart. Its array `embed` is (E,), which serves all chunks of the clip, or (n, E), one row a chunk. Where
    the last chunk, shorter than the others, has no row, as where S-SONDO drops tails, it is left out.

    Args:
        folder: with the files.
        pack: the clips.
        chunks: M, of these.

    Raises:
        UserError: the folder is not there; clips without a file, or whose file does not fit, told at once.
    """

    sample_rates: list[int] = []  # noqa: RUF012

    def __init__(self, folder: str | Path, pack: Pack, chunks: Chunks) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise UserError(f"npz: {folder} is not a folder; wanted one with a .npz file a clip, array {NPZ_KEY!r}")
        self.name = self.folder.resolve().name
        files = sorted(self.folder.rglob("*.npz"))
        index = NameIndex([str(path.relative_to(self.folder)).removesuffix(".npz") for path in files])
        place = index.find_all(pack.names)
        faults = Faults(f"the folder of embeddings {folder}")
        lacking = [name for name, position in zip(pack.names, place, strict=True) if position < 0]
        if lacking:
            found = some((str(path.relative_to(self.folder)) for path in files), 3) or "none at all"
            faults.add(
                f"{len(lacking)} of the {len(pack)} clips of {pack.manifest} have no .npz file of their own: "
                f"{some(lacking)} (found {found}); add them, or take these clips out of the list"
            )
        self.chunks, self.names = chunks, pack.names
        self.files = [files[position] for position in place]
        self.first = np.searchsorted(chunks.clip, np.arange(len(pack)))  # the first item of each clip
        self.n_chunks = np.bincount(chunks.clip, minlength=len(pack))
        self.lacking = np.zeros(len(chunks), bool)
        misfits = Faults("chunks")
        for clip in np.flatnonzero((self.n_chunks > 1) & (place >= 0)).tolist():
            with misfits.noted():
                self._check_chunks(clip)
        faults.sentences += misfits.sentences[:MOST_TOLD]
        if len(misfits.sentences) > MOST_TOLD:
            faults.add(f"and {len(misfits.sentences) - MOST_TOLD} more like these")
        faults.raise_if_any()

    def _check_chunks(self, clip: int) -> None:
        """See which chunks of a long clip have rows."""
        n_rows, n_chunks = len(self._rows(clip)), int(self.n_chunks[clip])
        last = int(self.first[clip]) + n_chunks - 1
        length, whole = self.chunks.n_samples[[last, last - 1]]
        if n_rows == n_chunks - 1 and n_rows > 1 and length < whole:
            self.lacking[last] = True
        elif n_rows not in (1, n_chunks):
            self._refuse(clip, n_rows)

    def _refuse(self, clip: int, n_rows: int) -> NoReturn:
        raise UserError(
            f"{self.files[clip]}: {NPZ_KEY!r} has {n_rows} rows, but {self.names[clip]} has {self.n_chunks[clip]} "
            "chunks; wanted (E,) for all of it or (n, E), a row a chunk: give the chunk_length that they were made with"
        )

    def to(self, device: torch.device) -> "NpzEmbedder":
        """Stay where it is."""
        return self

    def describe(self) -> Any:
        """Return how many files there are, and the SHA-256 of their names, sizes and times."""
        digest = hashlib.sha256()
        for path in sorted(set(self.files)):
            facts = path.stat()
            digest.update(f"{path.relative_to(self.folder)} {facts.st_size} {facts.st_mtime_ns}\n".encode())
        return [{"npz": str(self.folder), "files": len(set(self.files)), "sha256": digest.hexdigest()}]

    def embeddings(self, batch: Batch, spectrogram: ComputeSpectrogram) -> Tensor:
        """Return (B, E), float32, of the batch's items."""
        items = batch.item.tolist()
        found = [self._of(item) for item in items]
        for item, embedding in zip(items, found, strict=True):
            if len(embedding) != len(found[0]):
                one, other = (self.files[self.chunks.clip[i]] for i in (item, items[0]))
                raise UserError(
                    f"{one}: {NPZ_KEY!r} is {len(embedding)} wide, that of {other} {len(found[0])}; wanted one width "
                    "in all files"
                )
        return torch.from_numpy(np.stack(found)).to(batch.item.device)

    def _of(self, item: int) -> np.ndarray:
        clip = int(self.chunks.clip[item])
        rows = self._rows(clip)
        if len(rows) == 1:
            return rows[0]
        chunk = item - int(self.first[clip])
        if chunk >= len(rows) or self.n_chunks[clip] == 1:
            self._refuse(clip, len(rows))
        return rows[chunk]

    def _rows(self, clip: int) -> np.ndarray:
        """Read a file: (n, E) float32."""
        path = self.files[clip]
        try:
            with np.load(path, allow_pickle=False) as file:
                found = np.asarray(file[NPZ_KEY], np.float32)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(
                f"{path}: wanted an array {NPZ_KEY!r} of numbers, and found none ({error}); mend or remove that file"
            ) from None
        if found.ndim not in (1, 2) or not found.size:
            raise UserError(f"{path}: {NPZ_KEY!r} is {found.shape}; wanted (E,), or (n, E) with a row a chunk")
        return np.atleast_2d(found)


def open_embedder(config: SoftTargetConfig, pack: Pack) -> Embedder:
    """Open what a configuration wants to be asked for embeddings: its `model`, `callable` or `npz`.

    Raises:
        UserError: it cannot be had.
    """
    chunks = Chunks.cut(pack.n_samples, pack.sample_rate, config.chunk_length, not config.keep_tails)
    if config.npz is not None:
        return NpzEmbedder(config.npz, pack, chunks)
    if config.callable is not None:
        return FunctionEmbedder(config.callable, config.callable_args, config.sample_rate or pack.sample_rate)
    assert config.model is not None
    return load_teacher(config.model, config.weights, config.model_args)
