"""A machine that has no processes, threads, open files or memory left ends packing and tagging; no file is blamed."""

import errno
import gc
import os
import socket
import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest
import soundfile

import audio.decoder_processes
from audio.clips import load_clip, load_clips
from audio.decoder_processes import DecoderStartError
from audio.isolation import IsolatedBlocks
from common.entry_points import print_user_errors
from common.errors import UserError
from tagging.files import tag_files
from tests.audio.sound_bytes import RATE
from tests.tagging.sounds import Meter


@pytest.fixture
def good(tmp_path: Path) -> Path:
    soundfile.write(tmp_path / "good.wav", np.full(3 * RATE, 0.25), RATE)
    return tmp_path / "good.wav"


@pytest.fixture
def no_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next decoder is a new process."""
    monkeypatch.setattr(audio.decoder_processes, "_idle", [])


def fail_at_once(error: Exception):
    def fail(*args, **more):
        raise error

    return fail


def pack(path: Path) -> None:
    list(load_clips([path], lambda path, cancelled: load_clip(path, RATE, isolated=True), 2))


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EMFILE, errno.ENOMEM])
@pytest.mark.usefixtures("no_idle")
def test_a_machine_that_starts_no_decoder_ends_the_work_and_blames_no_file(good, monkeypatch, number) -> None:
    def fail(*args, **more):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(
        socket if number == errno.EMFILE else subprocess, {errno.EMFILE: "socketpair"}.get(number, "Popen"), fail
    )
    gc.collect()  # closes what earlier tests have left
    n_open = len(os.listdir("/proc/self/fd"))
    sentence = rf"a process that decodes cannot be started \({os.strerror(number)}\).*--n_workers"
    with pytest.raises(DecoderStartError, match=sentence):
        pack(good)
    with pytest.raises(DecoderStartError, match=sentence):
        list(tag_files(Meter(), [good]))
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= n_open  # decoders that other tests left idle may end meanwhile


@pytest.mark.parametrize(
    ("code", "seconds", "words"),
    [("import os; os.abort()", 60, "SIGABRT"), ("import time; time.sleep(60)", 0.1, "did not start within 0 s")],
)
@pytest.mark.usefixtures("no_idle")
def test_a_decoder_that_does_not_start_is_described_before_it_is_ended(good, monkeypatch, code, seconds, words) -> None:
    monkeypatch.setattr(audio.decoder_processes, "_CODE", code)
    monkeypatch.setattr(audio.decoder_processes, "_START_SECONDS", seconds)
    with pytest.raises(DecoderStartError, match=words):
        list(IsolatedBlocks(good))


def test_memory_and_threads_that_run_out_are_sentences(good: Path, monkeypatch, capsys) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(IsolatedBlocks, "__iter__", fail_at_once(MemoryError()))
        with pytest.raises(UserError, match=r"memory ran out while .*good\.wav was read"):
            pack(good)
    monkeypatch.setattr(threading.Thread, "start", fail_at_once(RuntimeError("can't start new thread")))
    for work in (pack, lambda path: list(tag_files(Meter(), [path]))):
        with pytest.raises(SystemExit):
            print_user_errors(work)(good)
        assert "error: can't start new thread: give fewer workers" in capsys.readouterr().err
