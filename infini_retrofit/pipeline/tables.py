"""Tables of texts and tokens (parquet) that one stage writes and another reads.

A table is compared with the manifest of its folder before it is read. Knows no path.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32

from infini_retrofit.pipeline.files import check_made, verify_manifest, whole_file

TokenIds = Int32[np.ndarray, "_"]


def write_table(path: Path, columns: Mapping[str, Sequence[Any]]) -> None:
    """Write columns by their names, in equal bytes each time; the manifest is the caller's."""
    import pyarrow as pa  # here and below, for the library runs without it
    import pyarrow.parquet as pq

    types = _types()
    table = pa.table({name: pa.array(values, types[name]) for name, values in columns.items()})
    with whole_file(path) as partial:
        pq.write_table(table, partial, compression="zstd")


def read_table(path: Path, columns: list[str]) -> Any:
    """Read columns of a file that a stage `prepare_<folder>` wrote.

    Raises:
        FileNotFoundError: if the file or its manifest is missing.
        ValueError: if it differs from its manifest, is no such table, or has no rows.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    check_made(path, _made_by(path))
    verify_manifest(path.parent, _made_by(path), [path.name])
    try:
        schema = pq.read_schema(path)
        for name in columns:
            wanted = _types()[name]
            found = schema.field(name).type if name in schema.names else "none"
            if found != wanted:
                raise _refusal(path, f"must have the column {name} of {wanted}, got {found}")
        table = pq.read_table(path, columns=columns)
    except (pa.ArrowException, OSError) as error:
        raise _refusal(path, f"must be a table in parquet, got none ({error})") from error
    if not table.num_rows:
        raise _refusal(path, "must have rows, got none")
    for name, column in zip(columns, table.columns, strict=True):
        is_list = pa.types.is_large_list(column.type)
        if column.null_count or (is_list and pc.list_flatten(column).null_count):
            raise _refusal(path, f"must have a value in each cell of {name}, got an empty one")
    return table


def read_token_rows(path: Path, vocab_size: int | None = None) -> list[TokenIds]:
    """Read the tokens of each article or document of a file, as writable arrays.

    Raises:
        ValueError: if a row holds an id that a base of `vocab_size` ids does not have.
    """
    rows = [np.array(row) for row in read_table(path, ["input_ids"])["input_ids"].to_numpy()]
    for index, row in enumerate(rows if vocab_size else []):
        if (strange := row[(row < 0) | (row >= vocab_size)]).size:
            wanted = f"must hold token ids in 0..{vocab_size - 1}, which the base has"
            raise _refusal(path, f"{wanted}, got {strange[0]} in row {index}")
    return rows


def check_lengths(path: Path, rows: Sequence[TokenIds]) -> None:
    """Refuse documents of different lengths."""
    for index, row in enumerate(rows):
        if len(row) != len(rows[0]):
            wanted = f"must hold documents of one length ({len(rows[0])} tokens)"
            raise _refusal(path, f"{wanted}, got {len(row)} in row {index}")


def _types() -> dict[str, Any]:
    """Return the type of each column on disk."""
    import pyarrow as pa

    return {
        "title": pa.string(),
        "source": pa.string(),
        "text": pa.large_string(),
        "part": pa.int32(),
        "input_ids": pa.large_list(pa.int32()),
    }


def _made_by(path: Path) -> str:
    return f"dvc repro prepare_{path.parent.name}"


def _refusal(path: Path, fault: str) -> ValueError:
    return ValueError(f"{path} {fault}: delete {path.parent} and run `{_made_by(path)}`")
