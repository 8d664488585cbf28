"""Read params.yaml, and JSON files made from it, into the dataclasses of the code that uses them.

Knows no section: a dataclass stands with its code and checks its own ranges in `__post_init__`.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, is_dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

from infini_retrofit.pipeline.files import check_made

T = TypeVar("T")
PARAMS_PATH = Path("params.yaml")
_TYPE_OF_UNION = re.compile(r"(constrained-)?(int|float|str)|\w+\[.*\]")  # named like a key
_ABOUT_KEYS = {"missing": "is missing", "unexpected_keyword_argument": "is unknown"}


def load_section(cls: type[T], name: str, path: Path = PARAMS_PATH) -> T:
    """Read the value at `name`, such as `finetune.lr_scale`, as a `cls`; "" is the whole file."""
    value: Any = read_params(path)
    for key in filter(None, name.split(".")):
        if not isinstance(value, dict) or key not in value:
            raise ValueError(f"{path} must have the key {name}, which is missing")
        value = value[key]
    return _build(cls, value, name)


def load_presets(kinds: Mapping[str, type], table: str, path: Path = PARAMS_PATH) -> dict[str, Any]:
    """Read every preset of `table` as the dataclass of its `source`."""
    presets = load_section(dict, table, path)
    for name in presets:
        at = f"{table}.{name}"
        preset = _build(dict, presets[name], at)
        source = preset.pop("source", None)
        if source not in list(kinds):  # a list, for a mapping has no hash
            choices = ", ".join(sorted(kinds))
            raise ValueError(f"{at}.source must be one of {choices}, got {source!r}")
        presets[name] = _build(kinds[source], preset, at)
    return presets


def load_choice(
    kinds: Mapping[str, type], chooser: str, table: str, path: Path = PARAMS_PATH
) -> Any:
    """Read the preset of `table` that `chooser` names; all presets must be valid."""
    name, presets = load_section(str, chooser, path), load_presets(kinds, table, path)
    if name not in presets:
        choices = ", ".join(sorted(presets))
        raise ValueError(f"{chooser} must be one of {choices} (the keys of {table}), got {name!r}")
    return presets[name]


def load_json(cls: type[T], path: Path, made_by: str) -> T:
    """Read a JSON file as a `cls`; an error names the command that makes the file."""
    check_made(path, made_by)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        message = f"{path} is not valid JSON ({error}): run `{made_by}` to make it again"
        raise ValueError(message) from error
    return _build(cls, values, str(path))


def read_params(path: Path = PARAMS_PATH) -> dict[str, Any]:
    """Read the whole file as DVC does: in YAML 1.2, `1e-4` is a number and `on` is text."""
    from ruamel.yaml import YAML, YAMLError  # here, for chat and export run without it

    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: run this in the project's top folder")
    try:
        params = YAML(typ="safe").load(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, YAMLError) as error:
        message = " ".join(str(error).split())
        raise ValueError(f"{path} is not valid YAML in UTF-8: {message}") from error
    if not isinstance(params, dict):
        raise ValueError(f"{path} must be a mapping of keys to values, got {params!r}")
    return params


def leaves(params: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every value by its dotted name; a list is one value."""
    for key, value in params.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _build(cls: type[T], value: Any, name: str) -> T:
    """Return a value of a file as a `cls`, or refuse its faults by name."""
    from pydantic import TypeAdapter, ValidationError  # here, for chat and export run without it

    # NaN and infinity become text, which no number is.
    value = json.loads(json.dumps(value, default=str), parse_constant=str)
    try:
        built = TypeAdapter(cls).validate_json(json.dumps(value), strict=True, extra="forbid")
    except ValidationError as error:
        raise ValueError("; ".join(_faults(error.errors(), name))) from error
    fields = {name: asdict(built) if is_dataclass(built) else built}
    given = dict(leaves({name: value}))
    for key, field in leaves(fields):
        if key not in given:  # a default is for callers in Python: a file names every field
            raise ValueError(f"{key.lstrip('.')} is missing")
        if type(given[key]) is bool and type(field) is not bool:  # one of the choices is 1
            raise ValueError(f"{key.lstrip('.')} must be a number, got {given[key]}")
    return built


def _faults(errors: list[Any], name: str) -> Iterator[str]:
    """Yield a sentence for each key that pydantic refuses; the members of a union share one."""

    def key_of(error: Any) -> str:
        keys = [str(key) for key in error["loc"] if not _TYPE_OF_UNION.fullmatch(str(key))]
        return ".".join(filter(None, [name, *keys]))

    for key, same_key in groupby(errors, key_of):
        error, *others = same_key
        if error["type"] == "value_error":
            message = str(error["ctx"]["error"])
            yield message if key in message else f"{key}: {message}"
        elif error["type"] in _ABOUT_KEYS:
            yield f"{key} {_ABOUT_KEYS[error['type']]}"
        else:
            wanted = (e["msg"].removeprefix("Input should be ") for e in (error, *others))
            yield f"{key} must be {' or '.join(wanted)}, got {error['input']!r}"
