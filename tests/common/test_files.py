"""Partial files of processes that are alive stay, those of dead ones go."""

import errno
import fcntl
import os
import subprocess
import sys
import threading
import time

import pytest

import common.files
from common.files import DEAD_AFTER, remove_dead_partials, reserve_partial, whole_file, write_text
from tests.conftest import ROOT

HOLD = (
    "import sys, pathlib; from common.files import whole_file\n"
    "with whole_file(sys.argv[1]) as partial:\n"
    "    partial.write(b'theirs'); print(partial.path.name, flush=True); input()"
)


@pytest.fixture
def writer(tmp_path):
    """`writer(name)` starts a process that is writing a file; returns it and the name of the partial file."""
    processes = []

    def start(name="a.txt"):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, tmp_path / name],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        processes.append(process)
        return process, tmp_path / process.stdout.readline().strip()

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def lock_of(partial):
    return partial.with_name("." + ".".join(partial.name.rsplit(".", 2)[1:]) + ".lock")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_of_a_writer_that_is_alive_nothing_is_removed_and_of_one_that_was_killed_all(tmp_path, writer):
    alive, partial = writer()
    dead, dead_partial = writer()
    (tmp_path / f"{dead_partial.name}.0123.tmp").write_text("of a library that writes beside the name it is given")
    (tmp_path / ".other.partial").write_text("of another program")
    dead.kill()
    dead.wait()
    remove_dead_partials(tmp_path)
    assert names(tmp_path) == sorted([".other.partial", partial.name, lock_of(partial).name])
    alive.communicate("\n")
    assert alive.returncode == 0
    assert names(tmp_path) == [".other.partial", "a.txt"]
    assert (tmp_path / "a.txt").read_text() == "theirs"


def test_the_next_process_that_writes_into_a_folder_removes_what_is_dead(tmp_path, writer):
    dead, _ = writer("a.txt")
    dead.kill()
    dead.wait()
    next_one, _ = writer("b.txt")
    next_one.communicate("\n")
    assert names(tmp_path) == ["b.txt"]


def test_what_this_process_is_writing_stays_in_whatever_thread(tmp_path):
    with whole_file(tmp_path / "a.txt") as one, whole_file(tmp_path / "a.txt") as other:
        one.write(b"one")
        other.write(b"other")
        thread = threading.Thread(target=remove_dead_partials, args=(tmp_path,))
        thread.start()
        thread.join()
        remove_dead_partials(tmp_path)
    assert names(tmp_path) == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "one"  # finished last


def test_a_child_that_was_forked_meanwhile_and_lives_on_holds_nothing_back(tmp_path):
    """Loader workers live for seconds after their trainer was killed."""
    code = (
        "import os, sys, time; from common.files import whole_file\n"
        "with whole_file(sys.argv[1]) as partial:\n"
        "    partial.write(b'half'); child = os.fork()\n"
        "    if child == 0: time.sleep(60)\n"
        "    print(child, flush=True); os.kill(os.getpid(), 9)"
    )
    # No pipe but the file: the child would keep that open.
    with open(tmp_path / "child.txt", "w") as file:
        subprocess.run([sys.executable, "-c", code, tmp_path / "a.txt"], cwd=ROOT, stdout=file, check=False)
    child = int((tmp_path / "child.txt").read_text())
    try:
        assert len(names(tmp_path)) == 3
        remove_dead_partials(tmp_path)
        assert names(tmp_path) == ["child.txt"]
    finally:
        os.kill(child, 9)


def age(path, seconds):
    moment = time.time() - seconds
    os.utime(path, (moment, moment))


@pytest.mark.parametrize("why", ["another machine", "no locks"])
def test_where_a_lock_proves_nothing_only_what_is_old_goes(tmp_path, writer, monkeypatch, why):
    process, partial = writer()
    process.kill()
    process.wait()
    if why == "another machine":
        lock_of(partial).write_bytes(b"boot of another machine")
    else:

        def refuse(*unused):
            raise OSError(errno.ENOLCK, "no locks available")

        monkeypatch.setattr(fcntl, "lockf", refuse)
    for seconds in ((0, 0), (2 * DEAD_AFTER, 0), (0, 2 * DEAD_AFTER)):
        age(lock_of(partial), seconds[0])
        age(partial, seconds[1])
        remove_dead_partials(tmp_path)
        assert len(names(tmp_path)) == 2
    age(lock_of(partial), 2 * DEAD_AFTER)
    remove_dead_partials(tmp_path)
    assert names(tmp_path) == []


def test_a_lock_of_a_process_that_was_killed_before_it_wrote_it_goes(tmp_path):
    (tmp_path / ".01234567.partial.lock").touch()
    remove_dead_partials(tmp_path)
    assert names(tmp_path) == []


def test_a_writer_whose_lock_was_removed_before_it_was_locked_takes_another(tmp_path, monkeypatch):
    lock, removed = fcntl.lockf, []

    def remove_then_lock(file, *how):
        if not removed:
            removed.append(file.name)
            os.unlink(file.name)
        lock(file, *how)

    monkeypatch.setattr(fcntl, "lockf", remove_then_lock)
    with whole_file(tmp_path / "a.txt") as file:
        file.write(b"whole")
        assert names(tmp_path) == sorted([file.path.name, lock_of(file.path).name])
        assert lock_of(file.path).name != removed[0]
    assert names(tmp_path) == ["a.txt"]


def test_a_writer_that_ends_meanwhile_is_no_fault_where_there_are_no_locks(tmp_path, writer, monkeypatch):
    _, partial = writer()

    def end(*unused):
        partial.unlink()
        lock_of(partial).unlink()
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "lockf", end)
    remove_dead_partials(tmp_path)
    assert names(tmp_path) == []


def test_however_old_it_is_what_another_machine_has_locked_stays(tmp_path, writer):
    _, partial = writer()
    lock_of(partial).write_bytes(b"boot of another machine")
    for path in (partial, lock_of(partial)):
        age(path, 2 * DEAD_AFTER)
    remove_dead_partials(tmp_path)
    assert names(tmp_path) == sorted([partial.name, lock_of(partial).name])


def test_where_there_are_no_locks_files_are_written_all_the_same(tmp_path, monkeypatch):
    def refuse(*unused):
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with whole_file(tmp_path / "a.txt") as partial:
        partial.write(b"whole")
        monkeypatch.setattr(common.files, "_WRITING", set())  # as another process sees it
        remove_dead_partials(tmp_path)
        assert partial.path.exists()
    assert names(tmp_path) == ["a.txt"]


def test_a_folder_is_reserved_and_removed_like_a_file(tmp_path):
    def fail():
        with reserve_partial(tmp_path / "folder") as partial:
            partial.mkdir()
            write_text(partial / "a.txt", "half")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert names(tmp_path) == []
    with reserve_partial(tmp_path / "folder") as partial:
        partial.mkdir()
        write_text(partial / "a.txt", "whole")
        os.replace(partial, tmp_path / "folder")
    assert names(tmp_path) == ["folder"]
    assert names(tmp_path / "folder") == ["a.txt"]
