"""A sound file that crashes, hangs or overfeeds its decoder costs only itself, in packing and in tagging."""

import math
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile

import audio.clips
import audio.decoder_processes
import audio.isolation
import tagging.files
from audio import decoder_processes
from audio.clip_blocks import ClipBlocks
from audio.clips import Clip, load_clip, load_clips
from audio.decoder_processes import CancelledError, DecoderProcess
from audio.errors import AudioReadError
from audio.io import AudioBlocks
from audio.isolation import IsolatedBlocks
from audio.limits import DEFAULT_LIMITS, SoundLimits
from tagging.files import TagOptions, tag_files
from tests.audio.sound_bytes import RATE, noisy, wav
from tests.conftest import ROOT
from tests.processes import is_alive
from tests.tagging.sounds import Meter, steady

IMPATIENT = SoundLimits(stall_seconds=0.5)


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "good.wav"
    soundfile.write(path, noisy((300, 400, 500)), RATE, subtype="FLOAT")
    return path


@pytest.fixture
def silent_pipe(tmp_path: Path) -> Path:
    """A named pipe that nobody writes to: opening it waits for ever."""
    os.mkfifo(tmp_path / "pipe.wav")
    return tmp_path / "pipe.wav"


def read(blocks) -> np.ndarray:
    return np.concatenate(list(blocks))


def signal_decoder(blocks: IsolatedBlocks, number: int) -> None:
    """Send a signal to the process that decodes these blocks, once it has begun."""
    while blocks.process is None or not blocks.process._is_ready:
        time.sleep(0.01)
    os.kill(blocks.process.pid, number)


def fail_with(blocks: IsolatedBlocks, number: int) -> str:
    threading.Thread(target=signal_decoder, args=(blocks, number)).start()
    with pytest.raises(AudioReadError) as caught:
        list(blocks)
    return caught.value.reason


@pytest.mark.parametrize("rate", [None, 8000])
def test_another_process_gives_the_samples_and_attributes_of_this_one(good: Path, rate: int | None) -> None:
    here, there = AudioBlocks(good, rate), IsolatedBlocks(good, rate)
    np.testing.assert_array_equal(read(here), read(there))
    assert (there.sample_rate, there.source_rate, there.warnings) == (rate or RATE, RATE, {})
    here, there = ClipBlocks(good, 8000, stereo=True), IsolatedBlocks(good, 8000, source=ClipBlocks, stereo=True)
    np.testing.assert_array_equal(read(here), read(there))
    assert (there.silent, there.clipped) == (here.silent, here.clipped) == (False, False)


@pytest.mark.parametrize(
    ("number", "words"),
    [(signal.SIGSEGV, "crashed with SIGSEGV"), (signal.SIGABRT, "SIGABRT"), (signal.SIGKILL, "ran out of memory")],
)
def test_a_crash_of_the_decoder_is_a_sentence_on_its_file_alone(good, silent_pipe, number, words) -> None:
    assert words in fail_with(IsolatedBlocks(silent_pipe), number)
    assert len(read(IsolatedBlocks(good))) == 3 * RATE


def test_a_decoder_that_yields_nothing_is_stopped_after_its_time(good: Path, silent_pipe: Path) -> None:
    with pytest.raises(AudioReadError, match=r"no sound came for 0 s.*stall_seconds"):
        list(IsolatedBlocks(silent_pipe, limits=IMPATIENT))
    assert "no sound came" in fail_with(IsolatedBlocks(silent_pipe, limits=IMPATIENT), signal.SIGSTOP)  # a busy loop
    assert len(read(IsolatedBlocks(good))) == 3 * RATE


def test_a_pipe_that_stops_midway_is_waited_for_no_longer_than_that(silent_pipe: Path) -> None:
    stop = threading.Event()

    def send() -> None:
        with open(silent_pipe, "wb") as pipe:
            pipe.write(wav(0xFFFFFFFF)[: 44 + 4 * RATE])
            pipe.flush()
            stop.wait()

    sender = threading.Thread(target=send)
    sender.start()
    try:
        with pytest.raises(AudioReadError, match="no sound came"):
            list(IsolatedBlocks(silent_pipe, limits=SoundLimits(stall_seconds=1)))
    finally:
        stop.set()
        sender.join()


def test_a_decoder_that_needs_too_much_memory_is_refused_it(good: Path) -> None:
    decoder_processes._end_all()  # those of earlier tests may have memory to spare
    with pytest.raises(AudioReadError, match=r"needs more than 1 MB.*decoder_mb"):
        list(IsolatedBlocks(good, 2_000_000, limits=SoundLimits(decoder_mb=1)))
    assert len(read(IsolatedBlocks(good))) == 3 * RATE


def test_another_thread_can_cancel_what_waits(silent_pipe: Path) -> None:
    cancelled = threading.Event()
    threading.Timer(0.3, cancelled.set).start()
    with pytest.raises(CancelledError):
        list(IsolatedBlocks(silent_pipe, cancelled=cancelled))


def make_hostile(folder: Path) -> list[Path]:
    """Things that are no files of sound, under names of sound."""
    os.mkfifo(folder / "pipe.flac")
    (folder / "folder.wav").mkdir()
    (folder / "endless.mp3").symlink_to("/dev/zero")
    (folder / "endless noise.wav").symlink_to("/dev/urandom")
    (folder / "loop.wav").symlink_to(folder / "loop.wav")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(folder / "socket.ogg"))
    names = ("pipe.flac", "folder.wav", "endless.mp3", "endless noise.wav", "loop.wav", "socket.ogg")
    return [folder / name for name in names]


def choose_limits(path: Path) -> SoundLimits:
    """Wait shortly for the pipe alone: on a loaded machine any file may take a second."""
    return IMPATIENT if path.name == "pipe.flac" else DEFAULT_LIMITS


REASONS = ("no sound came", "is a folder", "is a device", "is a device", "symbolic links", "is a socket")


def test_neighbours_of_what_is_no_file_are_tagged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hostile = make_hostile(tmp_path)
    good = steady(tmp_path / "good.wav", [0.25, 0.25])
    paths = [path for each in hostile for path in (good, each)]

    def isolate(path: Path, *args, **more) -> IsolatedBlocks:
        return IsolatedBlocks(path, *args, **more | {"limits": choose_limits(path)})

    monkeypatch.setattr(tagging.files, "IsolatedBlocks", isolate)
    files = list(tag_files(Meter(), paths, TagOptions(1), chunk_seconds=1.0))
    assert [len(file.windows) for file in files] == [2, 0] * len(hostile)
    for file, reason in zip(files[1::2], REASONS, strict=True):
        assert reason in (file.fault or ""), file.path


def test_neighbours_of_what_is_no_file_are_packed(tmp_path: Path) -> None:
    hostile = make_hostile(tmp_path)
    good = steady(tmp_path / "good.wav", [0.25, 0.25])
    paths = [path for each in hostile for path in (good, each)]

    def load(path: Path, cancelled: threading.Event) -> Clip:
        return load_clip(path, RATE, isolated=True, cancelled=cancelled, limits=choose_limits(path))

    clips = list(load_clips(paths, load, 2))
    assert [clip.samples is not None for clip in clips] == [True, False] * len(hostile)
    for clip, reason in zip(clips[1::2], REASONS, strict=True):
        assert reason in clip.reason


def test_a_file_that_may_not_be_read_has_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "x.wav").write_bytes(wav())
    (tmp_path / "x.wav").chmod(0)
    if os.geteuid() != 0:
        with pytest.raises(AudioReadError, match="Permission denied"):
            list(AudioBlocks(tmp_path / "x.wav"))
        return
    tmp_path.chmod(0o755)
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import audio.io as a, os; os.setuid(65534); "
    code += "list(a.AudioBlocks(sys.argv[1]))"
    run = subprocess.run([sys.executable, "-c", code, tmp_path / "x.wav"], capture_output=True, text=True)
    assert "cannot be opened (Permission denied)" in run.stderr


def test_processes_and_open_files_are_as_many_after_hundreds_of_files_as_after_a_few(good: Path) -> None:
    used = set()
    for n in range(200):
        blocks = IsolatedBlocks(good)
        for _ in blocks:
            assert blocks.process is not None
            used.add(blocks.process.pid)
        if n == 10:
            n_open = len(os.listdir("/proc/self/fd"))
    assert len(used) == 1
    assert len(os.listdir("/proc/self/fd")) <= n_open


def test_a_decoder_ends_with_the_process_that_it_decodes_for(silent_pipe: Path) -> None:
    code = (
        "import sys, threading, time; from audio.isolation import IsolatedBlocks; b = IsolatedBlocks(sys.argv[1]); "
        "threading.Thread(target=lambda: list(b), daemon=True).start()\n"
        "while b.process is None or not b.process._is_ready: time.sleep(0.01)\n"
        "print(b.process.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, silent_pipe], cwd=ROOT, stdout=subprocess.PIPE)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert is_alive(pid)
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 10
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(pid)


def test_a_forked_process_starts_decoders_of_its_own(good: Path) -> None:
    list(IsolatedBlocks(good))
    kept = [process.pid for process in audio.decoder_processes._idle]
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = 0 if not audio.decoder_processes._idle and len(read(IsolatedBlocks(good))) == 3 * RATE else 2
        finally:
            audio.decoder_processes._end_all()
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    assert [process.pid for process in audio.decoder_processes._idle] == kept
    assert len(read(IsolatedBlocks(good))) == 3 * RATE


def test_clips_that_wait_for_a_slow_one_are_limited_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audio.clips, "_MAX_HELD", 10_000)
    begun, may_end = [], threading.Event()

    def load(path: Path, cancelled: threading.Event) -> Clip:
        begun.append(int(path.name))
        if path.name == "0":
            may_end.wait(10)
        return Clip(samples=np.full(1000, int(path.name), np.int16))

    threading.Timer(0.5, may_end.set).start()
    clips = load_clips([Path(str(i)) for i in range(60)], load, 4)
    first = next(clips)
    assert first.samples is not None
    assert first.samples[0] == 0
    assert max(begun) <= 5 + 4  # five fill the room, and each thread has another one at most
    assert [int(clip.samples[0]) for clip in clips if clip.samples is not None] == list(range(1, 60))


@pytest.fixture
def no_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next decoder is a new process."""
    monkeypatch.setattr(audio.decoder_processes, "_idle", [])


def test_a_relative_path_is_that_of_the_working_directory_of_now(tmp_path: Path, monkeypatch) -> None:
    for number in (1, 2):
        (tmp_path / str(number)).mkdir()
        monkeypatch.chdir(tmp_path / str(number))
        soundfile.write("x.wav", np.zeros(number * 1000), RATE)
        assert len(read(IsolatedBlocks("x.wav"))) == number * 1000
    with pytest.raises(AudioReadError, match=r"^missing\.wav: there is no such file"):
        list(IsolatedBlocks("missing.wav"))
    (tmp_path / "1" / "link").symlink_to(tmp_path / "2" / "in", target_is_directory=True)
    (tmp_path / "2" / "in").mkdir()
    monkeypatch.chdir(tmp_path / "1")
    assert len(read(IsolatedBlocks("link/../x.wav"))) == 2000  # beside the folder that the link leads to


def test_a_decoder_that_was_killed_while_idle_or_within_a_file_costs_no_good_file(tmp_path: Path, good: Path) -> None:
    sound = read(IsolatedBlocks(good))
    os.kill(audio.decoder_processes._idle[-1].pid, signal.SIGKILL)
    np.testing.assert_array_equal(read(IsolatedBlocks(good)), sound)
    soundfile.write(tmp_path / "long.wav", np.arange(6_000_000) % 30000 / 32768, RATE)
    parts = list(kill_within(tmp_path / "long.wav", n_kills=1))
    assert len(parts) > 2
    np.testing.assert_array_equal(np.concatenate(parts), read(AudioBlocks(tmp_path / "long.wav")))
    with pytest.raises(AudioReadError, match="was killed, perhaps because the machine ran out of memory"):
        list(kill_within(tmp_path / "long.wav", n_kills=2))


def kill_within(path: Path, n_kills: int) -> Iterator[np.ndarray]:
    """Yield a file's blocks and kill its first decoders, each at its first block."""
    blocks = IsolatedBlocks(path)
    killed: set[int] = set()
    for block in blocks:
        assert blocks.process is not None
        if len(killed) < n_kills and blocks.process.pid not in killed:
            killed.add(blocks.process.pid)
            os.kill(blocks.process.pid, signal.SIGKILL)
        yield block


@pytest.mark.usefixtures("no_idle")
def test_no_code_beside_the_sounds_is_executed(tmp_path: Path, good: Path, monkeypatch) -> None:
    for name in ("random", "json", "numpy", "soundfile", "sitecustomize"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')")
    monkeypatch.chdir(tmp_path)
    assert len(read(IsolatedBlocks(good))) == 3 * RATE
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["/dev/fd/{}", "/proc/self/fd/{}", "link", "/dev/stdin"])
def test_a_pipe_that_only_this_process_has_open_is_decoded(tmp_path: Path, name: str) -> None:
    reading, writing = os.pipe()
    kept = os.dup(0)
    os.dup2(reading, 0)
    data = wav()
    writer = threading.Thread(target=lambda: [os.write(writing, data), os.close(writing)])
    writer.start()
    (tmp_path / "link").symlink_to(f"/dev/fd/{reading}")
    try:
        sound = read(IsolatedBlocks(tmp_path / name.format(reading)))
    finally:
        writer.join()
        os.dup2(kept, 0)
        os.close(kept)
        os.close(reading)
    (tmp_path / "x.wav").write_bytes(data)
    np.testing.assert_array_equal(sound, read(AudioBlocks(tmp_path / "x.wav")))


def test_a_descriptor_that_is_not_open_has_a_sentence() -> None:
    with pytest.raises(AudioReadError, match="cannot be opened"):
        list(IsolatedBlocks("/dev/fd/987654"))


def test_memory_without_a_limit_and_a_system_that_has_none_decode(good: Path, monkeypatch) -> None:
    for decoder_mb in (1900, math.inf, 1e300):
        assert len(read(IsolatedBlocks(good, limits=SoundLimits(decoder_mb=decoder_mb)))) == 3 * RATE

    def fail(*args):
        raise ValueError("current limit exceeds maximum limit")

    monkeypatch.setattr(resource, "setrlimit", fail)
    audio.isolation._set_limit(resource.RLIMIT_AS, 1e9)


@pytest.mark.parametrize("n_sent", [3, 12, 60, 100])
def test_a_decoder_that_stops_within_a_message_is_waited_for_no_longer_than_between_two(n_sent: int) -> None:
    ours, theirs = socket.socketpair()
    process = object.__new__(DecoderProcess)
    process._socket = ours
    with ours, theirs:
        header = b'{"shape": [1000], "dtype": "float32"}'
        theirs.sendall((audio.decoder_processes.LENGTHS.pack(len(header), 4000) + header + bytes(4000))[:n_sent])
        start = time.monotonic()
        assert process.receive(start + 0.1) is None
        assert time.monotonic() - start < 5
        cancelled = threading.Event()
        cancelled.set()
        with pytest.raises(CancelledError):
            process.receive(math.inf, cancelled)
