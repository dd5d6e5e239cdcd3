import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import inference
from models import create_model, save_checkpoint
from scripts.make_demo_sounds import FOLDER_TO_TAG, make_folder_to_tag

ROOT = Path(__file__).resolve().parent.parent
LABELS = ["Speech", "Chirp, tweet", "Bell", "Siren", "Rain"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "pico.pt"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = create_model("audiotransformer_pico", num_classes=5, labels=LABELS).eval()
    save_checkpoint(path, model, {})
    return path


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sounds")
    make_folder_to_tag(folder, seed=0)
    return folder


def read_csv(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_folder_of_mixed_formats_is_tagged_whole(checkpoint, sounds, tmp_path, capsys):
    inference.main([str(sounds), "-m", str(checkpoint), "-k", "2", "-c", "5", "--output", str(tmp_path / "tags.csv")])
    rows = read_csv(tmp_path / "tags.csv")
    for name, (_, seconds, _, _) in FOLDER_TO_TAG.items():
        own = [row for row in rows if row["filename"] == str(sounds / name)]
        starts = np.arange(0, seconds, 5.0)
        assert [float(row["start"]) for row in own] == np.repeat(starts, 2).tolist()
        assert [float(row["end"]) for row in own] == np.repeat(np.minimum(starts + 5, seconds), 2).tolist()
        assert {row["label"] for row in own} <= set(LABELS)
        for best, second in zip(own[::2], own[1::2], strict=True):
            assert 1 >= float(best["probability"]) >= float(second["probability"]) >= 0
            assert best["label"] != second["label"]
    assert len({row["filename"] for row in rows}) == len(FOLDER_TO_TAG)

    printed = capsys.readouterr().out.splitlines()
    first = next(row for row in rows if row["filename"].endswith("siren_over_rain.wav"))
    place = printed.index(first["filename"])
    assert printed[place + 1].startswith(f"  [   0.0 -    5.0 s]  {first['label']} {float(first['probability']):.3f}, ")
    assert printed[place + 2].startswith("  [   5.0 -    6.0 s]  ")
    assert len(printed) == len(FOLDER_TO_TAG) + len(rows) / 2


def test_a_batch_gives_what_one_at_a_time_gives(checkpoint, sounds, tmp_path):
    arguments = [str(sounds), "-m", str(checkpoint), "-k", "5", "-c", "4"]
    inference.main([*arguments, "--batch_size", "7", "--output", str(tmp_path / "batch.jsonl")])
    inference.main([*arguments, "--batch_size", "1", "--n_workers", "1", "--output", str(tmp_path / "one.jsonl")])
    together, alone = (
        [json.loads(line) for line in (tmp_path / name).read_text(encoding="utf-8").splitlines()]
        for name in ("batch.jsonl", "one.jsonl")
    )
    assert len(together) == sum(-(-seconds // 4) for _, seconds, _, _ in FOLDER_TO_TAG.values())
    for one, other in zip(together, alone, strict=True):
        values = {tag["label"]: tag["probability"] for tag in one["tags"]}
        assert values == pytest.approx({tag["label"]: tag["probability"] for tag in other["tags"]}, abs=1e-5)
        assert (one["filename"], one["start"], one["end"]) == (other["filename"], other["start"], other["end"])


def test_bad_files_are_listed_at_the_end_after_the_good_ones_were_tagged(checkpoint, tmp_path, capsys):
    folder = tmp_path / "mixed"
    folder.mkdir()
    tone = 0.1 * np.sin(np.arange(16000) * 0.2)
    soundfile.write(folder / "a_good.wav", tone, 16000)
    soundfile.write(folder / "b_empty.wav", tone[:0], 16000)
    (folder / "c_text.wav").write_text("these are words")
    soundfile.write(folder / "d_cut.flac", tone, 16000)
    (folder / "d_cut.flac").write_bytes((folder / "d_cut.flac").read_bytes()[:30])
    soundfile.write(folder / "e_good.ogg", tone, 16000)
    with pytest.raises(SystemExit) as exit_status:
        inference.main([str(folder), "-m", str(checkpoint), "--output", str(tmp_path / "tags.csv")])
    assert exit_status.value.code == 1
    names = {Path(row["filename"]).name for row in read_csv(tmp_path / "tags.csv")}
    assert names == {"a_good.wav", "e_good.ogg"}
    told = capsys.readouterr().err.splitlines()
    assert told[-4].startswith("3 of 5 files could not be read")
    for line, name in zip(told[-3:], ("b_empty.wav", "c_text.wav", "d_cut.flac"), strict=True):
        path, reason = line.split(": ", 1)
        assert path.strip() == str(folder / name)
        assert len(reason) > 5


def test_it_runs_from_any_folder_as_a_command(checkpoint, sounds, tmp_path):
    command = [
        sys.executable,
        str(ROOT / "inference.py"),
        "siren_over_rain.wav",
        "-m",
        str(checkpoint),
        "--device",
        "cpu",
    ]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=sounds, env=environment, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[0] == "siren_over_rain.wav"
    assert lines[1].startswith("  [   0.0 -    6.0 s]  ")
    assert lines[1].count(", ") - lines[1].count("Chirp, tweet") == 2  # three labels by default
    assert len(lines) == 2
    assert "1/1" in done.stderr  # the progress bar


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["absent.wav"], "absent.wav"),
        (["{sounds}", "--output", "tags.txt"], ".csv or .jsonl"),
        (["{sounds}", "-m", "ced_minni"], "ced_mini"),
    ],
)
def test_faults_are_sentences(arguments, sentence, checkpoint, sounds, capsys):
    arguments = [argument.format(sounds=sounds) for argument in arguments]
    if "-m" not in arguments:
        arguments += ["-m", str(checkpoint)]
    with pytest.raises(SystemExit) as exit_status:
        inference.main(arguments)
    assert exit_status.value.code == 1
    error = capsys.readouterr().err
    assert sentence in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    "wrong", [["-k", "0"], ["-c", "0"], ["--batch_size", "-1"], ["--n_workers", "0"], ["-c", "nan"]]
)
def test_impossible_numbers_are_refused(wrong, capsys):
    with pytest.raises(SystemExit) as exit_status:
        inference.main(["a.wav", *wrong])
    assert exit_status.value.code == 2
    assert "must be above 0" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_cuda_where_there_is_none_is_a_sentence(checkpoint, sounds, capsys):
    with pytest.raises(SystemExit):
        inference.main([str(sounds), "-m", str(checkpoint), "--device", "cuda"])
    assert "PyTorch sees no GPU here; use auto or cpu" in capsys.readouterr().err
