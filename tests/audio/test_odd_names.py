"""Names that lists could not hold once: from the file on disk to the clip that training reads."""

import os
import subprocess
import unicodedata
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile

from audio.dataset import Pack
from audio.file_names import as_text, decode_name, locate
from audio.manifest import NameIndex, read_manifest, resolve, spellings
from audio.pack import pack

NFC, NFD = "größe/é.wav", unicodedata.normalize("NFD", "größe/é.wav")


def write_sound(path: Path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        soundfile.write(file, np.full(400, value, np.int16), 16000, format="WAV")


def packed(folder: Path, table: pd.DataFrame, list_path: Path, layout: str) -> Pack:
    pack(table, list_path, folder / layout, "x", layout=layout, n_workers=0, progress=False)
    return Pack.open(folder / layout / "labels" / "x.tsv")


@pytest.mark.parametrize("layout", ["flat", "clips"])
def test_every_name_that_find_prints_is_packed_and_found_again(tmp_path: Path, layout: str) -> None:
    """Quotation marks, spaces, bytes that are no UTF-8, decomposed letters: a plain list through a pack."""
    names = [
        b'"a.wav', b'"b".wav', b'c".wav', b" d .wav", b"e;f,g.wav", "日本.wav".encode(), NFD.encode(),
        b"gr\xfcn.wav", b"\xe9\x81.wav", "ü/".encode() + b"\xfc.wav",
    ]  # fmt: skip
    for value, name in enumerate(names, 1):
        write_sound(tmp_path / "s" / os.fsdecode(name), 100 * value)
    found = subprocess.run(["find", "s", "-name", "*.wav"], cwd=tmp_path, capture_output=True, check=True).stdout
    (tmp_path / "list.tsv").write_bytes(b"filename\n" + found)
    table = read_manifest(tmp_path / "list.tsv")
    assert sorted(table["filename"]) == sorted("s/" + decode_name(name) for name in names)
    opened = packed(tmp_path, table, tmp_path / "list.tsv", layout)
    values = {name: round(float(opened.read(i)[0]) * 32768) for i, name in enumerate(opened.names)}
    assert values == {"s/" + decode_name(name): 100 * value for value, name in enumerate(names, 1)}
    report = (tmp_path / layout / "labels" / "x.report.json").read_text(encoding="utf-8")
    assert '"packed": 10' in report
    opened.table.to_parquet(tmp_path / "x.parquet")
    assert pd.read_parquet(tmp_path / "x.parquet")["filename"].tolist() == opened.names


def test_a_name_with_a_line_break_is_left_out_with_a_sentence(tmp_path: Path) -> None:
    write_sound(tmp_path / "a.wav", 1)
    table = pd.DataFrame({"filename": ["a.wav", "b\nc.wav"]})
    report = pack(table, tmp_path / "list.tsv", tmp_path / "out", "x", n_workers=0, progress=False)
    assert report.n_packed == 1
    [(name, reason)] = report.left_out["unreadable"]
    assert name == "b\nc.wav"
    assert "line break, which lists of sounds do not support; rename the file" in reason


@pytest.mark.parametrize(("listed", "on_disk"), [(NFC, NFD), (NFD, NFC)])
def test_a_file_is_found_by_either_form_of_unicode(tmp_path: Path, listed: str, on_disk: str) -> None:
    write_sound(tmp_path / on_disk, 1)
    assert resolve(listed, tmp_path / "list.tsv") == tmp_path / on_disk
    assert resolve(str(tmp_path / listed), "elsewhere/list.tsv") == tmp_path / on_disk
    assert resolve("größe/è.wav", tmp_path / "list.tsv") == Path("größe/è.wav")


def test_folder_and_file_may_be_spelt_in_different_ways(tmp_path: Path) -> None:
    place = tmp_path / os.fsdecode(b"\xfcber") / unicodedata.normalize("NFD", "é.wav")
    write_sound(place, 1)
    assert locate(tmp_path / "über" / "é.wav") == place
    assert locate(tmp_path / "über" / "e.wav") is None
    assert as_text(str(place)).endswith("/über/" + unicodedata.normalize("NFD", "é.wav"))


@pytest.mark.parametrize(("stored", "wanted"), [(NFC, NFD), (NFD, NFC), (f"old/{NFC}", f"new/{NFD}"), (NFC, "é.flac")])
def test_either_form_of_unicode_is_the_same_clip(stored: str, wanted: str) -> None:
    index = NameIndex(["other.wav", stored])
    assert index.find(wanted) == 1
    assert index.find_all([wanted, "other.wav"]).tolist() == [1, 0]


def test_two_files_that_differ_only_in_form_stay_two() -> None:
    for names in ([NFC, NFD], [NFD, NFC]):
        index = NameIndex(names)
        assert index.find_all(names).tolist() == [0, 1]
        assert [index.find(name) for name in names] == [0, 1]
        assert index.find("elsewhere/é.flac") == -1


def test_a_decomposed_name_has_its_composed_spelling() -> None:
    assert spellings(NFD) == [NFD, NFC, "é.wav", "é"]
