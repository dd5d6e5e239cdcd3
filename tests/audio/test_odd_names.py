"""Names that lists could not hold once: from the file on disk to the clip that training reads."""

import os
import random
import shutil
import subprocess
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile

from audio.dataset import Pack
from audio.file_names import as_text, decode_name, locate
from audio.manifest import NameIndex, read_manifest, resolve, spellings
from audio.pack import pack
from common.errors import UserError

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


LONG, NUL = "x" * 300 + ".wav", "n\0l.wav"


def test_odd_rows_of_a_list_are_left_out_one_by_one_with_their_reason(tmp_path: Path) -> None:
    """A tab, a carriage return, a NUL, a name too long and bytes that are no UTF-8 among good names."""
    names = [f"{number}.wav" for number in range(6)]
    for name in [*names, "a\tb.wav", os.fsdecode(b"gr\xfcn.wav")]:
        write_sound(tmp_path / name, 1)
    rows = [*(f"{name}\tdog" for name in names), "a\tb.wav\tdog", "c\rd.wav\tdog", f"{LONG}\tdog", f"{NUL}\tdog"]
    content = "filename\tlabels\n" + "\n".join(rows) + "\n"
    (tmp_path / "list.tsv").write_bytes(content.encode() + b"gr\xfcn.wav\tdog\n")
    left_out: list[tuple[str, str]] = []
    table = read_manifest(tmp_path / "list.tsv", left_out=left_out)
    report = pack(table, tmp_path / "list.tsv", tmp_path / "out", "x", n_workers=0, progress=False, left_out=left_out)
    assert (report.n_listed, report.n_packed) == (11, 7)
    reasons = dict(report.left_out["unreadable"])
    assert reasons.keys() == {"a\tb.wav\tdog", "c\rd.wav\tdog", LONG, NUL}
    assert "line 8 has 3 fields, expected 2; rename the file" in reasons["a\tb.wav\tdog"]
    assert "line 9 has a carriage return" in reasons["c\rd.wav\tdog"]
    assert "has 304 characters" in reasons[LONG]
    assert "NUL character" in reasons[NUL]
    assert Pack.open(tmp_path / "out" / "labels" / "x.tsv").names == [*names, "grün.wav"]


def test_a_tab_in_a_plain_list_belongs_to_the_name(tmp_path: Path) -> None:
    for name in ("a\tb.wav", "c.wav", "d.wav"):
        write_sound(tmp_path / name, 1)
    (tmp_path / "list.tsv").write_text("filename\nc.wav\na\tb.wav\nd.wav\n")
    left_out: list[tuple[str, str]] = []
    table = read_manifest(tmp_path / "list.tsv", left_out=left_out)
    opened = packed(tmp_path, table, tmp_path / "list.tsv", "flat")
    assert (opened.names, left_out) == (["c.wav", "a\tb.wav", "d.wav"], [])


def test_a_list_whose_header_lacks_a_column_is_still_refused(tmp_path: Path) -> None:
    (tmp_path / "list.tsv").write_text("filename\na.wav\tdog\nb.wav\tcat\n")
    with pytest.raises(UserError, match="does the header lack the name of a column"):
        read_manifest(tmp_path / "list.tsv", left_out=[])


def mutate(rng: random.Random) -> bytes:
    """Return a list of sounds in which some bytes are odd."""
    lines = [b"filename\tlabels"] + [b"%d.wav\tdog" % number for number in range(rng.randint(1, 12))]
    odd = [b"\t", b"\r", b"\0", b'"', b"\xff", b"\n", b"x" * 5000, b"/" * 20, b"\xe2\x80\xa8", b"..", b"\\", b",", b""]
    for _ in range(rng.randint(1, 6)):
        row = rng.randrange(rng.randint(0, 1), len(lines))  # now and then the header
        place = rng.randint(0, len(lines[row]))
        lines[row] = lines[row][:place] + rng.choice(odd) + lines[row][place:]
    return b"\n".join(lines)


def pack_mutated_lists(folder: Path, seeds: range) -> None:
    for number in range(12):
        write_sound(folder / f"{number}.wav", 1)
    n_packed = 0
    for seed in seeds:
        content = mutate(random.Random(seed))
        (folder / "list.tsv").write_bytes(content)
        left_out: list[tuple[str, str]] = []
        try:
            table = read_manifest(folder / "list.tsv", left_out=left_out)
            out = folder / f"out{seed}"
            report = pack(table, folder / "list.tsv", out, "x", n_workers=0, progress=False, left_out=left_out)
        except UserError:
            continue
        opened = Pack.open(out / "labels" / "x.tsv")
        assert report.n_packed + sum(map(len, report.left_out.values())) == report.n_listed
        assert len(opened) == report.n_packed
        n_packed += report.n_packed
        shutil.rmtree(out)
    assert n_packed > len(seeds)


def test_every_row_of_a_mutated_list_is_packed_or_reported(tmp_path: Path) -> None:
    pack_mutated_lists(tmp_path, range(40))


@pytest.mark.long
def test_every_row_of_thousands_of_mutated_lists_is_packed_or_reported(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    pack_mutated_lists(tmp_path, range(1000, 4000))
    record_property("damaged lists", 3000)
