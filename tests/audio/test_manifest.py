from pathlib import Path

import numpy as np
import pytest

from audio.manifest import NameIndex, read_manifest, resolve, spellings
from common.errors import UserError


def written(folder: Path, text: str) -> Path:
    path = folder / "list.tsv"
    path.write_text(text)
    return path


def test_values_stay_the_strings_they_are(tmp_path: Path) -> None:
    table = read_manifest(written(tmp_path, "filename\tlabels\tx\n007.wav\t1;2\tNA\nb c.wav\t3\t\n"))
    assert table.to_numpy().tolist() == [["007.wav", "1;2", "NA"], ["b c.wav", "3", ""]]


def test_a_short_row_is_filled_with_empty_strings(tmp_path: Path) -> None:
    assert read_manifest(written(tmp_path, "filename\tlabels\na.wav\n"))["labels"].tolist() == [""]


def test_another_delimiter_and_name_column(tmp_path: Path) -> None:
    path = written(tmp_path, "path,labels\na.wav,1\n")
    table = read_manifest(path, delimiter=",", filename_column="path")
    assert table["filename"].tolist() == ["a.wav"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "file is empty"),
        ("filename\n", "header but no rows"),
        ("file_name\na.wav\n", r"found the columns 'file_name'.*missing 'filename' \(did you mean 'file_name'\?\)"),
        ("audio/a.wav\naudio/b.wav\n", "looks like a clip rather than a header"),
        ("filename,labels\na.wav,3\n", "looks separated by ','"),
    ],
)
def test_a_faulty_list_gets_a_sentence(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        read_manifest(written(tmp_path, text))


def test_a_row_with_too_many_columns_is_reported_by_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="line 3"):
        read_manifest(written(tmp_path, "filename\tx\na.wav\t1\nb.wav\t1\t2\t3\n"))


def test_an_absent_list_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no\.tsv: there is no such file"):
        read_manifest(tmp_path / "no.tsv")


def test_paths_are_looked_for_beside_the_manifest_then_from_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "both.wav").touch()
    (tmp_path / "both.wav").touch()
    monkeypatch.chdir(tmp_path)
    manifest = tmp_path / "lists" / "list.tsv"
    assert resolve("both.wav", manifest) == tmp_path / "lists" / "both.wav"
    assert resolve("here.wav", manifest) == Path("here.wav")
    assert resolve("/some/where.wav", manifest) == Path("/some/where.wav")


def test_spellings_go_from_exact_to_loose() -> None:
    assert spellings("data/balanced/Y-0DdlOuIFUI_50.000.wav") == [
        "data/balanced/Y-0DdlOuIFUI_50.000.wav",
        "Y-0DdlOuIFUI_50.000.wav",
        "Y-0DdlOuIFUI_50.000",
        "-0DdlOuIFUI_50.000",
    ]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("audio/1-100032-A.ogg", "1-100032-A.wav"),
        ("Y-0DdlOuIFUI_50.000.wav", "data/balanced/-0DdlOuIFUI_50.000.wav"),
        ("Y-0DdlOuIFUI_50.000", "-0DdlOuIFUI_50.000.FLAC"),
        ("Y-0DdlOuIFUI.wav", "-0DdlOuIFUI"),
        ("Yabcdefghijk_30_40.wav", "abcdefghijk_30_40"),
        ("/mnt/a/data/x.wav", "data/x.flac"),
        ("./a/x.wav", "a//x.wav"),
        ("a\\x.wav", "a/x.wav"),
        ("old/place/x.wav", "new/place/x.wav"),
    ],
)
def test_other_spellings_of_a_clip_are_found_both_ways(one: str, other: str) -> None:
    for stored, wanted in ((one, other), (other, one)):
        index = NameIndex(["unrelated.wav", stored])
        assert index.find(wanted) == 1
        assert index.find_all([wanted]).tolist() == [1]


@pytest.mark.parametrize(
    ("stored", "wanted"),
    [
        (["-0DdlOuIFUI_50.000.wav"], "-0DdlOuIFUI_50"),  # ".000" is no extension
        (["-0DdlOuIFUI_50.000.wav"], "-0DdlOuIFUI_50.001.wav"),
        (["Yes.wav"], "es.wav"),  # no YouTube id behind the Y
        (["Yabcdefghij.wav"], "abcdefghij.wav"),  # 11 characters, the Y is one of them
        (["a/x.wav", "b/x.wav"], "x.wav"),  # two with the same stem
        (["a/x.wav", "b/x.wav"], "c/x.wav"),
        (["yes/1.wav", "yes/2.wav", "no/2.wav"], "no/1.wav"),  # stems do not identify clips in this store
        (["x.wav", "a/x.wav"], "b/x.wav"),  # nothing says that "b" is where the first came from
        (["a/x.wav", "b/x.flac"], "x.flac"),
        (["x.wav", "x.flac"], "x.ogg"),
        (["bba/x.wav", "c/x.wav"], "ba/x.flac"),  # half of a folder's name is no folder
        (["x.wav"], ""),
    ],
)
def test_doubt_is_no_match(stored: list[str], wanted: str) -> None:
    assert NameIndex(stored).find(wanted) == -1
    assert NameIndex(stored).find_all([wanted]).tolist() == [-1]


@pytest.mark.parametrize(
    ("stored", "wanted", "position"),
    [
        (["b/x.wav", "a/x.wav"], "a/x.wav", 1),
        (["b/x.wav", "a/x.wav"], "data/a/x.flac", 1),
        (["data/b/x.wav", "data/a/x.wav"], "a/x.ogg", 1),
        (["x.flac", "x.wav"], "x.wav", 1),
        (["x.flac", "x.wav"], "data/x.wav", 1),
        (["Y-0DdlOuIFUI.wav", "-0DdlOuIFUI.wav"], "-0DdlOuIFUI.flac", 1),
    ],
)
def test_the_relative_path_decides_between_equal_stems(stored: list[str], wanted: str, position: int) -> None:
    assert NameIndex(stored).find(wanted) == position


def test_two_clips_are_never_given_the_same_audio() -> None:
    assert NameIndex(["x.wav"]).find_all(["a/x.wav", "b/x.wav"]).tolist() == [-1, -1]
    assert NameIndex(["x.wav"]).find_all(["x.wav", "b/x.wav", "x.wav"]).tolist() == [0, -1, 0]
    # Folders disagree, and the wanted names themselves show that stems are no identity.
    assert NameIndex(["yes/1.wav"]).find_all(["no/1.wav", "yes/1.wav"]).tolist() == [-1, 0]


def test_a_large_store_is_searched_in_seconds() -> None:
    names = [f"full/Y{i:011d}_30.000.wav" for i in range(50_000)]
    found = NameIndex(names).find_all([f"{i:011d}_30.000" for i in range(50_000)])
    np.testing.assert_array_equal(found, np.arange(50_000))
