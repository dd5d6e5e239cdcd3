import re

import h5py
import pytest
import soundfile

import inference
import tagging.session
from common.errors import UserError
from tagging.events import merge_events
from tagging.files import TaggedWindow, TagOptions
from tagging.parts import Share
from tagging.session import Session, format_windows
from tests.tagging.sounds import RATE, Meter, humming, steady


class Kept:
    """An output that keeps what it gets."""

    def __init__(self, is_last=True, done=(), faults=None, warnings=None):
        self.is_last, self.done, self.faults, self.warnings = is_last, set(done), faults or {}, warnings or {}
        self.files = []

    def write(self, file):
        self.files.append(file)

    def flush(self):
        self.n_flushed = getattr(self, "n_flushed", 0) + 1

    def close(self, paths):
        return self.is_last


@pytest.fixture
def paths(tmp_path):
    bad = tmp_path / "1.wav"
    bad.write_text("no sound")
    return [steady(tmp_path / "0.wav", [0.5]), bad, *(steady(tmp_path / f"{i}.wav", [0.25] * i) for i in (2, 3))]


@pytest.mark.parametrize(
    ("last", "found_bad", "well"),
    [
        ([True, True], True, False),
        ([False, True], True, False),  # the others are through with everything
        ([True, False], True, True),  # one of them may still be writing, and it knows the faults
        ([False, False], True, True),
        ([False, True], False, True),
    ],
)
def test_of_several_processes_the_last_one_at_the_last_output_tells_of_faults(paths, last, found_bad, well):
    outputs = [Kept(is_last) for is_last in last]
    share = Share(1 if found_bad else 0, 2)
    assert Session(Meter(), TagOptions(), share=share).run(paths, outputs, quiet=True) is well
    assert [file.path for file in outputs[0].files] == paths[share.rank :: 2]


def test_faults_of_others_and_of_earlier_runs_are_reported_of_too(paths, capsys):
    good = [path for path in paths if path.name != "1.wav"]
    assert not Session(Meter(), TagOptions()).run(good, [Kept(faults={"elsewhere.wav": "no samples"})], quiet=True)
    assert "1 of 3 files could not be read:\n  elsewhere.wav: no samples\n" in capsys.readouterr().err


def test_a_file_that_one_output_lacks_is_tagged_again(paths):
    everything = [str(path) for path in paths]
    full, lacking = Kept(done=everything), Kept(done=everything[:3])
    Session(Meter(), TagOptions()).run(paths, [full, lacking], quiet=True)
    assert [file.path for file in lacking.files] == [file.path for file in full.files] == paths[3:]


def test_with_a_threshold_outputs_get_events(paths):
    output = Kept()
    Session(Meter(), TagOptions(None, 0.2), chunk_seconds=1.0).run(paths[2:], [output], quiet=True)
    found = [(window.start, window.end, window.tags) for window in output.files[1].windows]
    assert found == [(0.0, 3.0, [("level", 0.25)])]


@pytest.mark.parametrize(("hop", "seconds"), [(None, 2.0), (0.5, 1.5), (4.0, 1.0)])
def test_progress_counts_what_windows_share_once_and_moves_within_a_file(tmp_path, capsys, monkeypatch, hop, seconds):
    monkeypatch.setattr(tagging.session, "_Progress", Counting)
    soundfile.write(tmp_path / "a.wav", humming(1, 2.0), RATE)
    session = Session(Meter(pause=0.15), TagOptions(), chunk_seconds=1.0, hop_seconds=hop, batch_size=1)
    session.run([tmp_path / "a.wav"], [], quiet=True)
    assert Counting.seconds_of_last == seconds
    assert re.search(r"0/1 .* x real time", capsys.readouterr().err)  # before the file is through


class Counting(tagging.session._Progress):
    seconds_of_last = 0.0

    def __exit__(self, *unused):
        Counting.seconds_of_last = self.seconds
        super().__exit__()


def test_tags_are_laid_out_a_line_a_window():
    windows = [TaggedWindow(0, 10, [("Chirp, tweet", 0.75), ("Bell", 0.0625)]), TaggedWindow(3590.0, 3600.04)]
    assert format_windows(windows) == ["  [   0.0 -   10.0 s]  Chirp, tweet 0.750, Bell 0.062", "  [3590.0 - 3600.0 s]"]
    assert format_windows(merge_events([])) == []


def test_what_is_held_is_written_however_a_session_ends(paths):
    class Interrupted(Kept):
        def write(self, file):
            raise KeyboardInterrupt

    held = Kept()
    with pytest.raises(KeyboardInterrupt):
        Session(Meter(), TagOptions()).run(paths, [held, Interrupted()], quiet=True)
    assert (len(held.files), held.n_flushed) == (1, 1)


def test_what_an_engine_cannot_do_shows_before_anything_is_removed():
    with pytest.raises(UserError, match="embeddings requires a checkpoint"):
        Session(Meter(), TagOptions(embeddings=True)).check()
    Session(Meter(), TagOptions()).check()


def test_an_engine_that_cannot_embed_leaves_what_it_should_overwrite(tmp_path, monkeypatch, paths, capsys):
    target = tmp_path / "e.h5"
    with h5py.File(target, "w") as file:
        file.attrs["made_with"] = "{}"
    monkeypatch.setattr(Meter, "batch_size", 1, raising=False)
    monkeypatch.setattr(inference, "open_engine", lambda *unused, **also_unused: Meter())
    with pytest.raises(SystemExit):
        inference.main([str(paths[0]), "--embeddings", str(target), "--overwrite"])
    assert "embeddings requires a checkpoint" in capsys.readouterr().err
    assert target.exists()


@pytest.mark.parametrize(
    ("warning", "all_is_well"),
    [("truncated: ends early", False), ("joined: x; damaged: y", False), ("repaired: is_truncated; joined: z", True)],
)
def test_sound_that_is_missing_makes_the_status_1_also_where_another_process_or_start_found_it(
    tmp_path, capsys, warning, all_is_well
):
    path = steady(tmp_path / "a.wav", [0.5])
    output = Kept(done=[str(path)], warnings={str(path): warning})
    assert Session(Meter(), TagOptions(1)).run([path], [output], quiet=True) is all_is_well
    assert f"1 of 1 files have warnings:\n  {path}: {warning}" in capsys.readouterr().err
