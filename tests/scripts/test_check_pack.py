"""Damage that scripts/check_pack.py finds: bytes that have changed, files that have ended too early."""

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch

from audio.dataset import Pack
from audio.manifest import read_manifest
from audio.pack import pack
from common.errors import UserError
from distill.embeddings import EmbeddingStore
from distill.targets import SoftTargetStore
from models import create_model, save_checkpoint
from scripts import check_pack
from training.states import States

N = 20


def make_pack(folder: Path, layout: str) -> Path:
    rng = np.random.default_rng(0)
    for i in range(N):
        soundfile.write(folder / f"{i}.wav", rng.integers(-9000, 9000, 3000).astype(np.int16), 16000)
    listed = folder / "mine.tsv"
    listed.write_text("filename\n" + "".join(f"{i}.wav\n" for i in range(N)))
    pack(read_manifest(listed), listed, folder / "out", "mine", layout=layout, n_workers=0, progress=False)
    return folder / "out" / "labels" / "mine.tsv"


def make_store(folder: Path, kind: type[SoftTargetStore] | type[EmbeddingStore]) -> Path:
    rng = np.random.default_rng(0)
    seconds = pd.DataFrame({"filename": [f"{i}.wav" for i in range(N)], "start": 0.0, "end": 1.0, "n_reference": 16000})
    values = {
        "topk_values": np.sort(rng.random((N, 5)), axis=1)[:, ::-1],
        "topk_indexes": np.stack([rng.permutation(50)[:5] for _ in range(N)]),
        "seeds": rng.integers(0, 2**31, N),
        "embedding": rng.standard_normal((N, 64)),
    }
    kind.write(folder, 1, 0, seconds, **{name: values[name] for name in kind.types})
    (folder / "meta.json").write_text("{}")
    return folder


def flip_bit(path: Path, position: int) -> None:
    with open(path, "r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1 << position % 8]))


def read_all(path: Path) -> object:
    """What a reader gets, as plain values."""
    if path.suffix == ".tsv":
        opened = Pack.open(path)
        return [opened.read(i).tolist() for i in range(len(opened))], opened.names
    kind = EmbeddingStore if list(path.glob("embeddings_*")) else SoftTargetStore
    store = kind(path)
    return {name: array.tolist() for name, array in store.read_arrays(1).items()}, store.read_rows(1).values.tolist()


@pytest.mark.parametrize("what", ["flat pack", "clips pack", "soft targets", "embeddings"])
def test_no_changed_bit_goes_unseen(
    tmp_path: Path, what: str, capsys: pytest.CaptureFixture[str], record_property: Callable[[str, object], None]
) -> None:
    """A file with one changed bit is reported, or what is read from it is what was written."""
    layout, _, is_pack = what.partition(" ")
    if is_pack == "pack":
        path = make_pack(tmp_path, layout)
        files = list((tmp_path / "out" / "hdf5").glob("*.h5"))
    else:
        path = make_store(tmp_path, SoftTargetStore if what == "soft targets" else EmbeddingStore)
        files = [*path.glob("*.h5"), *path.glob("*.parquet")]
    check_pack.main([str(path)])
    assert "intact" in capsys.readouterr().out
    expected = read_all(path)
    rng = random.Random(0)
    n_seen = 0
    for file in files:
        for _ in range(20):
            position = rng.randrange(file.stat().st_size)
            flip_bit(file, position)
            try:
                check_pack.main([str(path)])
            except SystemExit:
                assert "DAMAGED" in capsys.readouterr().out
                n_seen += 1
            else:
                assert read_all(path) == expected, f"{file.name}: bit in byte {position}"
            flip_bit(file, position)
    assert n_seen > 0
    record_property("changed bits in packs and stores", 20 * len(files))
    assert read_all(path) == expected


def test_states_and_checkpoints_of_a_run_are_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = create_model("audiotransformer_pico", num_classes=2, labels=["a", "b"])
    save_checkpoint(tmp_path / "best.pt", model)
    States(tmp_path / "states").save(3, {"weights": torch.arange(100.0)})
    (tmp_path / "run.json").write_text("{}")
    check_pack.main([str(tmp_path), str(tmp_path / "best.pt")])
    assert "1 checkpoints, 1 states" in capsys.readouterr().out
    flip_bit(tmp_path / "states" / "step=000000003.pt", 700)
    flip_bit(tmp_path / "best.pt", 50_000)
    with pytest.raises(SystemExit):
        check_pack.main([str(tmp_path)])
    output = capsys.readouterr().out
    assert "2 faults" in output
    assert "step=000000003.pt" in output
    assert "best.pt" in output


def test_weights_that_are_not_finite_are_damage(tmp_path: Path) -> None:
    model = create_model("audiotransformer_pico", num_classes=2)
    with torch.no_grad():
        next(model.parameters()).view(-1)[3] = float("nan")
    save_checkpoint(tmp_path / "bad.pt", model)
    with pytest.raises(UserError, match="finite"):
        check_pack.check_model(tmp_path / "bad.pt")


def test_wrong_paths_are_no_damage_and_every_damaged_shard_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for i in range(6):
        soundfile.write(tmp_path / f"{i}.wav", np.full(3000, i + 1, np.int16), 16000)
    listed = tmp_path / "mine.tsv"
    listed.write_text("filename\n" + "".join(f"{i}.wav\n" for i in range(6)))
    pack(read_manifest(listed), listed, tmp_path / "out", "mine", size_per_file=2, n_workers=0, progress=False)
    check_pack.main([str(tmp_path / "out")])  # the folder of the pack
    assert "6 clips in 3 shards" in capsys.readouterr().out
    for path in ("nowhere", str(tmp_path), str(tmp_path / "0.wav")):
        with pytest.raises(SystemExit) as end:
            check_pack.main([path])
        assert end.value.code == 2
        assert "DAMAGED" not in capsys.readouterr().out
    shards = sorted((tmp_path / "out" / "hdf5").glob("*.h5"))
    content = bytearray(shards[0].read_bytes())
    content[content.index(np.full(3000, 1, np.int16).tobytes()) + 100] ^= 1
    shards[0].write_bytes(content)
    shards[1].unlink()
    with pytest.raises(SystemExit) as end:
        check_pack.main([str(tmp_path / "out" / "labels" / "mine.tsv")])
    assert end.value.code == 1
    output = capsys.readouterr().out
    assert "'0.wav' is damaged" in output
    assert "mine_1.h5' does not exist" in output
