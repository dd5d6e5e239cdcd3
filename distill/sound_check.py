"""Check that a pack has the sounds of a store: a new pack may have other sounds under the same names.

For each chunk, a store has `clip_samples`, the length of its clip in the teacher's pack, and
`sound_hash`, eight bytes of BLAKE2b over the chunk's 16-bit samples there (as a signed integer). A reader
compares all lengths, and the samples of all chunks in a store of up to `ALL_COMPARED`, of
`COMPARED` evenly spread chunks in a larger one, or of all.
"""

import hashlib
import logging
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from tqdm import tqdm

from audio.cutting import Chunks
from audio.dataset import Pack
from common.errors import Faults, some

logger = logging.getLogger(__name__)

Check = Literal["sample", "all", "none"]
COMPARED = 64  # clips or chunks of a larger store or pack
ALL_COMPARED = 5000  # chunks are hashed in a second
_FINGERPRINT_SECONDS = 30  # read of each clip: some last for hours

COLUMNS = ("clip_samples", "sound_hash")


def compute_fingerprint(pack: Pack) -> str:
    """Return a hash of a pack's sounds: the lengths of all clips, and the samples of `COMPARED` of them."""
    digest = hashlib.sha256(np.asarray(pack.n_samples, "<i8").tobytes())
    for clip in _spread_evenly(len(pack), COMPARED).tolist():
        digest.update(
            pack.hash_sound(clip, 0, _FINGERPRINT_SECONDS * pack.sample_rate).to_bytes(8, "little", signed=True)
        )
    return digest.hexdigest()


def check_sounds(
    what: str,
    folder: Path,
    stored_rate: int | None,
    pack: Pack,
    rows: pd.DataFrame,
    chunks: Chunks,
    faults: Faults,
    check: Check = "sample",
) -> None:
    """Add clips of a pack that differ from those of a store to `faults`.

    Args:
        what: contents of the store, for messages.
        folder: of the store.
        stored_rate: of the pack it was made from, in hertz. A pack at another rate has other samples and is not
            compared.
        pack: the clips.
        rows: of the store, those whose clip is in the pack (n).
        chunks: n, of each of them.
        faults: of the pack and the store.
        check: chunks whose samples are compared: `COMPARED` of a large store ("sample"), "all" or "none"; with "none",
            lengths are not compared either.
    """
    if check == "none" or not len(rows):
        return
    if "clip_samples" not in rows and check == "all":
        faults.add(
            f"check_sounds: all compares sounds with their hashes, which {folder} does not have (published, or saved "
            "by an earlier version); save it again, or leave check_sounds out"
        )
        return
    if "clip_samples" not in rows:
        logger.info(
            "%s has no lengths and hashes of its sounds (published, or saved by an earlier version): the "
            "sounds of %s are not compared with them",
            folder, pack.manifest,
        )  # fmt: skip
        return
    if stored_rate != pack.sample_rate:
        return
    differing = _compare_lengths(rows, chunks, pack)
    n_compared, compared = len(np.unique(chunks.clip)), "lengths"
    if not differing and "sound_hash" in rows:
        is_small = len(rows) <= ALL_COMPARED
        chosen = np.arange(len(rows)) if check == "all" or is_small else _spread_evenly(len(rows), COMPARED)
        differing = _compare_samples(rows.iloc[chosen], chunks.select(chosen), pack)
        n_compared, compared = len(np.unique(chunks.clip[chosen])), "samples"
    if differing:
        faults.add(
            f"{pack.manifest} has other sounds than those of the {what} in {folder}, under the same names: "
            f"of {n_compared} clips whose {compared} were compared, {len(differing)} differ: "
            f"{some((f'{name} ({found})' for name, found in differing.items()), 3)}. Save the {what} again (delete the "
            "folder and run save_logits.py), give the pack that they were saved from, or skip this check with "
            "check_sounds: none"
        )


def _compare_lengths(rows: pd.DataFrame, chunks: Chunks, pack: Pack) -> dict[str, str]:
    """Return name → what was found and expected of each clip of another length."""
    found, expected = np.asarray(pack.n_samples)[chunks.clip], rows["clip_samples"].to_numpy(np.int64)
    rate = pack.sample_rate
    return {
        pack.names[chunks.clip[row]]: f"found {found[row] / rate:.3f} s ({found[row]} samples), expected "
        f"{expected[row] / rate:.3f} s ({expected[row]})"
        for row in np.flatnonzero(found != expected)
    }


def _compare_samples(rows: pd.DataFrame, chunks: Chunks, pack: Pack) -> dict[str, str]:
    """Return name → what was found and expected of each clip with another chunk."""
    differing = {}
    expected = rows["sound_hash"].to_numpy(np.int64)
    for row, (clip, start, stop) in enumerate(tqdm(chunks, desc="comparing sounds", disable=len(chunks) <= 10_000)):
        found = pack.hash_sound(clip, start, stop)
        if found != expected[row] and pack.names[clip] not in differing:  # the first of its chunks is named
            second = start / pack.sample_rate
            differing[pack.names[clip]] = (
                f"from {second:g} s on found samples of hash {_hex(found)}, expected {_hex(int(expected[row]))}"
            )
    return differing


def _hex(value: int) -> str:
    return value.to_bytes(8, "big", signed=True).hex()


def _spread_evenly(n: int, limit: int) -> np.ndarray:
    """Return at most `limit` evenly spread positions from 0 to n - 1, including both."""
    return np.unique(np.linspace(0, n - 1, min(n, limit)).round().astype(np.int64))
