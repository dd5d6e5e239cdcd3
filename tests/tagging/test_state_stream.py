"""Streams of a model with a state: the windows of the file, without keeping their samples."""

import io
import subprocess
import sys

import pytest
import soundfile
import torch
from torch import nn

from audio.streams import Encoding, StreamDecoder
from common.errors import UserError
from models import create_model, load_model, save_checkpoint
from models.recurrent import RecurrentSound
from tagging.engines import TorchEngine
from tagging.files import TagOptions, tag_files
from tagging.session import format_windows
from tagging.stream import StreamTagger
from tagging.windows import StateWindows
from tests.conftest import ROOT
from tests.tagging.conftest import LABELS
from tests.tagging.sounds import RATE, humming

EVERY = TagOptions(None)


@pytest.fixture(scope="module")
def recurrent(tmp_path_factory):
    """A checkpoint of a small LSTM whose probabilities differ from window to window."""
    path = tmp_path_factory.mktemp("model") / "lstm.pt"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = create_model("lstm_small", labels=LABELS, hidden_size=16).eval()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.5)
    save_checkpoint(path, model, {})
    return path


@pytest.fixture(scope="module")
def engine(recurrent):
    return TorchEngine(load_model(recurrent), n_threads=2)


def check_same(found, expected):
    assert [(w.start, w.end) for w in found] == [(w.start, w.end) for w in expected]
    for one, other in zip(found, expected, strict=True):
        assert dict(one.tags) == pytest.approx(dict(other.tags), abs=1e-5)


@pytest.mark.parametrize("block_seconds", [0.00123, 0.37, 100])
@pytest.mark.parametrize(
    ("chunk", "hop"), [(0.5, 0.2), (0.5, None), (0.01, None), (1.5, 0.75), (0.5, 1.3), (10.0, None)]
)
def test_windows_are_those_of_the_file_whatever_the_blocks(tmp_path, engine, block_seconds, chunk, hop):
    path = tmp_path / "a.wav"
    soundfile.write(path, humming(6, 2.63, 22050, 2) if chunk > 0.1 else humming(6, 0.137), 22050)
    times = {"chunk_seconds": chunk, "hop_seconds": hop}
    (file,) = tag_files(engine, [path], EVERY, **times)
    decoder = StreamDecoder(io.BytesIO(path.read_bytes()), Encoding(RATE), block_seconds=block_seconds)
    tagger = StreamTagger(engine, EVERY, **times)
    assert isinstance(tagger._windows, StateWindows)
    found = [window for block in decoder for window in tagger.push_block(*block)] + tagger.finish()
    check_same(found, file.windows)
    assert tagger.finish() == []
    assert tagger.seconds == pytest.approx(file.windows[-1].end, abs=1.5)


def test_a_long_window_keeps_neither_samples_nor_steps(engine):
    tagger = StreamTagger(engine, EVERY, chunk_seconds=60.0, hop_seconds=20.0)
    sound = humming(1, 70.0)
    found, largest = [], 0
    for first in range(0, len(sound), 4000):
        found += tagger.push(sound[first : first + 4000])
        for _, each in tagger._windows._open:
            held = [each.sound._samples, each.sound.state.frames, each.sound.state.probabilities]
            largest = max(largest, *(tensor.numel() for tensor in held))
    assert largest < 1.3 * RATE
    assert [(window.start, window.end) for window in found] == [(0.0, 60.0)]
    expected = engine.predict([sound[: 60 * RATE]])[0]
    assert dict(found[0].tags) == pytest.approx(dict(zip(LABELS, expected.tolist(), strict=True)), abs=1e-5)


def test_a_sound_of_a_model_with_a_state_has_an_output_at_any_time(engine):
    sound, model = humming(3, 2.0), engine.model
    continued = RecurrentSound(model)
    with pytest.raises(UserError, match="at least one sample"):
        continued.predict()
    first = 0
    for size in (1, 100, 298, 1, 160, 5000, 1, 20000):
        continued.push(torch.from_numpy(sound[first : first + size]))
        first += size
        expected = model.predict(sound[None, :first])[0]
        torch.testing.assert_close(continued.predict(), expected, atol=1e-5, rtol=0)
    continued.push(torch.full((RATE,), torch.nan))
    with pytest.raises(UserError, match="NaN"):
        continued.predict()


def test_the_command_prints_the_windows_of_the_file(tmp_path, recurrent, engine):
    path = tmp_path / "a.wav"
    soundfile.write(path, humming(5, 2.3), RATE)
    (file,) = tag_files(engine, [path], chunk_seconds=1.0, hop_seconds=0.5)
    command = [sys.executable, str(ROOT / "inference.py"), "--stream", "-m", str(recurrent), "-c", "1", "--hop", "0.5"]
    done = subprocess.run(command, stdin=path.open("rb"), capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == format_windows(file.windows)
