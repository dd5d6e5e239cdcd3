import csv
import json
import threading
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import training.tagging
from common.errors import UserError
from models import AudioTagger, create_model
from models.frontends import CedMel
from training.tagging import TaggedChunk, TaggedFile, decode_ahead, tag_files, tag_writer

RATE = 16000


class Meter(AudioTagger):
    """A tagger whose probabilities can be told from the sound: its mean, and that it is short."""

    def __init__(self):
        super().__init__(CedMel(), num_classes=3, embed_dim=1)
        self.labels = ["level", "short", "never"]
        self.batches: list[list[int]] = []

    def predict(self, waveform, lengths=None):
        self.batches.append(lengths.tolist())
        means = waveform.sum(1) / lengths  # padding must be zero for this to be right
        return torch.stack([means, (lengths < RATE / 2).float() * 0.9, torch.zeros(len(lengths))], dim=1)


def steady(path, levels, rate=RATE, last=1.0):
    """Write a file of one level for each second, the last one only in part."""
    samples = np.repeat(np.array(levels, np.float32), rate)
    soundfile.write(path, samples[: round((len(levels) - 1 + last) * rate)], rate, subtype="PCM_16")
    return path


def test_every_chunk_is_tagged_in_order_with_its_times_also_a_short_tail(tmp_path):
    first = steady(tmp_path / "first.wav", [0.25, 0.5, 0.75], last=0.25)
    second = steady(tmp_path / "second.wav", [0.125])
    meter = Meter()
    files = list(tag_files(meter, [first, second], chunk_seconds=1.0, top_k=2, batch_size=3))
    assert [file.path for file in files] == [first, second]
    assert [(chunk.start, chunk.end) for chunk in files[0].chunks] == [(0, 1), (1, 2), (2, 2.25)]
    assert [chunk.tags for chunk in files[0].chunks] == [
        [("level", 0.25), ("short", 0.0)],
        [("level", 0.5), ("short", 0.0)],
        [("short", pytest.approx(0.9)), ("level", 0.75)],  # best first
    ]
    assert files[1].chunks == [TaggedChunk(0.0, 1.0, [("level", 0.125), ("short", 0.0)])]
    assert meter.batches == [[RATE, RATE, RATE // 4], [RATE]]


def test_a_batch_holds_chunks_of_several_files_and_files_come_out_in_order(tmp_path):
    paths = [steady(tmp_path / f"{number}.wav", [number / 16] * (1 + number % 3)) for number in range(7)]
    meter = Meter()
    files = list(tag_files(meter, paths, chunk_seconds=1.0, top_k=1, batch_size=4))
    assert [len(batch) for batch in meter.batches] == [4, 4, 4, 1]
    assert [file.path for file in files] == paths
    for number, file in enumerate(files):
        assert [chunk.tags for chunk in file.chunks] == [[("level", number / 16)]] * (1 + number % 3)


def test_a_file_is_handed_over_as_soon_as_its_chunks_are_tagged(tmp_path):
    paths = [steady(tmp_path / f"{number}.wav", [0.5]) for number in range(5)]
    meter = Meter()
    files = tag_files(meter, paths, batch_size=2)
    next(files)
    assert len(meter.batches) == 1


def test_other_rates_and_channels_become_the_models(tmp_path):
    stereo = np.stack([np.full(44100, 0.75), np.full(44100, 0.25)], axis=1)
    soundfile.write(tmp_path / "stereo.flac", stereo, 44100)
    (file,) = tag_files(Meter(), [tmp_path / "stereo.flac"], top_k=1)
    assert (file.chunks[0].end, len(file.chunks)) == (1.0, 1)
    assert file.chunks[0].tags[0][1] == pytest.approx(0.5, abs=1e-2)


def test_unreadable_files_keep_their_place_and_say_why(tmp_path):
    good = steady(tmp_path / "good.wav", [0.5])
    text, empty, short = tmp_path / "text.wav", tmp_path / "empty.wav", tmp_path / "short.flac"
    text.write_text("this is no sound")
    soundfile.write(empty, np.zeros(0), RATE)
    soundfile.write(short, np.zeros(RATE), RATE)
    short.write_bytes(short.read_bytes()[:20])
    nan = tmp_path / "nan.wav"
    soundfile.write(nan, np.full(100, np.nan, np.float32), RATE, subtype="FLOAT")
    paths = [text, good, empty, short, nan, tmp_path / "absent.wav"]
    files = list(tag_files(Meter(), paths))
    assert [file.path for file in files] == paths
    assert [file.fault is None for file in files] == [False, True, False, False, False, False]
    assert all(not file.chunks for file in files if file.fault)
    assert "no samples" in str(files[2].fault)
    assert "not finite" in str(files[4].fault)
    assert "no such file" in str(files[5].fault)


def test_more_labels_wanted_than_there_are_gives_all(tmp_path):
    (file,) = tag_files(Meter(), [steady(tmp_path / "a.wav", [0.5])], top_k=10)
    assert [label for label, _ in file.chunks[0].tags] == ["level", "short", "never"]


def test_a_model_that_gives_nan_is_named(tmp_path):
    class Broken(Meter):
        def predict(self, waveform, lengths=None):
            return AudioTagger.predict(self, waveform, lengths)

        def forward(self, waveform, lengths=None):
            return torch.full((len(waveform), 3), torch.nan)

    with pytest.raises(UserError, match="Broken gives NaN"):
        list(tag_files(Broken(), [steady(tmp_path / "a.wav", [0.5])]))


def test_decoding_runs_ahead_but_not_far(monkeypatch):
    lock, started = threading.Lock(), []

    def read(path, rate):
        with lock:
            started.append(path)
        return np.zeros(4, np.float32), rate

    monkeypatch.setattr(training.tagging, "read_audio", read)
    sounds = decode_ahead([Path(str(number)) for number in range(50)], RATE, n_workers=2)
    names = [str(next(sounds)[0]) for _ in range(10)]
    assert names == [str(number) for number in range(10)]
    assert len(started) <= 10 + 4  # what was taken and a window of two a thread
    assert len([*sounds]) == 40


@pytest.fixture(scope="module")
def pico():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = create_model("audiotransformer_pico", num_classes=6).eval()
    for parameter in model.parameters():
        parameter.data *= 1.5  # else random weights say 0.5 to everything
    return model


def test_tags_do_not_depend_on_the_batch(tmp_path, pico):
    rng = np.random.default_rng(0)
    paths = []
    for number, (suffix, rate, seconds) in enumerate(
        [(".wav", 16000, 2.3), (".flac", 44100, 1.0), (".ogg", 22050, 3.05), (".wav", 8000, 0.4), (".wav", 16000, 0.01)]
    ):
        paths.append(tmp_path / f"{number}{suffix}")
        hum = np.sin(np.arange(round(seconds * rate)) * (0.05 + 0.1 * number))
        soundfile.write(paths[-1], 0.3 * hum + 0.05 * rng.standard_normal(len(hum)), rate)
    together = list(tag_files(pico, paths, chunk_seconds=1.0, top_k=6, batch_size=16))
    alone = list(tag_files(pico, paths, chunk_seconds=1.0, top_k=6, batch_size=1, n_workers=1))
    values = []
    for one, other in zip(together, alone, strict=True):
        assert [(chunk.start, chunk.end) for chunk in one.chunks] == [
            (chunk.start, chunk.end) for chunk in other.chunks
        ]
        for batched, single in zip(one.chunks, other.chunks, strict=True):
            assert dict(batched.tags) == pytest.approx(dict(single.tags), abs=1e-5)
            values.append([dict(single.tags)[label] for label in pico.labels])
    assert [len(file.chunks) for file in together] == [3, 1, 4, 1, 1]
    assert np.std(values, axis=0).max() > 1e-2  # the chunks do differ


def test_probabilities_are_the_models_own(tmp_path, pico):
    samples = np.sin(np.arange(RATE) * 0.3).astype(np.float32) / 2
    soundfile.write(tmp_path / "a.wav", samples, RATE, subtype="FLOAT")
    (file,) = tag_files(pico, [tmp_path / "a.wav"], top_k=6)
    with torch.inference_mode():
        expected = pico.predict(torch.from_numpy(samples)[None])[0]
    assert dict(file.chunks[0].tags) == pytest.approx(dict(zip(pico.labels, expected.tolist(), strict=True)), abs=1e-6)
    probabilities = [value for _, value in file.chunks[0].tags]
    assert probabilities == sorted(probabilities, reverse=True)


FILE = TaggedFile(
    Path("a, b.wav"),
    [TaggedChunk(0.0, 10.0, [("Chirp, tweet", 0.75), ("Bell", 0.125)]), TaggedChunk(10.0, 12.00006, [("Bell", 0.5)])],
)


def test_csv_has_a_row_a_label(tmp_path):
    with tag_writer(tmp_path / "tags.csv") as write:
        write(FILE)
        write(TaggedFile(Path("broken.wav"), fault="no samples"))
    with open(tmp_path / "tags.csv", newline="", encoding="utf-8") as stream:
        rows = list(csv.reader(stream))
    assert rows == [
        ["filename", "start", "end", "label", "probability"],
        ["a, b.wav", "0.0", "10.0", "Chirp, tweet", "0.750000"],
        ["a, b.wav", "0.0", "10.0", "Bell", "0.125000"],
        ["a, b.wav", "10.0", "12.0001", "Bell", "0.500000"],
    ]


def test_jsonl_has_a_line_a_chunk(tmp_path):
    with tag_writer(tmp_path / "tags.jsonl") as write:
        write(FILE)
    lines = [json.loads(line) for line in (tmp_path / "tags.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(line["filename"], line["start"], line["end"]) for line in lines] == [
        ("a, b.wav", 0.0, 10.0),
        ("a, b.wav", 10.0, 12.0001),
    ]
    assert lines[0]["tags"] == [
        {"label": "Chirp, tweet", "probability": 0.75},
        {"label": "Bell", "probability": 0.125},
    ]


def test_an_interrupted_writer_leaves_what_was_there(tmp_path):
    target = tmp_path / "tags.csv"
    target.write_text("before")

    def tag():
        with tag_writer(target) as write:
            write(FILE)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tag()
    assert target.read_text() == "before"
    assert list(tmp_path.iterdir()) == [target]


def test_an_unknown_extension_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"\.csv or \.jsonl"), tag_writer(tmp_path / "tags.txt"):
        pass
    assert not any(tmp_path.iterdir())
