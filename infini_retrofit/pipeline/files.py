"""Files that a stage writes, whole or not at all, and reads back, checked: JSON, rows, manifests.

Knows no stage and no metric by name.
"""

import contextlib
import csv
import hashlib
import io
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from infini_retrofit.pipeline.schema import build

MANIFEST = "manifest.json"
_PARTIAL = ".partial"  # ends the name of a file that is being written
_MAX_JSON_BYTES = 1 << 24  # a manifest of 100,000 files has fewer


def write_metrics(path: Path, metrics: Mapping[str, Any]) -> None:
    """Write one JSON object, flat or nested, with sorted keys and finite values only."""
    _refuse_non_finite(metrics, path.name)
    write_text(path, json.dumps(metrics, indent=2, sort_keys=True, allow_nan=False) + "\n")


def write_rows(
    path: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None
) -> None:
    """Write rows of equal keys and finite values as TSV; the first has the default columns."""
    columns = list(columns or rows[0])
    assert all(set(row) == set(columns) for row in rows), path
    for row in rows:
        _refuse_non_finite(row, path.name)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, delimiter="\t", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def read_json(path: Path, schema: Any, made_by: str = "dvc repro") -> Any:
    """Read a JSON file as a dataclass or another type that pydantic knows: `schema`.

    A file names every field of a dataclass and no other. `made_by` is the command that makes it.

    Raises:
        FileNotFoundError: if the file is missing.
        ValueError: names the file, what is wrong in it, and `made_by`.
    """
    return _as(schema, _read(path, made_by)[1], path, made_by)


def _read(path: Path, made_by: str) -> tuple[str, Any]:
    """Return a JSON file's text and values."""
    check_made(path, made_by)
    advice = _advice(made_by)
    if (size := path.stat().st_size) > _MAX_JSON_BYTES:
        raise ValueError(f"{path} must have at most {_MAX_JSON_BYTES} bytes, got {size}: {advice}")
    try:
        text = path.read_bytes().decode()
        return text, json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise ValueError(f"{path} is not valid JSON (nested too deeply): {advice}") from error
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): {advice}") from error


def write_sealed(path: Path, values: Any) -> None:
    """Write a dataclass as JSON with its own sha256."""
    write_text(path, _sealed_text(asdict(values)))


def read_sealed(path: Path, schema: Any, made_by: str) -> Any:
    """Read what `write_sealed` wrote, as `read_json` does; a changed byte is refused."""
    text, found = _read(path, made_by)
    values = _as(dict, found, path, made_by)
    values.pop("sha256", None)
    if text != _sealed_text(values):
        raise ValueError(f"{path} differs from its sha256: {_advice(made_by)}")
    return _as(schema, values, path, made_by)


def _as(schema: Any, values: Any, path: Path, made_by: str) -> Any:
    try:
        return build(schema, values, str(path))
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{error}: {_advice(made_by)}") from error


def _advice(made_by: str) -> str:
    return f"delete it and run `{made_by}`"


def _sealed_text(values: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(values).encode()).hexdigest()
    return json.dumps(values | {"sha256": digest}, indent=2) + "\n"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a JSON object; of equal keys, Python would keep the last one in silence."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice")
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text, whole or not at all."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8", newline="\n")


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Lend the path of a file that replaces `path` at the end: no reader sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + _PARTIAL)
    try:
        yield partial
        partial.replace(path)
    except OSError as error:  # of a full disk, for example, which names no file
        if error.errno and not error.filename:
            error.filename = str(path)
        partial.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Lend a path whose folder becomes `path` at the end, which must not exist then.

    It is always the same path: what a killed run left there is removed first.
    """
    partial = path.with_name(f".partial-{path.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        yield partial
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_manifest(folder: Path) -> None:
    """Write the sha256 of every other file below `folder` to its `manifest.json`."""
    _write_digests(folder / MANIFEST, folder, _file_names(folder))


def verify_manifest(
    folder: Path, made_by: str = "dvc repro", names: Sequence[str] | None = None
) -> None:
    """Compare a folder with its manifest: DVC misses a flipped byte in its cache.

    `names`: the files that are read; None: all, and no other file may be there.
    """
    digests = read_json(folder / MANIFEST, dict[str, str], made_by)
    found, advice = _file_names(folder), f"delete {folder} and run `{made_by}`"
    for name in sorted({*digests, *found}) if names is None else names:
        if name not in found or name not in digests:
            fault = "is not in its manifest" if name in found else "is missing"
            raise ValueError(f"{folder / name} {fault}: {advice}")
        _compare(folder / name, digests[name], f"{advice}, with -s -f if DVC brings it back as is")


def seal_results(stage: str, files: Sequence[Path]) -> None:
    """Write the sha256 of metrics and plots of a stage, for the stages that read them."""
    _write_digests(_seal(stage), Path(), [file.as_posix() for file in files])


def verify_results(stage: str, files: Sequence[Path]) -> None:
    """Compare metrics and plots with what their stage wrote; `files` must be among them."""
    made_by = f"dvc repro {stage}"
    for path in files:
        check_made(path, made_by)
    digests = read_json(_seal(stage), dict[str, str], made_by)
    for name in {file.as_posix(): "" for file in files} | digests:
        path, advice = Path(name), f"delete {_seal(stage)} and run `{made_by}`"
        check_made(path, made_by)
        _compare(path, digests.get(name, "none"), advice)


def _seal(stage: str) -> Path:
    return Path(f"data/{stage}.manifest.json")


def _write_digests(manifest: Path, folder: Path, names: Sequence[str]) -> None:
    digests = {name: sha256(folder / name) for name in names}
    write_text(manifest, json.dumps(digests, indent=2, sort_keys=True) + "\n")


def _compare(path: Path, digest: str, advice: str) -> None:
    if sha256(path) != digest:
        raise ValueError(f"{path} differs from its manifest (sha256): {advice}")


def given_path(path: str) -> Path:
    """Return a path of params.yaml, from the project's folder.

    DVC runs `--temp` and the queue in copies, which lack what is not committed, and names the
    project's folder in `DVC_ROOT`.
    """
    return Path(os.environ.get("DVC_ROOT", ""), path)


def check_made(path: Path, made_by: str) -> None:
    """Refuse a missing file; the error names the command that makes it."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: run `{made_by}` to make it")


def check_folder(folder: Path, file: str, kind: str, made_by: str) -> None:
    """Refuse a folder without `file`; the error names such folders beside it."""
    if (folder / file).is_file():
        return
    fault = f"holds no {file}: it is no {kind};" if folder.is_dir() else "is missing:"
    beside = sorted(str(path.parent) for path in folder.parent.glob(f"*/{file}"))
    way_out = f" in the project's folder (this one is {Path.cwd()})"
    if beside:
        way_out = f"; found beside it: {', '.join(beside)}"
    raise FileNotFoundError(f"{folder} {fault} run `{made_by}` to make a {kind}{way_out}")


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _file_names(folder: Path) -> list[str]:
    """List every file below `folder` but its manifest, with forward slashes.

    A file that a killed run began to write is none.
    """
    names = (p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    return sorted(name for name in names if name != MANIFEST and not name.endswith(_PARTIAL))


def check_writable(folder: Path, free_bytes: int = 0) -> None:
    """Make a folder; refuse a full or read-only disk now rather than after hours."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(f"cannot write to {folder}: {error.strerror}") from error
    if (free := shutil.disk_usage(folder).free) < free_bytes:
        wanted, found = free_bytes / 2**30, free / 2**30
        needs = f"{folder} must have {wanted:.1f} GiB free, got {found:.1f} GiB"
        raise OSError(f"{needs}: free space on that disk, or move the project to another")


def _refuse_non_finite(value: Any, name: str) -> None:
    """Refuse the first of nested values that is NaN or infinite."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            _refuse_non_finite(item, f"{name}: {key}")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}; nothing was written")
