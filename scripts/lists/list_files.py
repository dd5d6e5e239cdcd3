"""Files of lists: tab-separated tables in one folder, with a record of their provenance.

The record (lists.json) has the SHA-256 of each list. A list whose hash is in the record was made by the command and not
edited since: it may be replaced, or removed if the new lists have no such part.
"""

import hashlib
from pathlib import Path
from typing import Any

import pandas as pd

from common.errors import UserError, some
from common.files import sha256, write_json, write_text
from common.parsing import load_json

RECORD = "lists.json"
LIST_FILES = ("train.tsv", "valid.tsv", "test.tsv", "folds.tsv")


def write_lists(folder: Path, lists: dict[str, pd.DataFrame], record: dict[str, Any], overwrite: bool) -> list[Path]:
    """Write lists and their record, and remove lists of an earlier record that are not among them.

    Args:
        folder: created if missing.
        lists: file name → table; of `LIST_FILES`.
        record: their provenance, written to lists.json.
        overwrite: also replace lists that are not in the record.

    Returns:
        The earlier lists that were removed.

    Raises:
        UserError: `folder` is a file, or has another list of that name; nothing is written then.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; expected a folder for the lists (--output)")
    known = _read_record(folder)
    texts = {name: table.to_csv(sep="\t", index=False, lineterminator="\n") for name, table in lists.items()}
    hashes = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}
    present = {name: sha256(folder / name) for name in LIST_FILES if (folder / name).is_file()}
    blocked = [name for name in LIST_FILES if (folder / name).exists() and name not in present]
    if blocked:
        raise UserError(f"{folder / blocked[0]}: is not a file; choose another --output")
    foreign = [
        str(folder / name)
        for name, found in present.items()
        if name in hashes and found != hashes[name] and found not in known.get(name, [])
    ]
    if (folder / RECORD).exists() and not known:
        foreign.append(str(folder / RECORD))
    if foreign and not overwrite:
        raise UserError(
            f"{some(foreign)}: exists, and was not written by this command or edited since; choose another --output, "
            "or add --overwrite"
        )
    removed = [folder / name for name in present if name not in hashes and present[name] in known.get(name, [])]
    # The record comes first, with the earlier hashes: after an interruption, all lists here are in it.
    earlier = {name: [found] for name, found in present.items() if found in known.get(name, [])}
    of_files = {name: [hashes[name], *earlier.get(name, [])] for name in hashes}
    write_json(folder / RECORD, record | {"sha256": earlier | of_files})
    for name, text in texts.items():
        write_text(folder / name, text)
    for path in removed:
        path.unlink()
    write_json(folder / RECORD, record | {"sha256": {name: [found] for name, found in hashes.items()}})
    return removed


def _read_record(folder: Path) -> dict[str, list[str]]:
    """Return the SHA-256 of each list that an earlier call wrote; empty without a valid record."""
    try:
        known = load_json(folder / RECORD)["sha256"]
        return {str(name): [str(found) for found in hashes] for name, hashes in known.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
