"""Read the values of a file as a type: every key, its type, its range and its choices.

Knows no file and no section.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, is_dataclass
from itertools import groupby, islice
from typing import Any

_TYPE_OF_UNION = re.compile(r"(constrained-)?(int|float|str)|\w+\[.*\]")  # named like a key
_ABOUT_KEYS = {"missing": "is missing", "unexpected_keyword_argument": "is unknown"}
_SHOWN, _MAX_FAULTS = 200, 9  # characters of a value that is refused, and sentences


def leaves(params: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every value by its dotted name; a list is one value."""
    for key, value in params.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def build(cls: Any, value: Any, name: str) -> Any:
    """Return a value of a file as a `cls`: a dataclass or another type that pydantic knows.

    Raises:
        ValueError: names each key that is wrong, below `name`.
    """
    from pydantic import TypeAdapter, ValidationError  # here, for chat and export run without it

    # NaN and infinity become text, which no number is.
    value = json.loads(json.dumps(value, default=str), parse_constant=str)
    try:
        built = TypeAdapter(cls).validate_json(json.dumps(value), strict=True, extra="forbid")
    except ValidationError as error:
        raise ValueError("; ".join(islice(_faults(error.errors(), name), _MAX_FAULTS))) from error
    fields = asdict(built) if is_dataclass(built) else built
    given = _by_name(name, value)
    for key, field in _by_name(name, fields).items():
        if key not in given:  # a default is for callers in Python: a file names every field
            raise ValueError(f"{key} is missing")
        if type(given[key]) is bool and type(field) is not bool:  # one of the choices is 1
            raise ValueError(f"{key} must be a number, got {given[key]}")
    return built


def _by_name(name: str, value: Any) -> dict[str, Any]:
    return dict(leaves({name: value} if name else value))


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
        elif error["type"] in ("too_short", "too_long"):  # List should have at most 1 item ...
            yield f"{key} must {error['msg'].partition(' should ')[2]}"
        elif error["type"] == "json_invalid":  # valid to Python: deep, or with half a character
            yield f"{key} is not valid JSON ({error['msg'].removeprefix('Invalid JSON: ')})"
        else:
            wanted = (e["msg"].removeprefix("Input should be ") for e in (error, *others))
            yield f"{key} must be {' or '.join(wanted)}, got {repr(error['input'])[:_SHOWN]}"
