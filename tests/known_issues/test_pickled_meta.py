"""Published soft-target folders describe themselves in a pickle of modules: arbitrary code on load."""

import os
import pickle
import zipfile

import pytest

from common.errors import UserError
from distill.published_meta import read_published_meta


class Malicious:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def archive(path, payload):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("meta/data.pkl", payload)
    return path


def test_a_pickle_that_calls_a_function_is_refused_by_name_and_not_run(tmp_path):
    marker = tmp_path / "executed"
    path = archive(tmp_path / "meta.pt", pickle.dumps({"wavtransforms": Malicious(marker)}, protocol=2))
    with pytest.raises(UserError, match=r"contains posix\.mkdir"):
        read_published_meta(path)
    assert not marker.exists()


def test_the_published_pickle_becomes_plain_settings(shared):
    meta = read_published_meta(shared / "fixtures/published_logits_layout/chunk_10/meta.pt")
    assert meta["wavtransforms"] == {"Shift": {"min_shift": -0.5, "max_shift": 0.5, "p": 0.5}}
    assert meta["config"]["chunk_length"] == 10.0
    assert meta["config"]["topk"] == 20


@pytest.mark.parametrize("content", [b"", b"not a zip", pickle.dumps({"wavtransforms": 1})])
def test_anything_else_is_a_sentence(tmp_path, content):
    path = tmp_path / "meta.pt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"meta\.pt is not a meta\.pt"):
        read_published_meta(path)
    archive(path, content)
    with pytest.raises(UserError):
        read_published_meta(path)
