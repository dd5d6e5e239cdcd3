"""The table of probes: means over seeds, averages over tasks, shares of the teacher."""

import csv
import json

import pytest

from scripts.compare_probes import main


@pytest.fixture
def probes(tmp_path):
    for name, values in {
        "one_dogs_s1": 0.5, "one_dogs_s2": 0.6, "one_words_s1": 0.3, "one_words_s2": 0.2,
        "t_dogs_s1": 1.0, "t_words_s1": 0.6,
    }.items():  # fmt: skip
        (tmp_path / f"{name}.json").write_text(json.dumps({"value": values}))
    return tmp_path


def test_the_table_is_the_plain_arithmetic(probes, capsys):
    rows, teacher = f"One={probes}/one_{{task}}_s*.json", f"Big={probes}/t_{{task}}_s*.json"
    main(["--rows", rows, "--tasks", "dogs,words", "--teacher", teacher, "--output", str(probes / "out")])
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()[:4]]
    assert lines[0] == ["", "dogs", "words", "average", "% of teacher"]
    assert lines[2] == ["One", "55.0 ± 7.1", "25.0 ± 7.1", "40.0 ± 0.0", "50.0"]
    assert lines[3] == ["Big", "100.0", "60.0", "80.0", ""]
    with open(probes / "out" / "probes.csv") as file:
        assert [row["value"] for row in csv.DictReader(file)] == ["50", "60", "30", "20", "100", "60"]
    assert (probes / "out" / "probes.png").stat().st_size > 5000


def test_every_fault_is_reported_at_once(probes, capsys):
    (probes / "one_words_s2.json").write_text("{}")
    rows = f"One={probes}/one_{{task}}_s*.json,Two={probes}/two_{{task}}.json"
    with pytest.raises(SystemExit):
        main(["--rows", rows, "--tasks", "dogs,words"])
    message = capsys.readouterr().err
    assert "one_words_s2.json: not a file that `run.py probe` wrote" in message
    assert "One: the tasks have different numbers of files: 2 of dogs, 1 of words" in message
    assert "two_dogs.json" in message
    with pytest.raises(SystemExit):
        main(["--rows", "three", "--task", "x"])
    message = capsys.readouterr().err
    assert "unknown option --task (did you mean 'tasks'?)" in message
    assert "--tasks is missing" in message
