import multiprocessing
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest

from audio.hdf5 import describe_lock
from audio.shard_writer import ShardWriter
from audio.shards import LAYOUTS, Shard
from common.errors import UserError

LENGTHS = [5, 1, 300_000, 262_144, 17]  # within a block, across blocks, exactly one


def clips() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {f"audio/clip {i} é.wav": rng.integers(-32768, 32768, n).astype(np.int16) for i, n in enumerate(LENGTHS)}


@pytest.fixture(params=LAYOUTS)
def shard(request: pytest.FixtureRequest, tmp_path: Path) -> Shard:
    return write(tmp_path / "hdf5" / "x_0.h5", request.param)


def write(path: Path, layout: str) -> Shard:
    with ShardWriter(path, 32000, layout) as writer:
        for name, samples in clips().items():
            writer.append(name, samples)
    return Shard(path)


def test_what_was_written_is_read(shard: Shard) -> None:
    assert len(shard) == 5
    assert shard.sample_rate == 32000
    assert sorted(shard.names) == sorted(clips())
    for name, samples in clips().items():
        position = shard.find(name)
        assert shard.n_samples(position) == len(samples)
        read = shard.read(position)
        assert read.dtype == np.int16
        np.testing.assert_array_equal(read, samples)


def test_a_part_of_a_clip_never_reaches_into_its_neighbour(shard: Shard) -> None:
    name, samples = list(clips().items())[2]
    position = shard.find(name)
    np.testing.assert_array_equal(shard.read(position, 262_000, 263_000), samples[262_000:263_000])
    np.testing.assert_array_equal(shard.read(position, 299_990, 300_100), samples[299_990:])
    assert len(shard.read(position, 300_000)) == 0
    assert len(shard.read(position, 400_000, 400_010)) == 0


def test_a_clip_is_found_by_another_spelling_and_an_absent_one_is_an_error(shard: Shard) -> None:
    assert shard.names[shard.find("clip 1 é.flac")] == "audio/clip 1 é.wav"
    with pytest.raises(KeyError, match=r"has no clip 'clip 9\.wav'"):
        shard.find("clip 9.wav")


def test_a_shard_is_pickled_without_its_handles(shard: Shard) -> None:
    before = shard.read(0)
    copy = pickle.loads(pickle.dumps(shard))
    assert copy._bytes is None
    assert copy._hdf5 is None
    np.testing.assert_array_equal(copy.read(0), before)


def test_blocks_are_written_as_they_fill_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("audio.shard_writer._BLOCK_SAMPLES", 100)
    with ShardWriter(tmp_path / "x.h5", 16000) as writer:
        for i in range(10):
            writer.append(str(i), np.full(60, i, np.int16))
            assert sum(map(len, writer._pending)) < 100
    shard = Shard(tmp_path / "x.h5")
    assert [shard.read(i).tolist() for i in range(10)] == [[i] * 60 for i in range(10)]


def test_the_flat_layout_is_plain_hdf5_for_other_programs(tmp_path: Path) -> None:
    write(tmp_path / "x.h5", "flat")
    with h5py.File(tmp_path / "x.h5") as file:
        attributes = {key: file.attrs[key] for key in ("sample_rate", "layout", "version")}
        assert attributes == {"sample_rate": 32000, "layout": "flat", "version": 1}
        offsets = file["offsets"][:]
        assert (file["samples"].dtype, offsets.dtype) == (np.dtype("<i2"), np.int64)
        for i, (name, samples) in enumerate(clips().items()):
            assert file["names"].asstr()[i] == name
            np.testing.assert_array_equal(file["samples"][offsets[i] : offsets[i + 1]], samples)


@pytest.mark.parametrize("storage", [{}, {"chunks": (64,), "compression": "gzip"}, {"chunks": (64,)}])
def test_a_flat_shard_stored_otherwise_is_read_all_the_same(tmp_path: Path, storage: dict) -> None:
    samples = np.arange(1000, dtype=np.int16)
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file.create_dataset("samples", data=samples, **storage)
        file["offsets"] = np.array([0, 300, 1000])
        file.create_dataset("names", data=["a", "b"], dtype=h5py.string_dtype())
    shard = Shard(tmp_path / "x.h5")
    np.testing.assert_array_equal(shard.read(1, 10, 500), samples[310:800])
    assert shard.sample_rate is None


def write_and_fail(path: Path) -> None:
    with ShardWriter(path, 16000) as writer:
        writer.append("a", np.zeros(10, np.int16))
        raise RuntimeError


def test_an_error_while_writing_leaves_the_previous_file(tmp_path: Path) -> None:
    write(tmp_path / "x.h5", "flat")
    before = (tmp_path / "x.h5").read_bytes()
    with pytest.raises(RuntimeError):
        write_and_fail(tmp_path / "x.h5")
    assert (tmp_path / "x.h5").read_bytes() == before
    assert os.listdir(tmp_path) == ["x.h5"]


def _write_for_ever(path: Path) -> None:
    with ShardWriter(path, 16000) as writer:
        for i in range(1_000_000):
            writer.append(str(i), np.zeros(1 << 20, np.int16))
            time.sleep(0.01)


def test_a_killed_writer_leaves_no_target(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=_write_for_ever, args=(tmp_path / "x.h5",))
    process.start()
    deadline = time.monotonic() + 10
    while not any(path.stat().st_size > 1 << 20 for path in tmp_path.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert list(tmp_path.glob(".x.h5.*"))  # it was in the middle of writing
    assert not (tmp_path / "x.h5").exists()


def test_a_stereo_clip_is_averaged(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "x.h5", 16000, "clips") as writer:
        writer.append("a.wav", np.array([[100, 300, -32768], [200, 100, -32768]], np.int16))
    shard = Shard(tmp_path / "x.h5")
    assert shard.n_samples(0) == 3
    assert shard.read(0).tolist() == [150, 200, -32768]


def test_the_writer_refuses_what_it_would_corrupt(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "x.h5", 16000) as writer:
        with pytest.raises(ValueError, match=r"found float32 samples of shape \(3,\), expected int16"):
            writer.append("a", np.zeros(3, np.float32))
        with pytest.raises(ValueError, match="expected int16"):
            writer.append("a", np.zeros((2, 3), np.int16))
    with pytest.raises(UserError, match="no layout 'tar'"):
        ShardWriter(tmp_path / "x.h5", 16000, "tar")


def bad_shard(path: Path, what: str) -> None:
    write(path, "flat")
    if what == "text":
        path.write_text("hello")
    elif what == "truncated":
        path.write_bytes(path.read_bytes()[:300_000])
    elif what == "absent":
        path.unlink()
    elif what == "no clip":
        h5py.File(path, "w").close()
    elif what == "logits":
        with h5py.File(path, "w") as file:
            file["topk_values"] = np.zeros((4, 20), np.float16)
    elif what == "offsets":
        with h5py.File(path, "a") as file:
            file["offsets"][-1] += 1
    elif what == "newer":
        with h5py.File(path, "a") as file:
            file.attrs["version"] = 2


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("text", "is not an HDF5 file"),
        ("truncated", "is truncated or damaged"),
        ("absent", "the shard does not exist"),
        ("no clip", "has no clips"),
        ("logits", r"found 'topk_values' \(float16 of shape \(4, 20\)\)"),
        ("offsets", "do not match"),
        ("newer", "has version 2"),
    ],
)
def test_a_file_that_is_no_shard_gets_a_sentence(tmp_path: Path, what: str, words: str) -> None:
    bad_shard(tmp_path / "x.h5", what)
    with pytest.raises(UserError, match=words) as caught:
        len(Shard(tmp_path / "x.h5"))
    assert str(tmp_path / "x.h5") in str(caught.value)


def test_a_shard_replaced_under_a_reader_is_noticed(tmp_path: Path) -> None:
    shard = write(tmp_path / "x.h5", "flat")
    shard.names  # noqa: B018 - the reader knows the old file
    with ShardWriter(tmp_path / "x.h5", 16000) as writer:
        writer.append("other", np.zeros(9, np.int16))
    with pytest.raises(UserError, match="replaced while in use"):
        shard.read(0)


HOLD = """
import sys, time, h5py
with h5py.File(sys.argv[1], sys.argv[2]) as file:
    if sys.argv[2] == "w":
        file["a"] = [1]
        file.flush()
    print("open", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_shard_that_another_process_writes_is_locked_rather_than_damaged(tmp_path: Path, layout: str) -> None:
    path = tmp_path / "x_0.h5"
    write(path, layout)
    whole = path.read_bytes()
    for mode in ("w", "r+"):
        holder = subprocess.Popen(
            [sys.executable, "-c", HOLD, path, mode], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert holder.stdout is not None
        assert holder.stdout.readline() == "open\n"
        with pytest.raises(UserError) as caught:
            len(Shard(path))
        holder.communicate("")
        assert "x_0.h5: is locked by another process" in str(caught.value)
        assert "wait until that process has ended" in str(caught.value)
        assert "damaged" not in str(caught.value)
        assert "pack it again" not in str(caught.value)
        path.write_bytes(whole)
    assert len(Shard(path)) == 5  # nobody holds it any more


def test_a_file_system_without_locks_has_another_way_out() -> None:
    error = OSError(
        38, "Unable to open file (unable to lock file, errno = 38, error message = 'Function not implemented')"
    )
    assert "HDF5_USE_FILE_LOCKING=FALSE" in describe_lock(error)
    assert describe_lock(OSError(11, "something else")) == ""


@pytest.mark.parametrize("layout", ["flat", "clips"])
def test_a_reader_that_verifies_names_the_damaged_clip_and_others_can_be_read(tmp_path: Path, layout: str) -> None:
    path = tmp_path / "x.h5"
    write(path, layout)
    sound = next(samples for samples in clips().values() if len(samples) > 50)
    data = bytearray(path.read_bytes())
    place = data.index(sound.tobytes())
    data[place + 60] ^= 4
    path.write_bytes(data)
    shard = Shard(path, verify=True)
    damaged = [i for i in range(len(shard)) if not shard.is_intact(i)]
    assert len(damaged) == 1
    assert shard.has_checksums
    with pytest.raises(UserError, match=f"{re.escape(shard.names[damaged[0]])}.*is damaged"):
        shard.read(damaged[0], 0, 10)
    for i in set(range(len(shard))) - set(damaged):
        np.testing.assert_array_equal(shard.read(i, 3, 40), Shard(path).read(i, 3, 40))
    assert Shard(path).read(damaged[0]).tolist() != sound.tolist()  # what goes unseen without it


def test_damaged_names_and_offsets_are_seen_without_being_told_to_verify(tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    write(path, "flat")
    with h5py.File(path, "r+") as file:
        file["offsets"][1] -= 1
    with pytest.raises(UserError, match="names or offsets are damaged"):
        len(Shard(path))
