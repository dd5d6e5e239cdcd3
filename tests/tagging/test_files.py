import contextlib
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import audio.decoders
import tagging.files
from audio.io import AudioBlocks
from common.errors import UserError
from models import AudioTagger
from models.ced_mel import CedMel
from tagging.engines import TorchEngine
from tagging.files import MAX_FILES_AHEAD, MAX_LENGTH_RATIO, TagOptions, choose_batch, tag_files
from tests.tagging.sounds import RATE, Meter, humming, steady


@pytest.fixture(autouse=True)
def no_thread_is_left():
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


@contextlib.contextmanager
def at_most(seconds):
    """Fail where a block takes longer, which may be for ever: it runs in the thread of the test, so stop the pool."""
    pools = []
    original = tagging.files.WindowPool.__init__

    def noted(self, *arguments):
        original(self, *arguments)
        pools.append(self)

    tagging.files.WindowPool.__init__ = noted
    timer = threading.Timer(seconds, lambda: [pool.stop(TimeoutError("dead-lock")) for pool in pools])
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
        tagging.files.WindowPool.__init__ = original


def test_every_window_is_tagged_in_order_with_its_times_also_a_short_tail(tmp_path):
    first = steady(tmp_path / "first.wav", [0.25, 0.5, 0.75], last=0.25)
    second = steady(tmp_path / "second.wav", [0.125])
    files = list(tag_files(Meter(), [first, second], TagOptions(2), chunk_seconds=1.0, batch_size=3))
    assert [file.path for file in files] == [first, second]
    assert [(window.start, window.end) for window in files[0].windows] == [(0, 1), (1, 2), (2, 2.25)]
    assert [window.tags for window in files[0].windows] == [
        [("level", 0.25), ("short", 0.0)],
        [("level", 0.5), ("short", 0.0)],
        [("short", pytest.approx(0.9)), ("level", 0.75)],
    ]
    assert [(window.start, window.end, window.tags[0]) for window in files[1].windows] == [(0, 1, ("level", 0.125))]


def test_less_than_a_tenth_of_a_second_behind_the_last_window_is_no_window_but_a_whole_file_is(tmp_path):
    paths = [steady(tmp_path / f"{i}.wav", [0.5, 0.5], last=last) for i, last in enumerate((0.0999, 0.1))]
    paths.append(steady(tmp_path / "2.wav", [0.5], last=0.01))
    ends = [[window.end for window in file.windows] for file in tag_files(Meter(), paths, chunk_seconds=1.0)]
    assert ends == [[1.0], [1.0, 1.1], [0.01]]


def test_windows_overlap_or_leave_gaps_as_requested(tmp_path):
    path = steady(tmp_path / "a.wav", [0.0, 0.25, 0.5, 0.75, 1.0])

    def heard(**times):
        (file,) = tag_files(Meter(), [path], TagOptions(1), **times)
        return [(window.start, window.end, round(dict(window.tags)["level"], 3)) for window in file.windows]

    half = [(k / 2, k / 2 + 2, (k + 1) / 8) for k in range(7)]
    assert heard(chunk_seconds=2.0, hop_seconds=0.5) == half
    assert heard(chunk_seconds=1.0, hop_seconds=2.0) == [(0, 1, 0), (2, 3, 0.5), (4, 5, 1.0)]
    assert heard(chunk_seconds=9.0) == [(0, 5, 0.5)]


def decode_here(monkeypatch, n_frames):
    """Decode blocks of so many samples, in this process, where their length can be set."""
    monkeypatch.setattr(audio.decoders, "_BLOCK_FRAMES", n_frames)
    monkeypatch.setattr(
        tagging.files, "IsolatedBlocks", lambda path, rate, limits, cancelled: AudioBlocks(path, rate, limits=limits)
    )


def test_files_of_several_blocks_are_cut_as_if_they_were_one(tmp_path, monkeypatch):
    decode_here(monkeypatch, 1000)
    soundfile.write(tmp_path / "a.wav", humming(1, 1.7), RATE, subtype="FLOAT")
    meter = Meter()
    list(tag_files(meter, [tmp_path / "a.wav"], chunk_seconds=0.5, batch_size=1))
    clips = sorted((clip for batch in meter.batches for clip in batch), key=len)
    assert sorted(map(len, clips)) == [3200, 8000, 8000, 8000]
    assert np.array_equal(clips[0], humming(1, 1.7)[24000:])


def test_a_batch_is_chosen_alike():
    rng = np.random.default_rng(0)
    for _ in range(300):
        lengths = rng.integers(1, 200, rng.integers(1, 30)).tolist()
        n_most = int(rng.integers(1, 12))
        chosen = choose_batch(lengths, n_most)
        picked = [lengths[i] for i in chosen]
        assert chosen[0] == 0
        assert len(chosen) == len(set(chosen)) <= n_most
        assert max(picked) <= MAX_LENGTH_RATIO * min(picked)
        left = [n for i, n in enumerate(lengths) if i not in chosen]
        fitting = [n for n in left if max(*picked, n) <= MAX_LENGTH_RATIO * min(*picked, n)]
        farthest = max(abs(n - lengths[0]) for n in picked)
        assert all(abs(n - lengths[0]) >= farthest for n in fitting)  # the nearest were taken
        assert len(chosen) == n_most or not fitting  # and none was left out without need


def test_a_batch_holds_windows_of_several_files_and_of_like_length(tmp_path):
    rng = np.random.default_rng(0)
    paths = []
    for number in range(60):
        paths.append(tmp_path / f"{number}.wav")
        soundfile.write(paths[-1], np.full(rng.integers(3000, 40000), number / 100), RATE)
    meter = Meter(n_threads=2, pause=0.02)
    files = list(tag_files(meter, paths, TagOptions(1), chunk_seconds=1.0, batch_size=4))
    assert [file.path for file in files] == paths
    assert all(window.tags[0][0] in ("level", "short") for file in files for window in file.windows)
    assert sum(map(len, meter.batches)) == sum(len(file.windows) for file in files)
    for batch in meter.batches:
        assert len(batch) <= 4
        assert max(map(len, batch)) <= MAX_LENGTH_RATIO * min(map(len, batch))
    assert max(len({round(float(clip[0]), 2) for clip in batch}) for batch in meter.batches) >= 3  # files


def test_long_windows_make_small_batches_and_few_are_held(tmp_path):
    rate = 1000
    path = steady(tmp_path / "long.wav", [k / 1000 for k in range(800)], rate)
    meter = Meter(sample_rate=rate, pause=0.005)
    held = watch_pool()
    with held as sizes:
        list(tag_files(meter, [path, path], chunk_seconds=20.0, batch_size=4))
    assert sum(map(len, meter.batches)) == 80
    assert max(map(len, meter.batches)) == 2
    assert max(samples for _, samples in sizes) == 16 * tagging.files.TYPICAL_SECONDS * rate  # 8 windows of 20 s
    assert max(windows for windows, _ in sizes) == 8


@contextlib.contextmanager
def watch_pool():
    """Give a list that gets windows and samples in the pool whenever one is added."""
    sizes = []
    original = tagging.files.WindowPool.put

    def put(self, pending):
        result = original(self, pending)
        with self.changed:
            sizes.append((len(self.windows), sum(len(pending.samples) for pending in self.windows)))
        return result

    tagging.files.WindowPool.put = put
    try:
        yield sizes
    finally:
        tagging.files.WindowPool.put = original


def test_the_pool_never_holds_more_than_its_capacity(tmp_path):
    paths = [steady(tmp_path / f"{number}.wav", [0.1] * 20) for number in range(8)]
    with watch_pool() as sizes:
        list(tag_files(Meter(n_threads=2, pause=0.01), paths, chunk_seconds=0.5, batch_size=3, n_decoders=4))
    assert len(sizes) == 8 * 40
    assert max(windows for windows, _ in sizes) == 4 * 3 * 2


def test_other_rates_and_channels_become_the_models(tmp_path):
    stereo = np.stack([np.full(44100, 0.75), np.full(44100, 0.25)], axis=1)
    soundfile.write(tmp_path / "stereo.flac", stereo, 44100)
    (file,) = tag_files(Meter(), [tmp_path / "stereo.flac"], TagOptions(1))
    assert (file.windows[0].end, len(file.windows)) == (1.0, 1)
    assert file.windows[0].tags[0][1] == pytest.approx(0.5, abs=1e-2)


def test_unreadable_files_keep_their_place_and_say_why(tmp_path):
    good = steady(tmp_path / "good.wav", [0.5])
    text, empty, short = tmp_path / "text.wav", tmp_path / "empty.wav", tmp_path / "short.flac"
    text.write_text("this is no sound")
    soundfile.write(empty, np.zeros(0), RATE)
    soundfile.write(short, np.zeros(RATE), RATE)
    short.write_bytes(short.read_bytes()[:20])
    nan = tmp_path / "nan.wav"
    soundfile.write(nan, np.full(100, np.nan, np.float32), RATE, subtype="FLOAT")
    paths = [text, good, empty, short, nan, tmp_path / "absent.wav", good]
    files = list(tag_files(Meter(), paths))
    assert [file.path for file in files] == paths
    assert [file.fault is None for file in files] == [False, True, False, False, False, False, True]
    assert all(not file.windows for file in files if file.fault)
    assert "no samples" in str(files[2].fault)
    assert "not finite" in str(files[4].fault)
    assert "no such file" in str(files[5].fault)


@pytest.mark.parametrize("n_threads", [1, 3])
def test_a_file_whose_fault_shows_late_gives_no_windows(tmp_path, monkeypatch, n_threads):
    decode_here(monkeypatch, 4000)
    good = steady(tmp_path / "good.wav", [0.25])
    bad = tmp_path / "bad.wav"
    samples = np.full(40 * RATE, 0.75, np.float32)
    samples[-10] = np.nan
    soundfile.write(bad, samples, RATE, subtype="FLOAT")
    meter = Meter(n_threads)
    files = list(tag_files(meter, [good, bad, good], TagOptions(1), chunk_seconds=0.5, batch_size=2))
    assert sum(clip[0] == 0.75 for batch in meter.batches for clip in batch) > 30  # tagged before it showed
    assert [file.path for file in files] == [good, bad, good]
    assert [len(file.windows) for file in files] == [2, 0, 2]
    assert files[1].fault is not None
    assert "not finite" in files[1].fault


def test_a_file_that_ends_early_is_tagged_and_noted(tmp_path):
    whole, cut = steady(tmp_path / "whole.wav", [0.5] * 3), tmp_path / "cut.wav"
    cut.write_bytes(whole.read_bytes()[: 44 + 2 * 2 * RATE])
    files = list(tag_files(Meter(), [whole, cut], chunk_seconds=1.0))
    assert [len(file.windows) for file in files] == [3, 2]
    assert files[0].fault is files[1].fault is None
    assert files[0].warnings == {}
    assert files[1].warnings == {"truncated": "ends before the length that its header announces (2.00 of 3.00 s)"}


class Failing(Meter):
    def predict(self, clips):
        if len(self.batches) == 5:
            raise UserError("the battery is empty")
        return super().predict(clips)


@pytest.mark.parametrize("n_threads", [1, 4])
def test_errors_of_the_engine_reach_the_caller_and_all_threads_end(tmp_path, n_threads):
    paths = [steady(tmp_path / f"{number}.wav", [0.5] * 30) for number in range(6)]
    files = tag_files(Failing(n_threads), paths, chunk_seconds=0.5, batch_size=1, n_decoders=3)
    with at_most(20), pytest.raises(UserError, match="the battery is empty"):
        list(files)


def test_errors_of_the_list_of_files_reach_the_caller(tmp_path):
    def paths():
        yield steady(tmp_path / "a.wav", [0.5])
        raise OSError("the list broke off")

    with at_most(20), pytest.raises(OSError, match="broke off"):
        list(tag_files(Meter(), paths()))


def test_no_thread_is_left_when_the_caller_stops_early(tmp_path):
    paths = [steady(tmp_path / f"{number}.wav", [0.5] * 30) for number in range(20)]
    meter = Meter(2)
    files = tag_files(meter, paths, chunk_seconds=0.5, batch_size=2)
    with at_most(20):
        assert next(files).path == paths[0]
        files.close()  # the fixture looks for threads
    assert sum(map(len, meter.batches)) < 20 * 60


def test_hundreds_of_short_files_wait_behind_a_long_one_without_a_dead_lock(tmp_path):
    long = steady(tmp_path / "long.wav", [0.75] + [0.5] * 59)
    short = steady(tmp_path / "short.wav", [0.25])
    begun = []
    far_enough = threading.Event()

    def paths():
        for path in [long, *[short] * 600]:
            begun.append(path)
            if len(begun) == MAX_FILES_AHEAD:
                far_enough.set()
            yield path

    class Waiting(Meter):
        def predict(self, clips):
            if clips[0][0] == 0.75:  # the long file cannot be finished until no more may be begun
                assert far_enough.wait(10)
                time.sleep(0.1)
            return super().predict(clips)

    with at_most(30):
        files = tag_files(Waiting(2), paths(), TagOptions(1), chunk_seconds=1.0, batch_size=4)
        assert len(next(files).windows) == 60
        assert len(begun) <= MAX_FILES_AHEAD + 2
        assert [file.windows[0].tags for file in files] == [[("level", 0.25)]] * 600


def test_results_wait_no_further_ahead_than_they_may(tmp_path):
    short = steady(tmp_path / "short.wav", [0.25])
    begun = []
    files = tag_files(Meter(), (begun.append(number) or short for number in range(900)), batch_size=4)
    for handed_over in range(1, 500):
        next(files)
        assert len(begun) <= handed_over + MAX_FILES_AHEAD
    time.sleep(0.2)
    assert len(begun) <= 499 + MAX_FILES_AHEAD
    files.close()


def test_seconds_are_counted_as_windows_are_done(tmp_path):
    seconds = []
    list(tag_files(Meter(2), [steady(tmp_path / "a.wav", [0.5] * 5)], chunk_seconds=2.0, on_window=seconds.append))
    assert sorted(seconds) == [1.0, 2.0, 2.0]


def test_more_labels_requested_than_there_are_gives_all(tmp_path):
    (file,) = tag_files(Meter(), [steady(tmp_path / "a.wav", [0.5])], TagOptions(10))
    assert [label for label, _ in file.windows[0].tags] == ["level", "short", "never"]


@pytest.mark.parametrize(
    ("wanted", "labels"),
    [
        (TagOptions(), ["c", "a", "d"]),
        (TagOptions(2), ["c", "a"]),
        (TagOptions(None), ["c", "a", "d", "b"]),
        (TagOptions(None, 0.3), ["c", "a", "d"]),
        (TagOptions(1, 0.3), ["c"]),
        (TagOptions(3, 0.8), []),
        (TagOptions(None, 0.0), ["c", "a", "d", "b"]),
    ],
)
def test_labels_are_chosen_by_number_and_threshold(wanted, labels):
    tags = wanted.select(np.array([0.5, 0.1, 0.7, 0.3], np.float32), ["a", "b", "c", "d"])
    assert [label for label, _ in tags] == labels
    assert [value for _, value in tags] == sorted((value for _, value in tags), reverse=True)


def test_windows_too_long_for_the_engine_are_refused_before_anything_is_read(tmp_path):
    meter = Meter()
    meter.max_samples = 5 * RATE
    assert len(list(tag_files(meter, [steady(tmp_path / "a.wav", [0.5])], chunk_seconds=5.0))) == 1
    with pytest.raises(UserError, match=r"meter takes at most 5\.00 s at once, not windows of 5\.1 s"):
        list(tag_files(meter, [tmp_path / "absent.wav"], chunk_seconds=5.1))


def test_embeddings_of_an_engine_that_has_none_are_refused(tmp_path):
    with pytest.raises(UserError, match="meter has no embeddings"):
        list(tag_files(Meter(), [steady(tmp_path / "a.wav", [0.5])], TagOptions(embeddings=True)))


def test_a_model_that_gives_nan_is_named(tmp_path):
    class Broken(AudioTagger):
        def __init__(self):
            super().__init__(CedMel(), num_classes=3, embed_dim=1)

        def forward(self, waveform, lengths=None):
            return torch.full((len(waveform), 3), torch.nan)

    with pytest.raises(UserError, match=r"Broken.* NaN"):
        list(tag_files(TorchEngine(Broken()), [steady(tmp_path / "a.wav", [0.5])]))


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("mixed")
    paths = []
    for number, (suffix, rate, seconds) in enumerate(
        [
            (".wav", 16000, 2.3),
            (".flac", 44100, 1.0),
            (".ogg", 22050, 3.05),
            (".wav", 8000, 0.4),
            (".wav", 16000, 0.01),
            *((".wav", 16000, 0.5 + 0.13 * k) for k in range(12)),
        ]
    ):
        paths.append(folder / f"{number:02}{suffix}")
        soundfile.write(paths[-1], humming(number, seconds, rate), rate)
    return paths


def test_tags_do_not_depend_on_the_batch(mixed, pico):
    every = TagOptions(None)
    together = list(tag_files(pico, mixed, every, chunk_seconds=1.0, batch_size=16))
    alone = [file for path in mixed for file in tag_files(pico, [path], every, chunk_seconds=1.0, batch_size=1)]
    values = []
    for one, other in zip(together, alone, strict=True):
        assert one.path == other.path
        for batched, single in zip(one.windows, other.windows, strict=True):
            assert (batched.start, batched.end) == (single.start, single.end)
            assert dict(batched.tags) == pytest.approx(dict(single.tags), abs=1e-5)
            values.append([value for _, value in sorted(single.tags)])
    assert [len(file.windows) for file in together[:5]] == [3, 1, 3, 1, 1]
    assert np.std(values, axis=0).max() > 1e-2  # the windows do differ


def test_probabilities_are_the_models_own(tmp_path, pico):
    samples = humming(3, 1.0)
    soundfile.write(tmp_path / "a.wav", samples, RATE, subtype="FLOAT")
    (file,) = tag_files(pico, [tmp_path / "a.wav"], TagOptions(6))
    with torch.inference_mode():
        expected = pico.model.predict(torch.from_numpy(samples)[None])[0]
    assert dict(file.windows[0].tags) == pytest.approx(dict(zip(pico.labels, expected.tolist(), strict=True)), abs=1e-6)
    probabilities = [value for _, value in file.windows[0].tags]
    assert probabilities == sorted(probabilities, reverse=True)
