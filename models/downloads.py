"""Downloads of weights into torch.hub's cache: a file for each address, continued after an interruption, and checked.

The name of a copy contains a hash of its whole address, so that two addresses never share one. Files that the project
names itself keep their published names, under which torch.hub may have stored them before.
"""

import hashlib
import http.client
import json
import logging
import os
import re
import shutil
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import torch

from common.errors import UserError
from common.files import sha256
from common.locks import wait_for_lock
from models.tensor_files import read_tensors

logger = logging.getLogger(__name__)

TIMEOUT = 30.0  # seconds to connect, and without a byte
SLOWEST = 1000.0  # bytes a second over a minute
PAUSES = (1.0, 4.0, 15.0)  # seconds before each further try
MAX_BYTES = 16 << 30
_PIECE = 1 << 18
_HASH = re.compile(r"-(?=\d*[a-f])([0-9a-f]{8,64})\.")  # in a file's name, as torch.hub has it; not a date


class _TransferError(Exception):
    """The transfer ended early; what has arrived is kept."""


def file_name(url: str) -> str:
    """Return the name of the file that a URL names.

    Raises:
        UserError: it names none.
    """
    try:
        address = urlparse(url)
        name = unquote(address.path).rpartition("/")[2]
        valid = bool(address.hostname) and name not in ("", ".", "..") and name.isprintable()
    except ValueError:
        valid = False
    if not valid:
        raise UserError(f"{url}: names no file; expected an address such as https://HOST/FOLDER/NAME.pt")
    return name


def download(url: str, name: str | None = None) -> Path:
    """Return the copy of a URL in torch.hub's cache; download it first where there is none.

    A second process that wants the same file waits for the first. Ctrl-C keeps what has arrived, and the next call goes
    on from there.

    Args:
        url: of a file of tensors.
        name: of the copy, for addresses that the project itself publishes; by default one that contains a hash of the
            address.

    Raises:
        UserError: it names no file, or cannot be downloaded; the message names the path for a manual download.
    """
    if (copy := find_copy(url, name)) is not None:
        return copy
    folder, key, path = _locate(url, name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with wait_for_lock(folder / f".{key}.lock", f"another process is downloading {url}: waiting for it"):
            if not path.is_file():
                logger.info("downloading %s to %s", url, path)
                # the suffix is that of the format
                _download(url, folder / f".{key}.part{path.suffix}", path, file_name(url))
    except (OSError, http.client.HTTPException, UserError, _TransferError) as error:
        raise UserError(
            f"the weights {url} cannot be downloaded ({_describe(error)}): download the file to {path}, or give a file "
            "with `--weights PATH`"
        ) from error
    return path


def find_copy(url: str, name: str | None = None) -> Path | None:
    """Return the copy of a URL that is there, or None; arguments and errors as in `download`."""
    folder, _, path = _locate(url, name)
    if path.is_file():
        return path
    hashed = folder / file_name(url)
    if (
        name is None
        and _HASH.search(hashed.name)
        and hashed.is_file()
        and _find_hash_fault(hashed, hashed.name) is None
    ):
        return hashed  # of torch.hub: its content has the hash in its name
    return None


def _locate(url: str, name: str | None) -> tuple[Path, str, Path]:
    """Return the folder of all copies, a hash of the address, and the path of its copy."""
    key = hashlib.sha256(url.encode()).hexdigest()[:16]
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    return folder, key, folder / (name or f"{key}-{file_name(url)[-100:]}")


def _describe(error: Exception) -> str:
    reason = getattr(error, "reason", None)  # of urllib's errors
    cause = reason if isinstance(reason, Exception) else error
    if isinstance(cause, TimeoutError):
        return f"no answer within {TIMEOUT:g} s"
    return str(getattr(cause, "strerror", None) or cause or type(cause).__name__)


def _download(url: str, part: Path, path: Path, name: str) -> None:
    """Transfer a file in as many tries as it takes, check it, and give it its name."""
    for pause in (*PAUSES, None):
        try:
            transfer(url, part)
            break
        except (_TransferError, OSError, http.client.HTTPException) as error:
            if pause is None or not _is_temporary(error):
                raise
            logger.warning("%s: %s; trying again in %g s", url, _describe(error), pause)
            time.sleep(pause)
    _facts_of(part).unlink(missing_ok=True)
    try:
        if fault := _find_hash_fault(part, name):
            raise UserError(fault)
        read_tensors(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _is_temporary(error: Exception) -> bool:
    """Whether another try may succeed: not for a refused connection, an unknown host or a missing file."""
    if isinstance(error, urllib.error.HTTPError):
        return error.code in (408, 416, 425, 429, 500, 502, 503, 504)
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(cause, ConnectionRefusedError):
        return False
    return isinstance(cause, _TransferError | TimeoutError | http.client.HTTPException | ConnectionError)


def _find_hash_fault(path: Path, name: str) -> str | None:
    found = _HASH.search(name)
    if found is None or sha256(path).startswith(found[1]):
        return None
    return f"its SHA-256 does not begin with {found[1]}, the hash in its name"


def _facts_of(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def transfer(url: str, part: Path) -> None:
    """Transfer a file, or what is missing of it, to `part`.

    Raises:
        _TransferError: it ended early.
        UserError: it is no file of weights, or too large.
    """
    start, validator = _find_start(part)
    headers = {"User-Agent": "ced", "Accept-Encoding": "identity"}
    if start:
        headers |= {"Range": f"bytes={start}-", "If-Range": validator}
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # there is nothing behind `start`: it was another file
            part.unlink(missing_ok=True)
        raise
    with response:
        if response.status != 206:
            start = 0
        try:
            n_bytes = _read_length(response, start)
        except _TransferError:
            part.unlink(missing_ok=True)
            raise
        if response.headers.get_content_type() in ("text/html", "application/xhtml+xml"):
            raise UserError("the server sent a web page, not a file; open the address in a browser")
        free = shutil.disk_usage(part.parent).free
        if n_bytes is not None and n_bytes - start > min(free, MAX_BYTES):
            raise UserError(f"it has {n_bytes} bytes, and there is room for {min(free, MAX_BYTES)}")
        validator = response.headers.get("ETag") or response.headers.get("Last-Modified") or ""
        with open(part, "ab" if start else "wb") as file:
            _facts_of(part).write_text(json.dumps({"validator": validator}), encoding="utf-8")
            _copy(response, file)
            file.flush()
            os.fsync(file.fileno())
        n_arrived = part.stat().st_size
    if n_bytes is not None and n_arrived != n_bytes:
        raise _TransferError(f"the transfer ended after {n_arrived} of {n_bytes} bytes")


def _find_start(part: Path) -> tuple[int, str]:
    """Return how many bytes have arrived before, and what the server called that version of the file."""
    try:
        validator = json.loads(_facts_of(part).read_text(encoding="utf-8"))["validator"]
        strong = isinstance(validator, str) and validator and not validator.startswith("W/")
        return (part.stat().st_size, validator) if strong else (0, "")
    except (OSError, ValueError, KeyError, TypeError):
        return 0, ""


def _read_length(response: Any, start: int) -> int | None:
    """Return the length of the whole file, None where the server does not say.

    Raises:
        _TransferError: the server sent another part than was requested.
    """
    if response.status == 206:
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
        if found is None or int(found[1]) != start:
            raise _TransferError(f"the server sent another part than the one from byte {start} on")
        return None if found[2] == "*" else int(found[2])
    length = response.headers.get("Content-Length", "")
    return int(length) if length.isdecimal() else None


def _copy(response: Any, file: Any) -> None:
    """Write what arrives, and give up where it arrives too slowly or without end."""
    n_bytes = n_at_minute = 0
    minute = time.monotonic() + 60
    while piece := response.read1(_PIECE):
        file.write(piece)
        n_bytes += len(piece)
        if n_bytes > MAX_BYTES:
            raise UserError(f"it has more than {MAX_BYTES} bytes")
        if time.monotonic() > minute:
            if n_bytes - n_at_minute < 60 * SLOWEST:
                raise _TransferError(f"fewer than {SLOWEST:g} bytes a second arrive")
            n_at_minute, minute = n_bytes, minute + 60
