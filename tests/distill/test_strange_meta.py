"""The pickled meta.pt of a stranger's folder of soft targets: its settings or one sentence."""

import os
import random
import zipfile

import pytest

from distill.published_layout import write_published_meta
from distill.published_meta import read_published_meta
from distill.replay import Replay
from tests.models.bombs import BOMBS, pickled, write_archive
from tests.models.strange import LIMIT_BYTES, check_one, mutate_bytes, peak_bytes

CONFIG = {
    **{"train_data": "a.tsv", "model": "ced_base", "outputpath": "out", "model_args": {}, "chunk_length": 10.0},
    **{"num_workers": 2, "epochs": 3, "batch_size": 4, "topk": 20, "wavtransforms": {}, "spectransforms": {}},
}


class AnyKey(dict):
    """Settings with a value for every key."""

    def __missing__(self, key):
        return None


@pytest.fixture(scope="module")
def meta(tmp_path_factory):
    path = tmp_path_factory.mktemp("meta") / "meta.pt"
    replay = Replay(
        {"Shift": {"min_shift": -0.5, "max_shift": 0.5, "p": 0.5}},
        [{"TimeMasking": {"time_mask_param": 20}}, {"FrequencyMasking": {"freq_mask_param": 8}}],
    )
    write_published_meta(path, replay, AnyKey(CONFIG))
    return path


def mutate_pickles(meta, n_mutations):
    right = read_published_meta(meta)
    source = zipfile.ZipFile(meta).read("meta/data.pkl")
    target = meta.with_name("mutated.pt")
    before = peak_bytes()
    n_right = 0
    for seed in range(n_mutations):
        write_archive(target, mutate_bytes(source, random.Random(seed)))
        n_right += check_one(lambda: read_published_meta(target), is_settings, f"mutation {seed}") == "right"
    assert peak_bytes() - before < LIMIT_BYTES
    assert is_settings(right)
    assert n_right < n_mutations


def is_settings(meta):
    """Whether settings are of the types that replay reads."""
    numbers = [*meta["wavtransforms"].get("Shift", {}).values()]
    numbers += [value for mask in meta["spectransforms"] for arguments in mask.values() for value in arguments.values()]
    return all(isinstance(number, int | float) for number in numbers) and all(
        isinstance(key, str) for key in meta["config"]
    )


def test_mutated_pickles_give_settings_or_a_sentence(meta):
    mutate_pickles(meta, 400)


@pytest.mark.long
def test_thousands_of_mutated_pickles_give_settings_or_a_sentence(meta, record_property):
    mutate_pickles(meta, 10_000)
    record_property("damaged pickles of published stores", 10_000)


@pytest.mark.parametrize("bomb", BOMBS)
def test_pickles_that_would_fill_memory_or_time_are_one_sentence(tmp_path, bomb):
    before = peak_bytes()
    path = write_archive(tmp_path / "meta.pt", BOMBS[bomb])
    check_one(lambda: read_published_meta(path), lambda value: False, bomb)
    assert peak_bytes() - before < LIMIT_BYTES


def test_a_compressed_pickle_is_one_sentence(tmp_path):
    data = pickled(b"N" * (20 << 20))
    path = write_archive(tmp_path / "meta.pt", data, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 1 << 20
    message = check_one(lambda: read_published_meta(path), lambda value: False, "compressed")
    assert "compressed" in message


def test_a_pipe_is_one_sentence(tmp_path):
    os.mkfifo(tmp_path / "meta.pt")
    check_one(lambda: read_published_meta(tmp_path / "meta.pt"), lambda value: False, "pipe")
