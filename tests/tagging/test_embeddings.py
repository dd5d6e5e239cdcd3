import json

import h5py
import numpy as np
import pytest
import soundfile
import torch

import tagging.embeddings
from common.errors import UserError
from tagging.embeddings import EmbeddingFile
from tagging.files import TaggedFile, TagOptions, tag_files
from tagging.parts import SINGLE_PROCESS, Share
from tests.tagging.sounds import RATE, humming
from tests.tagging.test_outputs import NAMES

SETTINGS = {"model": "pico.pt", "chunk_length": 1.0}
SECONDS = (2.3, 0.4, 1.0, 3.07, 0.02)


@pytest.fixture(scope="module")
def tagged(tmp_path_factory, pico):
    """Files of one to four windows, and a fault between them."""
    folder = tmp_path_factory.mktemp("sounds")
    paths = [folder / f"{number}.wav" for number in range(len(SECONDS))]
    for number, (path, seconds) in enumerate(zip(paths, SECONDS, strict=True)):
        soundfile.write(path, humming(number, seconds), RATE, subtype="FLOAT")
    (folder / "bad.wav").write_text("no sound")
    paths.insert(2, folder / "bad.wav")
    return list(tag_files(pico, paths, TagOptions(embeddings=True), chunk_seconds=1.0, hop_seconds=0.7, batch_size=3))


def write(path, files, order, share=SINGLE_PROCESS):
    output = EmbeddingFile(path, SETTINGS, share)
    for file in files:
        output.write(file)
    return output.close(order)


def read(path):
    """Name, start, end, vector and time steps of each window, in the order of the file."""
    with h5py.File(path) as file:
        names = file["filename"].asstr()[:]
        offsets = file["frame/offset"][:]
        assert len(offsets) == len(file["window/file"]) + 1
        assert offsets[-1] == len(file["frame/embedding"])
        assert (file["window/embedding"].dtype, file["frame/embedding"].dtype) == (np.float32, np.float16)
        assert json.loads(file.attrs["made_with"]) == SETTINGS
        return list(names), [
            (
                names[file["window/file"][i]],
                file["window/start"][i],
                file["window/end"][i],
                file["window/embedding"][i],
                file["frame/embedding"][offsets[i] : offsets[i + 1]],
            )
            for i in range(len(offsets) - 1)
        ]


def check_same(one, other):
    assert one[0] == other[0]
    assert len(one[1]) == len(other[1])
    for (*key, vector, frames), (*its_key, its_vector, its_frames) in zip(one[1], other[1], strict=True):
        assert key == its_key
        assert np.array_equal(vector, its_vector)
        assert np.array_equal(frames, its_frames)


def test_they_are_the_models_own_of_each_window(tmp_path, tagged, pico):
    assert write(tmp_path / "e.h5", tagged, [file.path for file in tagged])
    names, windows = read(tmp_path / "e.h5")
    readable = [file for file in tagged if file.fault is None]
    assert names == [str(file.path) for file in readable]
    expected = [(str(file.path), window.start, window.end) for file in readable for window in file.windows]
    assert [window[:3] for window in windows] == expected
    assert len(windows) == 3 + 1 + 1 + 4 + 1
    for name, start, end, vector, frames in windows:
        samples, _ = soundfile.read(name, dtype="float32")
        clip = samples[round(start * RATE) : round(end * RATE)]
        with torch.inference_mode():
            whole, steps = pico.model.embed(torch.from_numpy(clip)[None])
        assert frames.shape == steps[0].shape == (pico.model.n_steps(len(clip)), pico.model.embed_dim)
        assert np.abs(vector - whole[0].numpy()).max() <= 1e-5
        assert np.abs(frames.astype(np.float32) - steps[0].numpy()).max() <= 1e-3 * max(1, float(steps.abs().max()))
    assert np.std([window[3] for window in windows], axis=0).max() > 1e-2


@pytest.mark.parametrize("n_ranks", [1, 2, 3])
@pytest.mark.parametrize("n_bytes", [1, 1 << 26])
def test_parts_and_what_was_there_become_one_file_in_the_order_of_the_sounds(
    tmp_path, tagged, monkeypatch, n_ranks, n_bytes
):
    monkeypatch.setattr(tagging.embeddings, "CHUNK_BYTES", n_bytes)
    monkeypatch.setattr(tagging.embeddings, "MAX_OPEN", 1)
    order = [file.path for file in tagged]
    write(tmp_path / "whole.h5", tagged, order)
    path = tmp_path / "[parts].h5"
    ranks = [EmbeddingFile(path, SETTINGS, Share(rank, n_ranks)) for rank in range(n_ranks)]
    for number, file in reversed([*enumerate(tagged)]):
        ranks[number % n_ranks].write(file)
    assert [rank.close(order) for rank in ranks] == [False] * (n_ranks - 1) + [True]
    check_same(read(path), read(tmp_path / "whole.h5"))
    assert {p.name for p in tmp_path.iterdir()} == {"whole.h5", path.name}


@pytest.mark.parametrize("n_next", [1, 2])
def test_what_a_killed_run_has_written_is_kept_and_added_to(tmp_path, tagged, monkeypatch, n_next):
    monkeypatch.setattr(tagging.embeddings, "CHUNK_BYTES", 1)
    order = [file.path for file in tagged]
    path = tmp_path / "e.h5"
    for rank in range(2):
        output = EmbeddingFile(path, SETTINGS, Share(rank, 2))
        output.write(tagged[3 + rank])  # and is killed, in the middle of the next part
        (tmp_path / "e.h5.parts" / f".{rank}-of-2.000001.h5.77.partial").write_bytes(b"half a part")
    ranks = [EmbeddingFile(path, SETTINGS, Share(rank, n_next)) for rank in range(n_next)]
    for rank, output in enumerate(ranks):
        assert output.done == {str(tagged[3].path), str(tagged[4].path)}
        for file in tagged[rank::n_next]:
            output.write(file)
    assert [output.close(order) for output in ranks][-1]
    write(tmp_path / "whole.h5", tagged, order)
    check_same(read(path), read(tmp_path / "whole.h5"))
    assert {p.name for p in tmp_path.iterdir()} == {"whole.h5", "e.h5"}


def test_files_that_were_added_come_last_and_nothing_is_lost_or_twice(tmp_path, tagged):
    order = [file.path for file in tagged]
    path = tmp_path / "e.h5"
    write(path, tagged[3:], order[3:])
    before = read(path)
    again = EmbeddingFile(path, SETTINGS, SINGLE_PROCESS)
    assert again.done == set(before[0])
    assert again.close(order)  # nothing to add
    check_same(read(path), before)
    write(path, tagged, order)
    write(tmp_path / "whole.h5", tagged, order)
    check_same(read(path), read(tmp_path / "whole.h5"))
    assert again.faults == {}


def test_names_may_be_any_bytes(tmp_path, tagged):
    files = [TaggedFile(tagged[0].path.with_name(name), tagged[0].windows) for name in NAMES]
    order = [file.path for file in files]
    write(tmp_path / "e.h5", files[::2], order)
    output = EmbeddingFile(tmp_path / "e.h5", SETTINGS, SINGLE_PROCESS)
    for file in files:
        output.write(file)
    assert output.close(order)
    names, windows = read(tmp_path / "e.h5")
    assert len(names) == len(files)
    assert len(windows) == 3 * len(files)
    assert {str(path) for path in order} <= EmbeddingFile(tmp_path / "e.h5", SETTINGS, SINGLE_PROCESS).done


def test_there_is_a_file_even_if_no_sound_could_be_read(tmp_path):
    write(tmp_path / "e.h5", [TaggedFile(tmp_path / "bad.wav", fault="no samples")], [tmp_path / "bad.wav"])
    with h5py.File(tmp_path / "e.h5") as file:
        assert len(file["filename"]) == len(file["window/file"]) == 0
    assert EmbeddingFile(tmp_path / "e.h5", SETTINGS, SINGLE_PROCESS).done == set()


def test_those_of_another_run_and_files_of_another_kind_are_left_alone(tmp_path, tagged):
    path = tmp_path / "e.h5"
    write(path, tagged[:1], [])
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"made with chunk_length 1\.0; now it is chunk_length 2\.0.*--overwrite"):
        EmbeddingFile(path, {**SETTINGS, "chunk_length": 2.0}, SINGLE_PROCESS)
    assert path.read_bytes() == before
    for content in (b"no HDF5", None):
        if content:
            path.write_bytes(content)
        else:
            with h5py.File(path, "w") as file:
                file["x"] = 1
        with pytest.raises(UserError, match="cannot be added to"):
            EmbeddingFile(path, SETTINGS, SINGLE_PROCESS)


def test_what_is_held_is_written_on_request_and_after_a_while(tmp_path, tagged, monkeypatch):
    output = EmbeddingFile(tmp_path / "e.h5", SETTINGS, SINGLE_PROCESS)
    output.write(tagged[0])
    assert all(window.frames.dtype == np.float16 for window in tagged[0].windows)
    assert EmbeddingFile(tmp_path / "e.h5", SETTINGS, SINGLE_PROCESS).done == set()
    output.flush()
    assert EmbeddingFile(tmp_path / "e.h5", SETTINGS, SINGLE_PROCESS).done == {str(tagged[0].path)}
    output.write(tagged[1])
    monkeypatch.setattr(tagging.embeddings, "CHUNK_SECONDS", 0.0)
    output.write(tagged[3])
    done = {str(tagged[i].path) for i in (0, 1, 3)}
    assert EmbeddingFile(tmp_path / "e.h5", SETTINGS, SINGLE_PROCESS).done == done
