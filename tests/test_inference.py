import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import soundfile
import torch

import inference
from audio.io import read_audio
from models import create_model, load_model, save_checkpoint
from scripts.make_demo_sounds import FOLDER_TO_TAG, make_folder_to_tag
from tagging.rows import unescape_name
from tests.conftest import run_command

ROOT = Path(__file__).resolve().parent.parent
LABELS = ["Speech", "Chirp, tweet", "Bell", "Siren", "Rain"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "pico.pt"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = create_model("audiotransformer_pico", num_classes=5, labels=LABELS).eval()
    for parameter in model.parameters():
        parameter.data *= 1.5  # else random weights say 0.5 to everything
    save_checkpoint(path, model, {})
    return path


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sounds")
    make_folder_to_tag(folder, seed=0)
    return folder


def read_csv(path):
    with open(path, newline="", encoding="utf-8") as file:
        return [row | {"filename": unescape_name(row["filename"])} for row in csv.DictReader(file)]


def exit_status(*words):
    """What inference.py exits with."""
    try:
        inference.main([*map(str, words)])
    except SystemExit as stopped:
        return stopped.code
    return 0


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


def tone(rate, seconds=1.0, channels=1):
    sound = 0.1 * np.sin(np.arange(round(rate * seconds)) * 3000 / rate)
    return sound if channels == 1 else np.repeat(sound[:, None], channels, axis=1)


GOOD = {
    "a 8 bit.wav": (16000, 1, "PCM_U8"),
    "b 24 bit.wav": (48000, 2, "PCM_24"),
    "c float.wav": (44100, 1, "FLOAT"),
    "d 6 channels.wav": (48000, 6, "PCM_16"),
    "e 192 kHz.flac": (192000, 1, "PCM_24"),
    "f.mp3": (44100, 2, "MPEG_LAYER_III"),
    "deep/er/g.OGG": (22050, 1, "VORBIS"),
    "h.opus": (48000, 1, "OPUS"),
}


@pytest.fixture
def mixed(tmp_path):
    """Every kind of file that can be read, and in between those that cannot, or not whole."""
    folder = tmp_path / "mixed"
    (folder / "deep" / "er").mkdir(parents=True)
    for name, (rate, channels, subtype) in GOOD.items():
        kind = {"subtype": subtype, "format": "OGG" if subtype in ("VORBIS", "OPUS") else None}
        soundfile.write(folder / name, tone(rate, 1.5, channels), rate, **kind)
    return folder


def test_of_a_mixed_folder_every_readable_file_is_tagged_and_every_other_one_named(checkpoint, mixed, tmp_path, capsys):
    soundfile.write(mixed / "b_empty.wav", tone(16000)[:0], 16000)
    (mixed / "b_nothing.wav").write_bytes(b"")
    (mixed / "c_text.wav").write_text("these are words")
    soundfile.write(mixed / "d_cut.flac", tone(16000), 16000)
    (mixed / "d_cut.flac").write_bytes((mixed / "d_cut.flac").read_bytes()[:30])
    soundfile.write(mixed / "e_nan.wav", np.full(100, np.nan), 16000, subtype="FLOAT")
    soundfile.write(mixed / "t_truncated.wav", tone(16000, 3.0), 16000)
    (mixed / "t_truncated.wav").write_bytes((mixed / "t_truncated.wav").read_bytes()[: 44 + 2 * 20000])
    (mixed / "notes.txt").write_text("no sound, and not called one")
    bad = {
        "b_empty.wav": "no samples",
        "b_nothing.wav": "0 bytes",
        "c_text.wav": "cannot be decoded",
        "d_cut.flac": "cannot be decoded",
        "e_nan.wav": "not finite numbers",
    }
    target = tmp_path / "tags.csv"
    assert exit_status(mixed, "-m", checkpoint, "--output", target, "-c", 1) == 1
    rows = read_csv(target)
    message = capsys.readouterr().err
    for name, reason in bad.items():
        (row,) = (row for row in rows if row["filename"] == str(mixed / name))
        assert reason in row["error"]
        assert row["label"] == row["start"] == row["probability"] == ""
        assert f"  {mixed / name}: {row['error']}" in message
    assert f"{len(bad)} of {len(GOOD) + 6} files could not be read:" in message
    assert (
        f"1 of {len(GOOD) + 6} files have warnings:\n  {mixed / 't_truncated.wav'}: truncated: ends before the length"
        in message
    )
    for name in (*GOOD, "t_truncated.wav"):
        own = [row for row in rows if row["filename"] == str(mixed / name)]
        assert len(own) == 2 * 3
        last = 1.25 if name.startswith("t") else 1.5
        assert [float(row["end"]) for row in own] == pytest.approx([1.0] * 3 + [last] * 3, abs=0.1)
        assert all(row["error"] == "" and 0 < float(row["probability"]) < 1 for row in own)
        assert f"{mixed / name}: " not in message or name.startswith("t")
    assert "notes.txt" not in message
    assert len({row["filename"] for row in rows}) == len(GOOD) + 6


def test_the_same_tone_is_the_same_in_every_format(checkpoint, mixed, tmp_path):
    target = tmp_path / "tags.parquet"
    assert exit_status(mixed, "-m", checkpoint, "--output", target, "-k", 5, "--quiet") == 0  # all is well
    values = pd.read_parquet(target).pivot_table(index="filename", columns="label", values="probability")
    assert len(values) == len(GOOD)
    assert not values.isna().any(axis=None)
    lossless = [name for name in values.index if not name.lower().endswith(("mp3", "ogg", "opus"))]
    assert np.ptp(values.loc[lossless].drop(index=str(mixed / "a 8 bit.wav")).to_numpy(), axis=0).max() < 0.02


def test_names_in_any_bytes_are_tagged_printed_and_listed(checkpoint, tmp_path):
    folder = tmp_path / "names"
    folder.mkdir()
    names = ["a,b.wav", 'q"q.wav', "ne\nw.wav", "ümläut 梟.wav", "sep\u2028.wav", os.fsdecode(b"\xe4\xff.wav")]
    for name in names:
        soundfile.write(os.fsencode(folder / name), tone(16000), 16000, format="WAV")
    (folder / os.fsdecode(b"bad \xff.wav")).write_text("no sound")
    target = tmp_path / "tags.csv"
    words = "-m", checkpoint, "--output", target, "--plot", tmp_path / "plot", "--embeddings", tmp_path / "e.h5"
    result = run_command("inference.py", folder, *words)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert {row["filename"] for row in read_csv(target) if not row["error"]} == {str(folder / name) for name in names}
    assert len(list((tmp_path / "plot").glob("*.png"))) == len(names)
    assert "\\xe4\\xff.wav\n" in result.stdout
    assert "bad \\xff.wav: cannot be decoded" in result.stderr
    assert exit_status(folder, *words) == 1  # and again, though there is nothing to do
    assert len(read_csv(target)) == 3 * len(names) + 1


def test_a_threshold_makes_events_of_all_its_labels_and_topk_limits_them(checkpoint, sounds, tmp_path):
    path = sounds / "siren_over_rain.wav"
    model = load_model(checkpoint)
    samples, _ = read_audio(path, 16000)
    with torch.inference_mode():
        clips = [torch.from_numpy(samples[k * 16000 : (k + 1) * 16000])[None] for k in range(6)]
        values = np.stack([model.predict(clip)[0].numpy() for clip in clips])  # (6,C)
    threshold = round(float(np.median(values)), 3)
    expected = []
    for index, label in enumerate(LABELS):
        heard = [k for k in range(6) if values[k, index] >= threshold]
        starts = [k for k in heard if k - 1 not in heard]
        ends = [k for k in heard if k + 1 not in heard]
        expected += [
            (first, last + 1.0, label, values[first : last + 1, index].max())
            for first, last in zip(starts, ends, strict=True)
        ]
    words = path, "-m", checkpoint, "-c", 1, "--threshold", threshold
    assert exit_status(*words, "--output", tmp_path / "tags.csv") == 0
    found = [
        (float(row["start"]), float(row["end"]), row["label"], pytest.approx(float(row["probability"]), abs=1e-4))
        for row in read_csv(tmp_path / "tags.csv")
    ]
    assert len(expected) > 5
    assert sorted(found, key=lambda e: (e[2], e[0])) == sorted(expected, key=lambda e: (e[2], e[0]))
    assert exit_status(*words, "-k", 1, "--output", tmp_path / "best.csv") == 0
    seconds = {}
    for row in read_csv(tmp_path / "best.csv"):
        for k in range(int(float(row["start"])), int(float(row["end"]))):
            assert k not in seconds  # one label a window
            seconds[k] = row["label"]
    best = values.argmax(axis=1)
    assert seconds == {k: LABELS[best[k]] for k in range(6) if values[k].max() >= threshold}
    assert exit_status(*words[:-1], "1", "--output", tmp_path / "none.csv") == 0
    (row,) = read_csv(tmp_path / "none.csv")  # tagged, and nothing heard
    assert (row["filename"], row["label"], row["error"]) == (str(path), "", "")


def test_embeddings_are_of_windows_also_where_tags_are_of_events(checkpoint, sounds, tmp_path):
    words = sounds / "siren_over_rain.wav", "-m", checkpoint, "-c", 1, "--threshold", "0", "--quiet"
    assert exit_status(*words, "--output", tmp_path / "tags.csv", "--embeddings", tmp_path / "e.h5") == 0
    assert {(row["start"], row["end"]) for row in read_csv(tmp_path / "tags.csv")} == {("0.0", "6.0")}
    with h5py.File(tmp_path / "e.h5") as file:
        assert file["window/start"][:].tolist() == [0, 1, 2, 3, 4, 5]


def test_hops_and_several_outputs_at_once(checkpoint, sounds, tmp_path, capsys):
    words = sounds / "siren_over_rain.wav", "-m", checkpoint, "-c", 2, "--hop", 0.5, "-k", 1, "--quiet"
    outputs = "--output", tmp_path / "tags.jsonl", "--plot", tmp_path / "plot", "--embeddings", tmp_path / "e.h5"
    assert exit_status(*words, *outputs) == 0
    lines = [json.loads(line) for line in (tmp_path / "tags.jsonl").read_text().splitlines()]
    assert [(line["start"], line["end"]) for line in lines] == [(k / 2, k / 2 + 2) for k in range(9)]
    assert (tmp_path / "plot" / "siren_over_rain.wav.png").exists()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "1/1" in captured.err
    (tmp_path / "plot" / "siren_over_rain.wav.png").unlink()
    assert exit_status(*words, *outputs) == 0  # only the picture is left to do
    assert (tmp_path / "plot" / "siren_over_rain.wav.png").exists()
    assert len((tmp_path / "tags.jsonl").read_text().splitlines()) == 9


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        (["--threshold", "0.4", "-k", "3"], "threshold"),
        (["-c", "2"], "chunk_length"),
        (["--hop", "2"], "hop"),
        (["-k", "1"], "topk"),
        (["-m", "{other}"], "model"),
        (["-m", "{same_name}"], "files"),
    ],
)
def test_another_model_or_other_windows_are_not_mixed_into_an_output(
    checkpoint, sounds, tmp_path, capsys, changed, sentence
):
    other = tmp_path / "other.pt"
    other.write_bytes(checkpoint.read_bytes())
    model = tmp_path / "pico.pt"
    model.write_bytes(checkpoint.read_bytes())
    target = tmp_path / "tags.csv"
    words = sounds / "siren_over_rain.wav", "-m", model, "--output", target, "--quiet"
    assert exit_status(*words) == 0
    before = target.read_bytes()
    if changed[1] == "{same_name}":  # the weights have changed
        save_checkpoint(model, create_model("audiotransformer_pico", num_classes=5, labels=LABELS), {})
    changed = [word.format(other=other, same_name=model) for word in changed]
    assert exit_status(*words, *changed) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {target} was made with {sentence} ")
    assert "--overwrite" in error
    assert target.read_bytes() == before
    assert exit_status(*words, *changed, "--overwrite") == 0
    assert exit_status(*words, *changed) == 0


def test_a_runs_folder_whose_weights_have_changed_is_another_model(checkpoint, sounds, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / "averaged.pt").write_bytes(checkpoint.read_bytes())
    words = sounds / "siren_over_rain.wav", "-m", run, "--output", tmp_path / "tags.csv", "--quiet"
    assert exit_status(*words) == 0
    assert exit_status(*words) == 0
    save_checkpoint(run / "averaged.pt", create_model("audiotransformer_pico", num_classes=5, labels=LABELS), {})
    assert exit_status(*words) == 1
    assert "was made with files" in capsys.readouterr().err


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


def test_help_comes_without_torch():
    program = (
        "import sys, inference\n"
        "try: inference.main(['--help'])\n"
        "except SystemExit as stopped: code = stopped.code\n"
        "slow = {'torch', 'pandas', 'pyarrow', 'matplotlib', 'onnxruntime', 'timm'} & set(sys.modules)\n"
        "print(code, sorted(slow))\n"
    )
    result = run_command("-c", program)
    assert result.stdout.splitlines()[-1] == "0 []"
    assert "--stream" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["absent.wav"], "absent.wav"),
        (["{sounds}", "--output", "tags.txt"], ".csv, .jsonl, .parquet"),
        (["{sounds}", "--output", "tags", "--format", "jsonl"], ".csv, .jsonl, .parquet"),
        (["{sounds}", "-m", "ced_minni"], "ced_mini"),
        (["{sounds}", "--engine", "onnx"], "expects an .onnx file"),
        (["{sounds}", "-m", "absent.onnx", "--engine", "torch"], "--engine torch expects"),
        (["{sounds}", "-m", "absent.onnx", "--weights", "a.pt"], "remove --weights"),
    ],
)
def test_faults_are_sentences(arguments, sentence, checkpoint, sounds, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = [argument.format(sounds=sounds) for argument in arguments]
    if "-m" not in arguments:
        arguments += ["-m", str(checkpoint)]
    assert exit_status(*arguments) == 1
    error = capsys.readouterr().err
    assert sentence in error
    assert "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (["-k", "0"], "expected whole number, at least 1"),
        (["-c", "0"], "expected number, above 0"),
        (["-c", "nan"], "expected number, above 0"),
        (["-c", "inf"], "expected number, above 0"),
        (["--hop", "-1"], "expected number, above 0"),
        (["--hop", "inf"], "expected number, above 0"),
        (["--batch_size", "-1"], "expected whole number, at least 1"),
        (["--n_workers", "0"], "expected whole number, at least 1"),
        (["--threshold", "1.5"], "at least 0, at most 1"),
        (["--threshold", "nan"], "at least 0, at most 1"),
        (["-k", "1.5"], "expected whole number, at least 1"),
        (["--format", "xml"], "expected csv or jsonl"),
        (["--encoding", "mp3"], "expected u8 or s16le"),
        (["--stream"], "files and outputs are not supported"),
    ],
)
def test_impossible_arguments_are_refused(wrong, sentence, capsys):
    assert exit_status("a.wav", *wrong) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "no sounds"),
        (["--stream", "--output", "a.csv"], "files and outputs are not supported"),
        (["--stream", "--embeddings", "a.h5"], "files and outputs are not supported"),
        (["--stream", "--plot", "a"], "files and outputs are not supported"),
        (["--stream", "--rate", "0"], "at least 1"),
        (["--stream", "--channels", "0"], "at least 1"),
    ],
)
def test_a_stream_and_files_do_not_go_together(words, sentence, capsys):
    assert exit_status(*words) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_cuda_where_there_is_none_is_a_sentence(checkpoint, sounds, capsys):
    assert exit_status(sounds, "-m", checkpoint, "--device", "cuda") == 1
    assert "GPU; use auto or cpu" in capsys.readouterr().err
