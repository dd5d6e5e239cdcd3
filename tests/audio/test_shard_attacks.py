"""Shards of others: a clip has the samples that were packed, or there is a sentence; in little memory."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from audio.hdf5 import check_dataset, find_dataset, get_dataset
from audio.shard_writer import ShardWriter
from audio.shards import Shard
from common.errors import UserError
from tagging.embeddings import EmbeddingFile
from tagging.files import TaggedFile, TaggedWindow
from tagging.parts import SINGLE_PROCESS
from tests.distill.test_store_attacks import mutate_bytes
from tests.hdf5_files import link_dataset as link
from tests.hdf5_files import make_virtual, peak_mb
from tests.hdf5_files import replace_dataset as replace

CLIPS = [np.arange(100 * number, 100 * number + 700, dtype=np.int16) for number in range(5)]
MEMORY_MB = 600  # that a refused file may add to the process


def write_shard(path: Path, layout: str = "flat") -> Path:
    with ShardWriter(path, 16000, layout) as writer:
        for number, clip in enumerate(CLIPS):
            writer.append(f"a/{number}.wav", clip)
    return path


def read_all(path: Path) -> dict[str, list[int]]:
    shard = Shard(path, verify=True)
    assert shard.sample_rate is None or shard.sample_rate > 0
    lengths = [shard.n_samples(position) for position in range(len(shard))]
    assert sum(lengths) < 10**6
    return {name: shard.read(position).tolist() for position, name in enumerate(shard.names)}


EXPECTED = {f"a/{number}.wav": clip.tolist() for number, clip in enumerate(CLIPS)}


def set_attribute(path: Path, name: str, value: Any) -> None:
    with h5py.File(path, "r+") as file:
        file.attrs[name] = value


EDGES = np.arange(6) * 700
FLAT_ATTACKS: dict[str, tuple[Callable[[Path], None], str]] = {
    "/etc/passwd as samples": (
        lambda p: replace(p, "samples", shape=(3500,), dtype="i2", external=[("/etc/passwd", 0, 7000)]),
        "takes its values from other files",
    ),
    "samples of another file": (lambda p: link(p, "samples", h5py.ExternalLink("/tmp/x.h5", "y")), "not followed"),
    "offsets of another place": (lambda p: link(p, "offsets", h5py.SoftLink("/names")), "not followed"),
    "virtual samples": (lambda p: make_virtual(p, "samples", (700,), "i2"), "takes its values from other files"),
    "a terabyte that is not there": (lambda p: replace(p, "samples", shape=(1 << 39,), dtype="i2"), "declares 1,099,"),
    "a billion names": (lambda p: replace(p, "names", shape=(10**9,), dtype=h5py.string_dtype()), "declares 8,000,"),
    "a billion offsets": (
        lambda p: replace(p, "offsets", shape=(10**9,), dtype="i8", chunks=(1000,), compression="gzip"),
        "has only 0 of its",
    ),
    "offsets beyond the samples": (lambda p: replace(p, "offsets", data=EDGES + (EDGES > 3000) * 10**12), "not match"),
    "negative offsets": (lambda p: replace(p, "offsets", data=EDGES - (EDGES == 700) * 2000), "do not match"),
    "offsets that overflow": (
        lambda p: replace(p, "offsets", data=np.array([0, 2**63 - 1, 1400, 2100, 2800, 3500])),
        "do not match",
    ),
    "unsigned offsets that overflow": (
        lambda p: replace(p, "offsets", data=np.array([0, 2**64 - 700, 1400, 2100, 2800, 3500], "u8")),
        "do not match",
    ),
    "offsets as floats": (lambda p: replace(p, "offsets", data=EDGES.astype("f8")), "expected integers"),
    "other offsets": (lambda p: replace(p, "offsets", data=EDGES + (EDGES == 700) * 5), "their hash differs"),
    "other names": (lambda p: replace(p, "names", data=list("abcde")), "their hash differs"),
    "names that are no text": (lambda p: replace(p, "names", data=[b"\xff"] * 5, dtype=h5py.string_dtype()), "damaged"),
    "a rate as text": (lambda p: set_attribute(p, "sample_rate", "fast"), "damaged"),
    "a negative rate": (lambda p: set_attribute(p, "sample_rate", -16000), "its sample_rate is -16000"),
    "two rates": (lambda p: set_attribute(p, "sample_rate", [1, 2]), "damaged"),
}  # fmt: skip

NAME = "a/2.wav"
CLIP_ATTACKS: dict[str, tuple[Callable[[Path], None], str]] = {
    "/etc/passwd as a clip": (
        lambda p: replace(p, NAME, shape=(700,), dtype="i2", external=[("/etc/passwd", 0, 1400)]),
        "takes its values from other files",
    ),
    "a virtual clip": (lambda p: make_virtual(p, NAME, (700,), "i2"), "takes its values from other files"),
    "a terabyte that is not there": (lambda p: replace(p, NAME, shape=(1 << 39,), dtype="i2"), "declares 1,099,"),
    "chunks that are not there": (
        lambda p: replace(p, NAME, shape=(1 << 39,), dtype="i2", compression="gzip"),
        "has only 0 of its",
    ),
    "one chunk that fills the memory": (
        lambda p: replace(p, NAME, shape=(9,), maxshape=(None,), chunks=(10**9,), dtype="i2", compression="gzip"),
        "which fill the memory",
    ),
    "three dimensions": (lambda p: replace(p, NAME, data=np.zeros((2, 2, 2), "i2")), "expected"),
    "one number": (lambda p: replace(p, NAME, data=np.int16(3)), "expected"),
    "no shape": (lambda p: link(p, NAME, h5py.Empty("i2")), "no shape|empty|expected"),
    "text": (lambda p: replace(p, NAME, data=["x"] * 3), "expected"),
    "NaN": (lambda p: replace(p, NAME, data=np.full(9, np.nan)), "floats up to nan"),
}


@pytest.mark.parametrize(("layout", "attack"), [
    *(("flat", attack) for attack in FLAT_ATTACKS), *(("clips", attack) for attack in CLIP_ATTACKS)
])  # fmt: skip
def test_what_is_wrong_in_a_shard_is_a_sentence(tmp_path: Path, layout: str, attack: str) -> None:
    change, sentence = (FLAT_ATTACKS if layout == "flat" else CLIP_ATTACKS)[attack]
    path = write_shard(tmp_path / "p.h5", layout)
    assert read_all(path) == EXPECTED
    change(path)
    before = peak_mb()
    with pytest.raises(UserError, match=f"p.h5.*{sentence}"):
        read_all(path)
    assert peak_mb() - before < MEMORY_MB


@pytest.mark.parametrize("target", [h5py.ExternalLink("/tmp/x.h5", "y"), h5py.SoftLink("/a/1.wav")])
def test_a_clip_that_is_a_link_is_none(tmp_path: Path, target: Any) -> None:
    path = write_shard(tmp_path / "p.h5", "clips")
    link(path, NAME, target)
    assert read_all(path) == {name: values for name, values in EXPECTED.items() if name != NAME}


def test_compressed_and_chunked_datasets_of_others_are_read(tmp_path: Path) -> None:
    """Also silence, which deflate makes a thousandth of, and files that grew."""
    with h5py.File(tmp_path / "p.h5", "w") as file:
        file.create_dataset("silence.wav", data=np.zeros(10**7, np.int16), compression="gzip")
        file.create_dataset("chunked.wav", data=CLIPS[0], chunks=(64,), maxshape=(None,))
        file.create_dataset("empty.wav", data=np.zeros(0, np.int16))
        file.create_dataset("floats.wav", data=(CLIPS[0] / 32768).astype("f4"), compression="lzf", shuffle=True)
        file.create_dataset("growing.wav", data=CLIPS[0][:10], chunks=(64,), maxshape=(None,)).resize((700,))
        file["growing.wav"][10:] = CLIPS[0][10:]
    shard = Shard(tmp_path / "p.h5")
    assert {name: len(shard.read(position)) for position, name in enumerate(shard.names)} == {
        "silence.wav": 10**7, "chunked.wav": 700, "empty.wav": 0, "floats.wav": 700, "growing.wav": 700,
    }  # fmt: skip
    for name in ("chunked.wav", "floats.wav", "growing.wav"):
        assert shard.read(shard.find(name)).tolist() == CLIPS[0].tolist()


def test_a_dataset_is_found_through_groups_of_the_file_alone(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["a/b/c"] = np.arange(3)
        file["soft"] = h5py.SoftLink("/a/b")
        file["away"] = h5py.ExternalLink("y.h5", "/a")
        check_dataset(file["a/b/c"])
        assert get_dataset(file, "a/b/c", "i")[:].tolist() == [0, 1, 2]
        assert [find_dataset(file, name) for name in ("a", "a/b", "x", "a/b/c/d")] == [None] * 4
        for name in ("soft", "soft/c", "away", "away/b/c"):
            with pytest.raises(ValueError, match="not followed"):
                find_dataset(file, name)
        with pytest.raises(KeyError):
            get_dataset(file, "a/b", "i")


def mutate_shards(folder: Path, seeds: range) -> None:
    paths = [write_shard(folder / f"{layout}.h5", layout) for layout in ("flat", "clips")]
    contents = [path.read_bytes() for path in paths]
    before, n_refused = peak_mb(), 0
    for seed in seeds:
        path, content = paths[seed % 2], contents[seed % 2]
        rng = random.Random(seed)
        # Half of a small file is the content of one chunk; what leads to it has most of the ways to fail.
        head, tail = (content[:6000], content[6000:]) if rng.random() < 0.7 else (content, b"")
        path.write_bytes(mutate_bytes(head, rng) + tail)
        try:
            found = read_all(path)
        except UserError:
            n_refused += 1
            continue
        for name, values in found.items():
            # A name or the mark of a checksum may have become another one; samples with their checksum may not.
            assert EXPECTED.get(name, values) == values or path.stem == "clips"
    assert n_refused > len(seeds) // 10
    assert peak_mb() - before < MEMORY_MB


def test_a_changed_shard_has_its_samples_or_a_sentence(tmp_path: Path) -> None:
    mutate_shards(tmp_path, range(150))


@pytest.mark.long
def test_thousands_of_changed_shards_have_their_samples_or_a_sentence(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    mutate_shards(tmp_path, range(1000, 9000))
    record_property("damaged shards", 8000)


def write_embeddings(path: Path) -> None:
    output = EmbeddingFile(path, {"model": "m"}, SINGLE_PROCESS)
    for number in range(3):
        window = TaggedWindow(0.0, 1.0, [], np.full(4, number, np.float32), np.ones((2, 4), np.float16))
        output.write(TaggedFile(Path(f"{number}.wav"), [window]))
    assert output.close([])


EMBEDDING_ATTACKS: dict[str, tuple[Callable[[Path], None], str]] = {
    "windows of files that there are not": (lambda p: replace(p, "window/file", data=[0, 1, 9]), "does not number"),
    "negative files": (lambda p: replace(p, "window/file", data=[-1, 0, 1]), "does not number"),
    "steps that there are not": (lambda p: replace(p, "frame/offset", data=[0, 2, 4, 10**12]), "does not fit"),
    "too few starts": (lambda p: replace(p, "window/start", data=[0.0]), "one row a window"),
    "/etc/passwd as embeddings": (
        lambda p: replace(p, "window/embedding", shape=(3, 4), dtype="f4", external=[("/etc/passwd", 0, 48)]),
        "other files",
    ),
    "deep provenance": (lambda p: set_attribute(p, "made_with", "[" * 5000), "nested deeper"),
    "a number as provenance": (lambda p: set_attribute(p, "made_with", 3), "expected text"),
}


@pytest.mark.parametrize("attack", EMBEDDING_ATTACKS)
def test_a_file_of_embeddings_of_others_is_not_added_to(tmp_path: Path, attack: str) -> None:
    change, sentence = EMBEDDING_ATTACKS[attack]
    write_embeddings(tmp_path / "e.h5")
    assert EmbeddingFile(tmp_path / "e.h5", {"model": "m"}, SINGLE_PROCESS).done == {"0.wav", "1.wav", "2.wav"}
    change(tmp_path / "e.h5")
    with pytest.raises(UserError, match=f"e.h5 cannot be added to .*{sentence}"):
        EmbeddingFile(tmp_path / "e.h5", {"model": "m"}, SINGLE_PROCESS)
