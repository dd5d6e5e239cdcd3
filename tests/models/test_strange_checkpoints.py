"""Files that are damaged or made to harm, given as a model: the right values or one sentence."""

import copy
import io
import os
import pickle
import random
import struct
import zipfile
from functools import partial

import pytest
import torch

from common.errors import UserError
from models import load_model
from models.heads import load_head
from models.tensor_files import read_tensors
from tests.models.bombs import BOMBS, HEADERS, STORAGE, pickled, write_archive
from tests.models.strange import LIMIT_BYTES, check_one, mutate_bytes, peak_bytes, run_limited, same, write_files

N_QUICK, N_LONG = 80, 4000


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with one file of each format, of the same small model."""
    return write_files(tmp_path_factory.mktemp("files"))


def run_mutations(path, read, n_mutations, others=(), allowed=lambda value: False):
    """Read `n_mutations` mutations of a file; return how many gave the right values and how many a sentence."""
    content, right = path.read_bytes(), read(path)
    target = path.with_name(f"mutated-{path.name}")
    counts = {"right": 0, "sentence": 0}
    before = peak_bytes()
    for seed in range(n_mutations):
        target.write_bytes(mutate_bytes(content, random.Random(seed), others))
        result = check_one(
            lambda: read(target), lambda value: same(right, value) or allowed(value), f"{path.name}, mutation {seed}"
        )
        counts["right" if result == "right" else "sentence"] += 1
    assert peak_bytes() - before < LIMIT_BYTES
    assert counts["sentence"] > n_mutations // 4  # else the mutations are none
    return counts


def check_archive(files, n_mutations):
    run_mutations(files / "zip.pt", read_tensors, n_mutations, [(files / "birds.pt").read_bytes()])


def check_legacy(files, n_mutations):
    run_mutations(files / "legacy.pth", read_tensors, n_mutations, allowed=lambda value: True)  # without checksums


def check_safetensors(files, n_mutations):
    run_mutations(files / "plain.safetensors", read_tensors, n_mutations, allowed=lambda value: True)


def check_pickles(files, n_mutations):
    """Mutations of the pickle alone, with right checksums: any content but no other exception, memory or time."""
    for name, load in (("zip.pt", load_model), ("birds.pt", load_head), ("headed.pt", load_model)):
        source = zipfile.ZipFile(files / name)
        members = {member: source.read(member) for member in source.namelist()}
        pickled = next(member for member in members if member.endswith("/data.pkl"))
        target = files / f"mutated-{name}"
        before = peak_bytes()
        for seed in range(n_mutations // 2):
            mutated = mutate_bytes(members[pickled], random.Random(seed))
            with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
                for member, content in members.items():
                    archive.writestr(member, mutated if member == pickled else content)
            check_one(partial(load, target), lambda value: True, f"pickle of {name}, mutation {seed}")
        assert peak_bytes() - before < LIMIT_BYTES


CHECKS = (check_archive, check_legacy, check_safetensors, check_pickles)


@pytest.mark.parametrize("check", CHECKS)
def test_damaged_files_give_their_values_or_a_sentence(files, check):
    check(files, N_QUICK)


@pytest.mark.long
@pytest.mark.parametrize("check", CHECKS)
def test_thousands_of_damaged_files_give_their_values_or_a_sentence(files, check, record_property):
    check(files, N_LONG)
    record_property("damaged checkpoints", N_LONG)


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "/dev/zero", "/dev/null", "/proc/self/mem", "fifo", "empty.pt", "folder.pt"]
)
def test_what_is_no_file_of_tensors_is_told_at_once(tmp_path, path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "empty.pt").touch()
    (tmp_path / "folder.pt").mkdir()
    message = check_one(lambda: load_model(tmp_path / path), lambda model: False, path)
    assert path in message


def test_a_flipped_bit_in_weights_is_found_by_the_checksum(files):
    content = bytearray((files / "zip.pt").read_bytes())
    state = torch.load(files / "zip.pt", weights_only=True)["model"]
    at = bytes(content).index(state["stem.conv.weight"].numpy().tobytes())
    content[at + 2] ^= 1
    (files / "flipped.pt").write_bytes(content)
    with pytest.raises(UserError, match="Bad CRC-32"):
        load_model(files / "flipped.pt")


def test_files_without_checksums_are_read(files, monkeypatch):
    content = torch.load(files / "zip.pt", weights_only=True)
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(content, files / "unchecked.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert same(read_tensors(files / "unchecked.pt"), content)


VALUES = {
    "dtypes": [
        torch.arange(6).to(dtype) for dtype in (torch.float64, torch.bfloat16, torch.int8, torch.bool, torch.uint16)
    ],
    "views": [torch.arange(12.0).view(3, 4).T, torch.arange(12.0)[3:7], torch.zeros(1).expand(5), torch.zeros(0, 3)],
    "scalar": torch.tensor(2.5),
    "parameter": torch.nn.Parameter(torch.ones(2)),
    "plain": [None, True, -(2**40), 2**100, 1.5, "text", "\u00e9", (1, (2, 3)), {"a": [1]}, {1, "x"}, b"bytes"],
    "torch": [torch.Size([1, 2]), torch.device("cpu"), torch.float16],
}


@pytest.mark.parametrize("new", [True, False])
def test_what_torch_saves_is_read_as_torch_reads_it(tmp_path, new):
    shared = torch.arange(4.0)
    values = VALUES | {"shared": [shared, shared[1:]]}
    if not new:  # which torch.load cannot read again
        values["dtypes"] = values["dtypes"][:-1]
    torch.save(values, tmp_path / "x.pt", _use_new_zipfile_serialization=new)
    ours, theirs = read_tensors(tmp_path / "x.pt"), torch.load(tmp_path / "x.pt", weights_only=True)
    assert same(theirs, ours)
    assert all(one.stride() == other.stride() for one, other in zip(theirs["views"], ours["views"], strict=True))
    ours["shared"][0][1] = 7.0  # of one storage
    assert ours["shared"][1][0] == 7.0


@pytest.mark.parametrize("bomb", BOMBS)
def test_pickles_that_would_fill_memory_or_time_are_one_sentence(tmp_path, bomb):
    path = write_archive(tmp_path / "bomb.pt", BOMBS[bomb])
    before = peak_bytes()
    check_one(lambda: load_model(path), lambda model: False, bomb)
    legacy = b"".join(map(pickle.dumps, ())) + BOMBS[bomb]
    (tmp_path / "legacy.pt").write_bytes(legacy)
    check_one(lambda: load_model(tmp_path / "legacy.pt"), lambda model: False, bomb)
    assert peak_bytes() - before < LIMIT_BYTES


def test_a_tensor_larger_than_its_storage_is_one_sentence(tmp_path):
    huge = torch.zeros(1).expand(10**6, 10**6)
    torch.save({"model": {"x": huge}}, tmp_path / "huge.pt")
    message = check_one(lambda: load_model(tmp_path / "huge.pt"), lambda model: False, "huge")
    assert "larger than what the file holds of it" in message


def test_compressed_members_are_one_sentence(tmp_path):
    path = write_archive(
        tmp_path / "bomb.pt",
        pickled(b"}X\x01\x00\x00\x00a", STORAGE, b"J\x00\x00\x50\x00tQs"),
        zipfile.ZIP_DEFLATED,
        **{"0": bytes(20 << 20)},
    )
    message = check_one(lambda: load_model(path), lambda model: False, "bomb")
    assert "compressed" in message


def test_overlapping_members_are_one_sentence(files, tmp_path):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("x/data.pkl", bytes(1000))
        first = archive.infolist()[0]
        for index in range(2000):  # all of them the same bytes
            again = copy.copy(first)
            again.filename = again.orig_filename = f"x/data/{index:04d}"
            archive.filelist.append(again)
            archive.NameToInfo[again.filename] = again
        archive._didModify = True
    (tmp_path / "overlap.pt").write_bytes(buffer.getvalue())
    message = check_one(lambda: load_model(tmp_path / "overlap.pt"), lambda model: False, "overlap")
    assert "overlap" in message


@pytest.mark.parametrize("header", HEADERS)
def test_headers_of_safetensors_that_do_not_fit_are_one_sentence(tmp_path, header):
    content = HEADERS[header]
    if content.startswith(b'{"'):
        content = struct.pack("<Q", len(content)) + content
    (tmp_path / "x.safetensors").write_bytes(content + bytes(16))
    check_one(lambda: load_model(tmp_path / "x.safetensors"), lambda model: False, header)


def test_strange_files_need_little_address_space(files, tmp_path):
    """In a process whose memory is limited to a quarter of a gigabyte more than its imports."""
    paths = [write_archive(tmp_path / f"{index}.pt", bomb) for index, bomb in enumerate(BOMBS.values())]
    content = torch.load(files / "zip.pt", weights_only=True)
    for index, changes in enumerate(
        ({"num_classes": 10**9}, {"model_args": {"n_fft": 10**7}}, {"model_args": {"width": 60000}})
    ):
        paths.append(tmp_path / f"described-{index}.pt")
        torch.save(content | {"config": content["config"] | changes}, paths[-1])
    code = (
        "from common.errors import UserError\n"
        "from models import load_model\n"
        "limit()\n"
        "for path in words:\n"
        "    try:\n"
        "        load_model(path)\n"
        "    except UserError as error:\n"
        "        print('sentence' if 'memory' not in str(error) else str(error))\n"
    )
    result = run_limited(code, *paths, n_bytes=LIMIT_BYTES)
    assert result.stdout.split("\n")[:-1] == ["sentence"] * len(paths), result.stdout + result.stderr
