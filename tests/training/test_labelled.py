"""Labelled packs: which classes a column of labels has, whatever names these have."""

import logging
from pathlib import Path

import numpy as np
import pytest

from audio.dataset import Pack
from audio.shard_writer import ShardWriter
from common.errors import Faults
from models.labels import audioset_labels
from training.labelled import list_pack_classes, open_labelled


def labelled(folder: Path, labels: list[str]) -> Pack:
    with ShardWriter(folder / "x_0.h5", 16000) as writer:
        for clip in range(len(labels)):
            writer.append(f"{clip}.wav", np.full(9, clip, np.int16))
    rows = "".join(f"{clip}.wav\t{folder / 'x_0.h5'}\t{label}\n" for clip, label in enumerate(labels))
    (folder / "x.tsv").write_text("filename\thdf5path\tlabels\n" + rows)
    return Pack.open(folder / "x.tsv")


def test_identifiers_of_audioset_are_classes_by_their_display_names(tmp_path):
    pack = labelled(tmp_path, ["/m/09x0r;/m/0dgbq", "/m/0bt9lr", "Speech"])
    assert list_pack_classes(pack) == ["Civil defense siren", "Dog", "Speech"]
    faults = Faults("x")
    opened = open_labelled(str(tmp_path / "x.tsv"), audioset_labels(), faults)
    assert not faults.sentences
    names = [[audioset_labels()[index] for index in indices] for indices in opened.labels]
    assert names == [["Speech", "Civil defense siren"], ["Dog"], ["Speech"]]


@pytest.mark.parametrize(("labels", "warned"), [(["Dog", "Dog;cat", "dog"], True), (["dog", "cat", "dogs"], False)])
def test_classes_that_look_alike_are_warned_of_with_counts_and_stay_apart(tmp_path, caplog, labels, warned):
    caplog.set_level(logging.WARNING)
    assert len(list_pack_classes(labelled(tmp_path, labels))) == 3
    assert ("'Dog' (2 clips) and 'dog' (1 clips)" in caplog.text) == warned
    assert bool(caplog.text) == warned
