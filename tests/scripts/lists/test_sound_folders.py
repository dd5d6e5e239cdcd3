import hashlib
import os

import numpy as np
import pytest

from common.errors import UserError
from scripts.lists import sound_folders
from scripts.lists.sound_folders import find_identical, find_sounds


def write(folder, *names, content=b"sound"):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def test_sounds_of_all_known_extensions_are_found_below_a_folder_and_others_counted(tmp_path):
    write(tmp_path / "s", "b.wav", "a/x.FLAC", "a/deep/y.Mp3", "a/notes.txt", "Makefile", "a/more.TXT", "v.aax")
    write(tmp_path / "s", ".hidden.wav", ".trash/z.wav", "a/._x.wav")
    write(tmp_path / "s", "a/empty.wav", content=b"")
    found = find_sounds(f"{tmp_path}/s/")
    assert found.names == ["a/deep/y.Mp3", "a/x.FLAC", "b.wav"]
    assert found.sizes.tolist() == [5, 5, 5]
    assert found.path("b.wav") == f"{tmp_path}/s/b.wav"
    assert found.not_sounds == {".txt": 2, "": 1}
    assert found.foreign == {".aax": 1}
    assert found.empty == ["a/empty.wav"]


@pytest.mark.parametrize("given", ["s", "s/", "./s", "."])
def test_paths_are_those_that_find_prints(tmp_path, monkeypatch, given):
    write(tmp_path / "s", "dog/a b.wav")
    monkeypatch.chdir(tmp_path)
    found = find_sounds(given)
    printed = os.popen(f"find {given} -type f").read().splitlines()
    assert [found.path(name).replace("//", "/") for name in found.names] == [
        line.replace("//", "/") for line in printed
    ]
    assert os.path.isfile(found.path(found.names[0]))


def test_links_are_followed_without_end_and_no_folder_is_listed_twice(tmp_path):
    write(tmp_path / "s", "z/real.wav")
    write(tmp_path / "outside", "o.wav", "sub/p.wav")
    for target, link in (("..", "s/z/loop"), ("z", "s/a_link"), ("../outside", "s/out"), ("../outside/sub", "s/sub")):
        os.symlink(target, tmp_path / link)
    os.symlink("real.wav", tmp_path / "s/z/copy.wav")
    os.symlink("nowhere", tmp_path / "s/gone.wav")
    os.symlink("self", tmp_path / "s/self")
    os.symlink("../../s", tmp_path / "outside/sub/back")
    found = find_sounds(str(tmp_path / "s"))
    assert found.names == ["out/o.wav", "out/sub/p.wav", "z/copy.wav", "z/real.wav"]
    assert found.broken_links == ["gone.wav", "self"]
    assert found.repeated_links == ["a_link", "out/sub/back", "sub", "z/loop"]


def test_the_order_of_the_file_system_changes_nothing(tmp_path, monkeypatch):
    write(tmp_path / "s", *(f"{kind}/{number}.wav" for kind in "cab" for number in range(5)))
    write(tmp_path / "t", "x/1.wav")
    for link in ("l2", "l1"):
        os.symlink(tmp_path / "t", tmp_path / "s" / link)
    listed = find_sounds(str(tmp_path / "s"))
    scandir = os.scandir

    class Backwards:
        def __init__(self, path):
            self.entries = sorted(scandir(path), key=lambda entry: entry.name, reverse=True)

        def __enter__(self):
            return self.entries

        def __exit__(self, *exception):
            pass

    monkeypatch.setattr(sound_folders.os, "scandir", Backwards)
    again = find_sounds(str(tmp_path / "s"))
    assert again.names == listed.names
    assert "l1/x/1.wav" in again.names
    assert again.repeated_links == listed.repeated_links == ["l2"]


def test_names_that_no_table_can_hold_are_left_out(tmp_path):
    write(tmp_path / "s", "fine\ttab.wav", "line\nbreak.wav", "carriage\rreturn.wav")
    found = find_sounds(str(tmp_path / "s"))
    assert found.names == ["fine\ttab.wav"]
    assert found.unlistable == ["carriage\rreturn.wav", "line\nbreak.wav"]


def test_a_name_that_is_no_utf8_is_listed_as_text_and_its_file_is_compared(tmp_path):
    """As archives from Windows leave them: the bytes of Windows-1252, here beside a copy under a plain name."""
    write(tmp_path / "s", "plain.wav", "grün.wav", content=b"the same bytes")
    for name in (b"gr\xf6\x80\xdfe.wav", b"gr\xfcn.wav"):  # the latter reads as the UTF-8 name beside it
        (tmp_path / "s").joinpath(os.fsdecode(name)).write_bytes(b"the same bytes")
    found = find_sounds(str(tmp_path / "s"))
    assert found.names == ["grö€ße.wav", "grün.wav", "plain.wav"]
    assert found.not_utf8 == ["grö€ße.wav"]
    assert found.unlistable == ["grün.wav"]
    assert find_identical(found) == [[0, 1, 2]]


@pytest.mark.parametrize(
    ("names", "message"),
    [((), "found nothing"), (("a.txt",), ".txt 1"), (("a.aax", "b.aax"), r"\.aax 2.*convert")],
)
def test_a_folder_without_sounds_is_an_error(tmp_path, names, message):
    (tmp_path / "s").mkdir()
    write(tmp_path / "s", *names)
    with pytest.raises(UserError, match=message):
        find_sounds(str(tmp_path / "s"))


def test_what_is_no_folder_is_an_error(tmp_path):
    write(tmp_path, "a.wav")
    with pytest.raises(UserError, match="no such folder"):
        find_sounds(str(tmp_path / "b"))
    with pytest.raises(UserError, match="is a file"):
        find_sounds(str(tmp_path / "a.wav"))


def test_identical_files_are_those_with_the_same_hash_of_all_bytes(tmp_path):
    """Among them files that differ only between the parts that are read first, and short ones."""
    rng = np.random.default_rng(0)
    long = bytearray(rng.bytes(60_000))
    other = bytearray(long)
    other[15_000] ^= 1  # neither in the first, the middle nor the last 4096 bytes
    contents = [bytes(long), bytes(other), bytes(long), b"a", b"b", b"a", bytes(long[:20_000]), bytes(long[:20_000])]
    contents += [rng.bytes(100) for _ in range(3)] + [bytes(other)]
    for number, content in enumerate(contents):
        write(tmp_path / "s", f"{number:02d}.wav", content=content)
    by_hash = {}
    for number, content in enumerate(contents):
        by_hash.setdefault(hashlib.sha256(content).digest(), []).append(number)
    expected = sorted(rows for rows in by_hash.values() if len(rows) > 1)
    assert expected == [[0, 2], [1, 11], [3, 5], [6, 7]]
    assert find_identical(find_sounds(str(tmp_path / "s"))) == expected


def test_only_files_of_equal_size_are_read(tmp_path, monkeypatch):
    write(tmp_path / "s", "a.wav", "b.wav", content=b"x" * 50_000)
    write(tmp_path / "s", "c.wav", content=b"x" * 50_001)
    write(tmp_path / "s", "d.wav", content=b"y" * 50_000)
    sampled, hashed = [], []
    sample, whole = sound_folders._hash_samples, sound_folders._hash_file
    monkeypatch.setattr(sound_folders, "_hash_samples", lambda path, size: sampled.append(path) or sample(path, size))
    monkeypatch.setattr(sound_folders, "_hash_file", lambda path, size: hashed.append(path) or whole(path, size))
    assert find_identical(find_sounds(str(tmp_path / "s"))) == [[0, 1]]
    assert sorted(path[-5] for path in sampled) == ["a", "b", "d"]
    assert sorted(path[-5] for path in hashed) == ["a", "b"]


def test_a_file_that_cannot_be_read_equals_no_other(tmp_path, monkeypatch):
    write(tmp_path / "s", "a.wav", "b.wav", "c.wav")
    sounds = find_sounds(str(tmp_path / "s"))
    (tmp_path / "s" / "b.wav").unlink()
    assert find_identical(sounds) == [[0, 2]]
