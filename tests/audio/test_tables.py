"""Tables of text: every row is read, by the documented rules, or its line is named."""

import csv
import io
import random
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from audio import tables
from audio.manifest import read_manifest
from audio.tables import load_text, parse_table
from common.errors import UserError


def read(folder: Path, content: str | bytes, **options) -> list[list[str]]:
    path = folder / "list.tsv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return read_manifest(path, **options).to_numpy().tolist()


def refused(folder: Path, content: str | bytes, **options) -> str:
    with pytest.raises(UserError) as caught:
        read(folder, content, **options)
    return str(caught.value)


# --- Quotation marks ---

NAMES = ['"a.wav', 'b".wav', '"c".wav', '"d"', 'e"f"g.wav', '""h.wav', 'i"', '"', '""', 'x"y""z', "plain.wav", '" .wav']


def test_a_plain_list_keeps_every_quotation_mark(tmp_path: Path) -> None:
    """As `find` prints names; those that are quoted from end to end lose their marks, as any table's fields do."""
    names = [name for name in NAMES if name not in ('"d"', '""')]
    assert read(tmp_path, "filename\n" + "\n".join(names) + "\n") == [[name] for name in names]


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC])
@pytest.mark.parametrize("delimiter", ["\t", ",", ";"])
def test_what_pandas_writes_is_read_as_it_was(tmp_path: Path, quoting: int, delimiter: str) -> None:
    names = [*NAMES, "a,b.wav", "c;d.wav", "tab\there.wav", "é.wav"]
    table = pd.DataFrame({"filename": names, "labels": ["dog", '"', "", "a b"] * 4})
    text = table.to_csv(sep=delimiter, index=False, quoting=quoting)
    assert read(tmp_path, text, delimiter=delimiter) == table.to_numpy().tolist()


def test_two_names_that_begin_with_a_mark_swallow_no_rows_between_them(tmp_path: Path) -> None:
    rows = [[f"{mark}{number}.wav", "dog"] for number, mark in enumerate(["", '"', "", "", '"', ""])]
    assert read(tmp_path, "filename\tlabels\n" + "".join(f"{name}\t{label}\n" for name, label in rows)) == rows


def test_quoted_fields_with_line_breaks_are_read_where_that_gives_every_row_its_columns(tmp_path: Path) -> None:
    rows = [["a.wav", 'two\nlines, "quoted"', "dog"], ["b.wav", "", "cat"]]
    buffer = io.StringIO()
    csv.writer(buffer).writerows([["filename", "what", "labels"], *rows])
    assert read(tmp_path, buffer.getvalue(), delimiter=",") == rows


def test_rows_in_doubt_are_refused_by_line(tmp_path: Path) -> None:
    text = refused(tmp_path, 'filename\tlabels\na.wav\tdog\n"b.wav\tcat\nc.wav\n')
    assert "line 3 has a quotation mark at the start of a field" in text
    assert "line 4 does not have 2 fields" in text


def reference(text: str, delimiter: str, width: int) -> list[list[str]]:
    """The documented rule for quotation marks, character by character."""
    rows = []
    for line in text.split("\n"):
        fields, rest = [], line
        while True:
            value = None
            if rest.startswith('"'):
                position, inner = 1, ""
                while position < len(rest):
                    if rest[position] != '"':
                        inner += rest[position]
                    elif rest[position + 1 : position + 2] == '"':
                        inner += '"'
                        position += 1
                    else:
                        break
                    position += 1
                if position < len(rest) and (position + 1 == len(rest) or rest[position + 1] == delimiter):
                    value, rest = inner, rest[position + 1 :]
            if value is None:
                value, separator, after = rest.partition(delimiter)
                rest = separator + after
            fields.append(value)
            if not rest:
                break
            rest = rest[1:]
        plain = line.split(delimiter)
        rows.append(plain if len(fields) < width == len(plain) else fields)
    return rows


def test_both_readers_follow_the_slow_rule_on_random_tables(tmp_path: Path) -> None:
    rng = random.Random(0)
    regular = 0
    for _ in range(400):
        width, n_rows = rng.randint(1, 3), rng.randint(1, 5)
        fields = ["".join(rng.choices('a"\t,é', (5, 2, 0, 1, 1), k=rng.randint(1, 4))) for _ in range(width * n_rows)]
        fields = [f'"{field}"' if rng.random() < 0.3 else field for field in fields]
        lines = ["\t".join(fields[i : i + width]) for i in range(0, len(fields), width)]
        text = "\t".join("abc"[:width]) + "\n" + "\n".join(lines)
        expected = reference("\n".join(lines), "\t", width)
        assert {len(row) for row in expected} == {width}
        expected = [row for row in expected if any(value.strip() for value in row)]
        assert parse_table("x", text.encode(), "\t").to_numpy().tolist() == expected
        careful = tables._read_carefully("x", text.encode(), "\t").to_numpy().tolist()
        assert [row for row in careful if any(value.strip() for value in row)] == expected
        regular += tables._read_regular(text.encode(), "\t") is not None
    assert 300 < regular < 400


# --- Rows and columns ---


def test_every_row_with_more_fields_than_the_header_is_named_with_what_was_found(tmp_path: Path) -> None:
    text = refused(tmp_path, "filename,labels\na.wav,dog,bark\nb.wav,cat\nc.wav,dog,a,b\n", delimiter=",")
    assert "line 2: found 3 fields ('a.wav', 'dog', 'bark'), wanted 2 (filename, labels)" in text
    assert "line 4: found 4 fields" in text
    assert "joined by ';'" in text


def test_a_header_that_lacks_a_column_is_named(tmp_path: Path) -> None:
    text = refused(tmp_path, "filename\tlabels\n1\ta.wav\tdog\n2\tb.wav\tcat\n")
    assert "every row has one field more than the header" in text


def test_a_tab_in_a_plain_list_is_named_by_line(tmp_path: Path) -> None:
    assert "line 3: found 2 fields ('b', 'c.wav')" in refused(tmp_path, "filename\na.wav\nb\tc.wav\n")


def test_what_is_too_much_and_empty_is_left_out(tmp_path: Path) -> None:
    assert read(tmp_path, "filename\tlabels\na.wav\tdog\t\t\nb.wav\tcat\n") == [["a.wav", "dog"], ["b.wav", "cat"]]


@pytest.mark.parametrize(
    "text",
    [
        "filename\tlabels\r\na.wav\tdog\r\nb.wav\t\r\n",
        "filename\tlabels\ra.wav\tdog\rb.wav\t\r",
        "\ufefffilename\tlabels\na.wav\tdog\nb.wav\t\n\n\n\n",
        "\n\nfilename\tlabels\na.wav\tdog\n\nb.wav",
        "filename\t labels \na.wav\tdog\n\t\n  \nb.wav\t\n\t\t\n",
        "filename\tlabels\t\t\na.wav\tdog\t\t\nb.wav\t\t\t\n",
    ],
    ids=["windows", "old mac", "blank lines at the end", "within", "of spaces and tabs", "empty columns"],
)
def test_line_ends_blank_lines_and_empty_columns_do_not_matter(tmp_path: Path, text: str) -> None:
    assert read(tmp_path, text) == [["a.wav", "dog"], ["b.wav", ""]]


def test_a_carriage_return_within_a_line_is_named(tmp_path: Path) -> None:
    assert "line 3 has a carriage return inside" in refused(tmp_path, "filename\na.wav\nb\rc.wav\n")


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    text = refused(tmp_path, "filename\tlabels\tx\tlabels\na.wav\tdog\t\tcat\n")
    assert "'labels' (columns 2, 4)" in text
    assert "rename or remove one" in text


def test_a_column_without_a_name_but_with_values_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "list.tsv"
    path.write_text("\tfilename\n0\ta.wav\n1\tb.wav\n")  # a DataFrame with its index
    assert read_manifest(path).columns.tolist() == ["Unnamed: 0", "filename"]


def test_a_separator_of_several_characters_is_refused(tmp_path: Path) -> None:
    assert "wanted one character" in refused(tmp_path, "filename\na.wav\n", delimiter=", ")


# --- Encodings ---


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_list_is_read_in_any_unicode_encoding_with_a_mark(tmp_path: Path, encoding: str) -> None:
    assert read(tmp_path, "filename\tlabels\r\ngrün.wav\t日本\r\n".encode(encoding)) == [["grün.wav", "日本"]]


def test_lines_that_are_no_utf8_are_read_as_windows_1252_and_reported(tmp_path: Path, caplog) -> None:
    content = b"filename\nplain.wav\n" + "schön/".encode() + b"gr\xfcn \x80.wav\n" + "é.wav\n".encode()
    assert read(tmp_path, content) == [["plain.wav"], ["schön/grün €.wav"], ["é.wav"]]
    assert "1 lines are not valid UTF-8" in caplog.text
    assert "line 3" in caplog.text
    assert read(tmp_path, b"filename\n\x81\xe9.wav\n") == [["\x81é.wav"]]  # no character of Windows-1252


@pytest.mark.parametrize(
    "content", ["filename\na.wav\n".encode("utf-16-le"), b"PK\x03\x04whatever", b"filename\n\0\0"], ids=str
)
def test_what_is_no_text_is_a_sentence(tmp_path: Path, content: bytes) -> None:
    assert "save it as text" in refused(tmp_path, content)


def test_half_a_utf16_file_is_a_sentence(tmp_path: Path) -> None:
    assert "begins as UTF-16" in refused(tmp_path, "filename\na.wav\n".encode("utf-16")[:-1])


def test_a_large_regular_list_takes_the_fast_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 100,000 rows none is handled in Python, in plain lists and quoted ones."""
    monkeypatch.setattr(tables, "_read_carefully", None)
    for mark in ("", '"'):
        lines = [f"{mark}data/Y{i:011}_30.000.wav{mark}\t{mark}{i % 527}{mark}\n" for i in range(100_000)]
        (tmp_path / "list.tsv").write_text("filename\tlabels\n" + "".join(lines))
        table = read_manifest(tmp_path / "list.tsv")
        assert table.shape == (100_000, 2)
        assert table.iloc[99_999].tolist() == ["data/Y00000099999_30.000.wav", str(99_999 % 527)]
        assert (table["labels"].to_numpy() == np.array([str(i % 527) for i in range(100_000)])).all()
    assert load_text(tmp_path / "list.tsv").count(b"\n") == 100_001
