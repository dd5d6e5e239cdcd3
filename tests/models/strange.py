"""Mutated files, and what must hold for every one: the right values or one sentence, in bounded memory and time."""

import random
import resource
import struct
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from common.errors import UserError
from models import create_model, save_checkpoint
from models.headed import Head, HeadedTagger
from models.heads import save_head
from models.huggingface import write_huggingface

LIMIT_SECONDS = 5.0  # of computing for one file of a few kilobytes; of waiting, 12 times as many on a busy machine
LIMIT_BYTES = 256 << 20  # that the peak of the process may grow by over all files
FORBIDDEN = ("object at 0x", "Traceback", "weights_only", "add_safe_globals", "safe_globals")


def peak_bytes() -> int:
    """Return the largest memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def check_one(read: Callable[[], Any], is_right: Callable[[Any], bool], what: str) -> str:
    """Read a mutated file; return "right", or the message of the error.

    Raises:
        AssertionError: another exception, other values, or too much time.
    """
    began, busy = time.monotonic(), time.process_time()
    try:
        value = read()
    except UserError as error:
        message = str(error)
        assert message.strip(), what
        assert len(message) < 5000, (what, message[:500])
        assert not any(word in message for word in FORBIDDEN), (what, message)
        message.encode()
        return message
    except BaseException as error:  # also the panics of safetensors
        if isinstance(error, KeyboardInterrupt):
            raise
        raise AssertionError(f"{what}: {''.join(traceback.format_exception(error))}") from error
    finally:
        assert time.process_time() - busy < LIMIT_SECONDS, what
        assert time.monotonic() - began < 12 * LIMIT_SECONDS, what
    assert is_right(value), f"{what}: other values without a word"
    return "right"


def mutate_bytes(content: bytes, generator: random.Random, others: Iterable[bytes] = ()) -> bytes:
    """Return content with bits flipped, bytes set, inserted, deleted, doubled or cut off, or parts of another."""
    changed = bytearray(content)
    for _ in range(generator.choice((1, 1, 1, 2, 5))):
        kind, at = generator.randrange(8), generator.randrange(max(len(changed), 1))
        size = generator.choice((1, 2, 4, 8, 64))
        if kind == 0 and changed:
            changed[at % len(changed)] ^= 1 << generator.randrange(8)
        elif kind == 1:
            changed[at : at + 1] = bytes([generator.randrange(256)])
        elif kind == 2:
            changed[at:at] = generator.randbytes(size)
        elif kind == 3:
            del changed[at : at + size]
        elif kind == 4:
            changed[at:at] = changed[at : at + size]
        elif kind == 5:
            number = generator.choice((0, 1, 2**31 - 1, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1))
            changed[at : at + size] = struct.pack("<Q", number)[:size]
        elif kind == 6:
            del changed[at:]
        else:
            other = generator.choice([content, *others])
            begin = generator.randrange(max(len(other), 1))
            changed[at : at + size] = other[begin : begin + size]
    return bytes(changed)


def run_limited(code: str, *words: str | Path, n_bytes: int, seconds: float = 60) -> subprocess.CompletedProcess:
    """Run Python code in a process of its own, and let its address space grow by `n_bytes` after its imports.

    The code has `words`, and a function `limit()` to be called after its imports.
    """
    head = (
        "import resource, sys\n"
        "words = sys.argv[1:]\n"
        "def limit():\n"
        "    used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        f"    resource.setrlimit(resource.RLIMIT_AS, (used + {n_bytes},) * 2)\n"
    )
    return subprocess.run(
        [sys.executable, "-c", head + code, *map(str, words)],
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )


def small(**settings: Any) -> Any:
    """Return a small model with three classes."""
    torch.manual_seed(0)
    arguments = {"num_classes": 3, "labels": ["a", "b", "c"], "width": 2, "n_mels": 32}
    return create_model("resnet10_small", **arguments | settings).eval()


def same(one: Any, other: Any) -> bool:
    """Whether two values are equal, tensors in type and value, dictionaries in order."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return isinstance(other, list | tuple) and len(one) == len(other) and all(map(same, one, other))
    return one == other


def write_files(folder: Path) -> Path:
    """Write one file of each format, all of the same small model, and return the folder."""
    model = small()
    save_checkpoint(folder / "zip.pt", model, {"config": {"lr": 0.1}, "epoch": 3})
    content = torch.load(folder / "zip.pt", weights_only=True)
    torch.save(content, folder / "legacy.pth", _use_new_zipfile_serialization=False)
    (folder / "plain.safetensors").write_bytes(save(model.state_dict()))
    head = Head(model.embed_dim, 2, labels=["x", "y"]).eval()
    head.facts = {"name": "birds", "model": model.name, "chunk_length": 5.0, "value": 0.5, "metric": "mAP"}
    save_head(folder / "birds.pt", head)
    save_checkpoint(folder / "headed.pt", HeadedTagger(model, head).eval())
    write_huggingface(folder / "hf", model)
    return folder
