"""Parquet files of others: read within limits derived from their size, with the columns that are expected.

A few bytes of parquet may stand for a billion rows (run-length encoding), or for one long text in every row
(dictionaries). What a file expands to is compared with what it may hold before it is read.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.compute
import pyarrow.parquet

from common.errors import some

MAX_COLUMNS = 1000
MAX_TEXT = 4096  # characters of a name: the limit of paths on Linux
_FREE_ROWS, _ROWS_PER_BYTE = 1_000_000, 100  # rows that a file may have: names that count up compress to little
_FREE_BYTES, _EXPANSION = 1 << 26, 1000
PARQUET_ERRORS = (OSError, ValueError, KeyError, TypeError, OverflowError, MemoryError, pyarrow.ArrowException)

_NAMES = {"text": "text", "integer": "whole numbers", "number": "numbers"}
_TESTS = {"text": ("is_string", "is_large_string"), "integer": ("is_integer",), "number": ("is_floating", "is_integer")}


def read_parquet(
    path: str | Path, required: Mapping[str, str], optional: Mapping[str, str] | None = None
) -> pyarrow.Table:
    """Read the columns of a parquet file.

    Args:
        path: the file.
        required: column → "text", "integer" or "number"; no value may be missing.
        optional: columns that may be absent; all others are not read.

    Raises:
        ValueError: it has other columns or types, missing values, too many rows for its size, or texts longer than
            `MAX_TEXT`; the first fault, in a clause.
        OSError, pyarrow.ArrowException: it is no parquet file, or damaged.
    """
    expected = {**required, **(optional or {})}
    texts = [name for name, kind in expected.items() if kind == "text"]
    metadata = _read_metadata(path)
    schema = metadata.schema.to_arrow_schema()
    if missing := [name for name in required if name not in schema.names]:
        raise ValueError(f"found the columns {some(schema.names, 20)}, missing {', '.join(missing)}")
    names = [name for name in expected if name in schema.names]
    for name in names:
        _check_type(schema, name, expected[name])
    # A dictionary has each text once; as plain text, one that every row refers to would be copied for each of them.
    dictionaries = [name for name in texts if name in names]
    options: dict[str, Any] = {"read_dictionary": dictionaries, "page_checksum_verification": True}
    with pyarrow.parquet.ParquetFile(path, metadata=metadata, **options) as file:
        table = file.read(columns=names, use_pandas_metadata=False)
    # What pandas noted of its types may be damaged, too, and none of these columns needs it.
    table = table.replace_schema_metadata({k: v for k, v in (table.schema.metadata or {}).items() if k != b"pandas"})
    if table.num_rows != metadata.num_rows:
        raise ValueError(f"it declares {metadata.num_rows} rows and has {table.num_rows}")
    for name in names:
        if table[name].null_count:
            raise ValueError(f"its column {name!r} lacks {table[name].null_count} values")
        if name in texts:
            table = table.set_column(table.schema.get_field_index(name), name, _decode_texts(table[name], name))
    return table


def read_row_count(path: str | Path) -> int:
    """Return the number of rows that a parquet file declares; raise as `read_parquet` does where it is too large."""
    return int(_read_metadata(path).num_rows)


def _read_metadata(path: str | Path) -> pyarrow.parquet.FileMetaData:
    metadata, n_bytes = pyarrow.parquet.read_metadata(path), Path(path).stat().st_size
    if not 0 <= metadata.num_rows <= _FREE_ROWS + _ROWS_PER_BYTE * n_bytes:
        raise ValueError(f"it declares {metadata.num_rows:,} rows in {n_bytes:,} bytes")
    if metadata.num_columns > MAX_COLUMNS:
        raise ValueError(f"it has {metadata.num_columns} columns, at most {MAX_COLUMNS} are supported")
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    if sum(group.num_rows for group in groups) != metadata.num_rows:
        raise ValueError("its groups of rows do not add up to its rows")
    expanded = sum(max(group.total_byte_size, 0) for group in groups)
    if expanded > _FREE_BYTES + _EXPANSION * n_bytes:
        raise ValueError(f"it declares {expanded:,} bytes of values in {n_bytes:,} bytes")
    return metadata


def _check_type(schema: pyarrow.Schema, name: str, expected: str) -> None:
    if schema.names.count(name) > 1:
        raise ValueError(f"it has the column {name!r} more than once")
    kind = schema.field(name).type
    value: Any = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    if not any(getattr(pyarrow.types, test)(value) for test in _TESTS[expected]):
        raise ValueError(f"its column {name!r} has the type {value}, expected {_NAMES[expected]}")


def _decode_texts(column: pyarrow.ChunkedArray, name: str) -> pyarrow.ChunkedArray:
    longest = max((pyarrow.compute.max(pyarrow.compute.binary_length(part.dictionary)).as_py() or 0
                   for part in column.chunks if len(part.dictionary)), default=0)  # fmt: skip
    if longest > MAX_TEXT:
        raise ValueError(f"its column {name!r} has a text of {longest:,} bytes, at most {MAX_TEXT} are supported")
    return column.cast(column.type.value_type)
