"""Whatever a writer leaves that is killed, the next one removes: each kind of writer, at each of its renames."""

import itertools

import pytest

from tests.conftest import start_server

# What takes long to write is killed at some of its renames only: before the first one, after it, and later.
SOME = {
    "csv of two": range(0, 99, 3),
    "jsonl of two": range(1, 99, 3),
    "pictures of two": (0, 2, 3, 6),
    "hugging face": (0, 1, 8),
}
KINDS = (
    "csv",
    "csv of two",
    "jsonl of two",
    "parquet",
    "label tracks",
    "pictures of two",
    "embeddings of two",
    "store",
    "pack",
    "run",
    "head",
    "hugging face",
)


@pytest.fixture(scope="module")
def write():
    """`write(kind, folder, moment)` writes in a process of its own, see killed_writers.py."""
    with start_server("tests/common/killed_writers.py") as run_task:

        def write_once(kind, folder, moment=-1):
            folder.mkdir(exist_ok=True)
            return run_task({"writer": kind, "folder": str(folder), "moment": moment})

        yield write_once


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_killed_writer_leaves_is_gone_when_the_next_one_is_through(tmp_path, write, kind):
    was_killed, whole = write(kind, tmp_path / "whole")
    assert not was_killed
    assert not [name for name in whole if name.rpartition("/")[2].startswith(".") and not name.endswith("/.lock")]
    found_litter = False
    for moment in SOME.get(kind, itertools.count()):
        folder = tmp_path / str(moment)
        was_killed, files = write(kind, folder, moment)
        if not was_killed:
            break
        found_litter |= any(".partial" in name for name in files)
        assert write(kind, folder) == [False, whole], f"killed at {moment}, it left {files}"
    assert found_litter
