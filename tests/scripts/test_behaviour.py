"""Records of what a checkout computes, and what differs between two of them."""

import json
from pathlib import Path

import numpy as np
import pytest

from scripts.benchmarks import behaviour

ROOT = Path(__file__).resolve().parent.parent.parent


def test_a_checkout_gives_the_same_record_twice_and_another_network_another_one(tmp_path):
    checkout = behaviour.Checkout(ROOT, tmp_path)
    first, again = (checkout.compute("model", "audiotransformer_pico") for _ in range(2))
    assert first == again
    assert first["tags"]["first"][0] != first["tags"]["first"][1]
    other = checkout.compute("model", "audiotransformer_nano")
    assert {key for key in first if first[key] == other[key]} == set()


def test_entries_that_differ_are_listed_with_both_values_and_counted(tmp_path, capsys):
    records = [{"runs": {"a": [1.0], "b": [2.0]}}, {"runs": {"a": [1.0], "b": [2.0000001], "c": []}}]
    paths = [tmp_path / "one.json", tmp_path / "other.json"]
    for path, record in zip(paths, records, strict=True):
        path.write_text(json.dumps(record))
    assert behaviour.compare(*paths) == 2
    output = capsys.readouterr().out
    assert "runs: b" in output
    assert "2.0000001" in output
    assert "1 entries are equal, 2 differ" in output
    with pytest.raises(SystemExit) as ended:
        behaviour.main(["compare", *map(str, paths)])
    assert ended.value.code


def test_a_hash_changes_with_a_bit_a_shape_and_a_type():
    array = np.arange(6, dtype=np.float32)
    nudged = array.copy()
    nudged[3] = np.nextafter(nudged[3], 4)
    others = [nudged, array.reshape(2, 3), array.astype(np.float64)]
    assert len({behaviour.digest(each) for each in [array, *others]}) == 4
