"""AudioSet's own lists: read as lists of sounds, and packed."""

from pathlib import Path

import numpy as np
import pytest
import soundfile

from audio.audioset import display_name, find_segments, other_name, read_segments
from audio.labels import list_classes, parse_labels
from audio.manifest import read_manifest
from common.errors import UserError
from models.labels import audioset_labels

HEAD = (
    "# Segments csv created Sun Mar  5 10:54:31 2017\n# num_ytids=3\n"
    "# YTID, start_seconds, end_seconds, positive_labels\n"
)
ROWS = (
    '--PJHxphWEs, 30.000, 40.000, "/m/09x0r,/t/dd00088"\n'
    'YZhevVpy1s_, 50.000, 60.000, "/m/012xff"\n'
    '--aE2O5G5WE, 0.000, 10.000, "/m/03fwl,/m/04rlf,/m/09x0r"\n'
)


def write(folder: Path, text: str = HEAD + ROWS) -> Path:
    path = folder / "balanced_train_segments.csv"
    path.write_text(text)
    return path


@pytest.mark.parametrize("head", [HEAD, "YTID,start_seconds,end_seconds,positive_labels\n"])
def test_a_list_of_segments_is_a_list_of_sounds(tmp_path: Path, head: str) -> None:
    """Whatever separator the caller has in mind."""
    (tmp_path / "wav").mkdir()
    for name in ("wav/Y--PJHxphWEs.wav", "wav/YYZhevVpy1s__50000_60000.flac", "wav/other.wav"):
        (tmp_path / name).write_bytes(b"x")
    table = read_manifest(write(tmp_path, head + ROWS))
    assert table["filename"].tolist() == [
        "wav/Y--PJHxphWEs.wav",
        "wav/YYZhevVpy1s__50000_60000.flac",
        "Y--aE2O5G5WE_0.000.wav",
    ]
    assert table["labels"].tolist() == ["/m/09x0r;/t/dd00088", "/m/012xff", "/m/03fwl;/m/04rlf;/m/09x0r"]
    assert table[["ytid", "start_seconds", "end_seconds"]].iloc[1].tolist() == ["YZhevVpy1s_", "50.000", "60.000"]


@pytest.mark.parametrize(
    "rows",
    [
        ROWS.replace('"/m/012xff"', "/m/012xff"),
        ROWS.replace("\n", "\n\n", 1),
        ROWS.replace("\n", "\n# a comment\n", 1),
        ROWS.replace("/m/09x0r,/t", " /m/09x0r , /t"),
        ROWS.replace('"\n', '" \n'),
        ROWS.replace(", ", ",\t"),
        ROWS + "\n",
    ],
    ids=["unquoted", "blank line", "comment", "spaces", "space at the end", "tabs", "blank end"],
)
def test_a_list_that_is_not_quite_as_published_is_the_same_list(tmp_path: Path, rows: str) -> None:
    (tmp_path / "one").mkdir()
    assert read_manifest(write(tmp_path, HEAD + rows)).equals(read_manifest(write(tmp_path / "one")))


@pytest.mark.parametrize(
    ("name", "is_it"),
    [
        ("--PJHxphWEs.wav", True),
        ("a/b/Y--PJHxphWEs.m4a", True),
        ("Y--PJHxphWEs_30.000.wav", True),
        ("--PJHxphWEs_30.flac", True),
        ("--PJHxphWEs_30.000_40.000.wav", True),
        ("--PJHxphWEs_30000_40000.wav", True),
        ("--PJHxphWEs_30000", True),
        ("--PJHxphWEs_31.wav", False),
        ("--PJHxphWEs_30_41.wav", False),
        ("--PJHxphWEx.wav", False),
        ("x--PJHxphWEs.wav", False),
    ],
)
def test_the_usual_names_of_a_segment_are_known(tmp_path: Path, name: str, is_it: bool) -> None:
    table = read_segments(path := write(tmp_path), path.read_bytes())
    assert find_segments(table, ["other.wav", name]) == [1 if is_it else -1, -1, -1]


def test_of_several_sounds_the_name_with_most_details_is_used(tmp_path: Path) -> None:
    table = read_segments(path := write(tmp_path), path.read_bytes())
    assert find_segments(table, ["--PJHxphWEs.wav", "--PJHxphWEs_30.000.wav", "b/--PJHxphWEs_30.000.wav"])[0] == 1


def test_lines_that_are_no_segments_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"line 5: found .--x, 30\.000., expected YTID, start_seconds"):
        read_manifest(write(tmp_path, HEAD + ROWS.splitlines()[0] + "\n--x, 30.000\n"))


def test_the_published_lists_are_read_whole(shared: Path) -> None:
    for name, n_segments in (("balanced_train_segments.csv", 22_160), ("eval_segments.csv", 20_371)):
        table = read_manifest(shared / "data/audioset" / name)
        assert len(table) == n_segments
        labels = parse_labels(table["labels"], audioset_labels())
        assert sum(map(len, labels)) > n_segments
        assert np.bincount(np.concatenate(labels), minlength=527).all()
        assert set(list_classes(table["labels"])) == set(audioset_labels())


def test_identifiers_and_display_names_are_those_of_the_table() -> None:
    assert (other_name("/m/09x0r"), other_name("Speech"), other_name("speech")) == ("Speech", "/m/09x0r", None)
    assert (display_name("/m/09x0r"), display_name("Speech"), display_name("/m/none")) == (
        "Speech",
        "Speech",
        "/m/none",
    )


def test_a_list_of_segments_is_packed_by_the_command(command, tmp_path: Path) -> None:
    (tmp_path / "audio").mkdir()
    soundfile.write(tmp_path / "audio/Y--PJHxphWEs_30.000.wav", np.full(800, 0.5), 16000)
    done = command("scripts/wavlist_to_hdf5.py", write(tmp_path), tmp_path / "out", "-n", "0")
    assert "packed      1 of 3 clips" in done.stdout
    packed = read_manifest(tmp_path / "out/labels/balanced_train_segments.tsv")
    assert packed["labels"].tolist() == ["/m/09x0r;/t/dd00088"]
    assert packed["filename"].tolist() == ["audio/Y--PJHxphWEs_30.000.wav"]
