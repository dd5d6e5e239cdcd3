"""One test for each trap that lists and stores of names fell into in published code and common readers."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from audio.dataset import Pack
from audio.manifest import NameIndex, read_manifest
from audio.pack import pack
from audio.shard_writer import ShardWriter
from common.errors import UserError
from tests.audio.test_odd_names import write_sound


def test_a_name_that_begins_with_a_quotation_mark_does_not_swallow_the_rows_behind_it(tmp_path: Path) -> None:
    """As pandas, with its defaults, reads a list of `find`: three rows of one."""
    text = 'filename\n"a.wav\nb.wav\n"c.wav\nd.wav\n'
    (tmp_path / "list.tsv").write_text(text)
    assert len(pd.read_csv(tmp_path / "list.tsv", sep="\t")) == 2
    assert read_manifest(tmp_path / "list.tsv")["filename"].tolist() == text.splitlines()[1:]


def test_labels_joined_by_the_separator_are_not_cut_at_the_header(tmp_path: Path) -> None:
    """As pandas does in silence with `index_col=False` where the first row has them."""
    (tmp_path / "list.csv").write_text("filename,labels\na.wav,dog,bark\nb.wav,cat\n")
    with pytest.warns(pd.errors.ParserWarning):
        cut = pd.read_csv(tmp_path / "list.csv", index_col=False)
    assert cut["labels"].tolist() == ["dog", "cat"]
    with pytest.raises(UserError, match="line 2: found 3 fields"):
        read_manifest(tmp_path / "list.csv", delimiter=",")


def test_one_latin_1_name_among_many_does_not_stop_a_list(tmp_path: Path) -> None:
    (tmp_path / "list.tsv").write_bytes(b"filename\na.wav\nb\xe9.wav\n")
    with pytest.raises(UnicodeDecodeError):
        pd.read_csv(tmp_path / "list.tsv")
    assert read_manifest(tmp_path / "list.tsv")["filename"].tolist() == ["a.wav", "bé.wav"]


def test_a_base_name_in_two_folders_is_refused_where_clips_are_known_by_it(tmp_path: Path) -> None:
    """Published packing stops half-way through its files then, with an error of HDF5."""
    for folder in "ab":
        write_sound(tmp_path / folder / "1.wav", 1)
    table = pd.DataFrame({"filename": ["a/1.wav", "b/1.wav"]})
    with pytest.raises(UserError, match=r"a/1\.wav and b/1\.wav"):
        pack(table, tmp_path / "x.tsv", tmp_path / "out", "x", layout="published", n_workers=0, progress=False)
    assert not (tmp_path / "out").exists()


def test_a_name_copied_from_a_mac_is_found(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "x_0.h5", 16000) as writer:
        writer.append("e\u0301.wav", np.ones(9, np.int16))
    (tmp_path / "x.tsv").write_text(f"filename\thdf5path\n\u00e9.wav\t{tmp_path / 'x_0.h5'}\n", encoding="utf-8")
    assert Pack.open(tmp_path / "x.tsv").n_samples.tolist() == [9]
    assert NameIndex(["\u00e9.wav"]).find("e\u0301.wav") == 0
