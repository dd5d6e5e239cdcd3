"""Each kind of writer, killed at each of its renames, or with a disk that fails at each of its calls."""

import itertools
import re

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

        def write_once(kind, folder, moment=-1, error=None):
            folder.mkdir(exist_ok=True)
            return run_task({"writer": kind, "folder": str(folder), "moment": moment, "error": error})

        yield write_once


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_killed_writer_leaves_is_gone_when_the_next_one_is_through(tmp_path, write, kind):
    end, whole = write(kind, tmp_path / "whole")
    assert end == "done"
    assert not [name for name in whole if name.rpartition("/")[2].startswith(".") and not name.endswith("/.lock")]
    found_litter = False
    for moment in SOME.get(kind, itertools.count()):
        folder = tmp_path / str(moment)
        end, files = write(kind, folder, moment)
        if end == "done":
            break
        found_litter |= any(".partial" in name for name in files)
        end, again = write(kind, folder)
        assert (end, list(again)) == ("done", list(whole)), f"killed at {moment}, it left {files}"
    assert found_litter


@pytest.mark.parametrize("error", ["ENOSPC", "EIO"])
@pytest.mark.parametrize(
    ("kind", "moments"),
    [
        *((kind, (2, 9)) for kind in ("parquet", "store", "pack", "run")),
        *(pytest.param(kind, range(0, 999, 5 if kind in SOME else 1), marks=pytest.mark.long) for kind in KINDS),
    ],
)
def test_a_disk_that_fails_at_any_call_is_one_sentence_and_damages_nothing(
    tmp_path, write, kind, moments, error, record_property
):
    end, whole = write(kind, tmp_path / "whole")
    assert end == "done"
    for moment in moments:
        folder = tmp_path / f"{moment}"
        before = write(kind, folder)[1] if moment % 2 else {}  # over what an earlier start wrote
        end, files = write(kind, folder, moment, error)
        if end == "done":
            break
        assert re.search(r"cannot be written \(.*(space|error).*\): (make space|check the disk)", end), end
        assert not [name for name in files if ".partial" in name], f"failed at {moment}"
        end, again = write(kind, folder)
        assert (end, list(again)) == ("done", list(whole)), f"failed at {moment}"
        for name in files.keys() & whole.keys():
            # A pack's list names its shards where they are while it is published.
            is_appended = name.endswith((".csv", ".jsonl", ".lock", ".meta.json", "run.json", "mine.tsv"))
            assert is_appended or files[name] in (before.get(name), again[name]), f"failed at {moment}"
    assert moment > 1
    record_property("files written to a disk that is full or fails", len(list(tmp_path.iterdir())) - 2)
