"""Read params.yaml into the dataclasses of the code that uses them.

Knows no section: a dataclass stands with its code and checks its own ranges in `__post_init__`.
"""

import copy
import functools
import math
import re
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from infini_retrofit.pipeline.schema import build

T = TypeVar("T")
PARAMS_PATH = Path("params.yaml")
# Bytes of the file, levels, characters of a text, size of a whole number: no parameter has more.
_MOST_BYTES, _MOST_NESTED, _MOST_LETTERS, _MOST_NUMBER = 100_000, 10, 1000, 2**32
_PRESET = re.compile(r"[\w-]+")  # DVC parts the keys of params.yaml by dots


def load_section(cls: type[T], name: str, path: Path = PARAMS_PATH) -> T:
    """Read the value at `name`, such as `finetune.lr_scale`, as a `cls`; "" is the whole file."""
    value: Any = read_params(path)
    for key in filter(None, name.split(".")):
        if not isinstance(value, dict) or key not in value:
            raise ValueError(f"{path} must have the key {name}, which is missing")
        value = value[key]
    return build(cls, value, name)


def load_presets(kinds: Mapping[str, type], table: str, path: Path = PARAMS_PATH) -> dict[str, Any]:
    """Read every preset of `table` as the dataclass of its `source`."""
    presets = load_section(dict, table, path)
    for name in presets:
        at = f"{table}.{name}"
        if not _PRESET.fullmatch(name):
            raise ValueError(f"{table} must have keys of letters, digits, - and _, got {name!r}")
        preset = build(dict, presets[name], at)
        source = preset.pop("source", None)
        if source not in list(kinds):  # a list, for a mapping has no hash
            choices = ", ".join(sorted(kinds))
            raise ValueError(f"{at}.source must be one of {choices}, got {_shown(source)}")
        presets[name] = build(kinds[source], preset, at)
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


def read_params(path: Path = PARAMS_PATH) -> dict[str, Any]:
    """Read the whole file as DVC does: in YAML 1.2, `1e-4` is a number and `on` is text."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: run this in the project's top folder")
    if (size := path.stat().st_size) > _MOST_BYTES:
        raise ValueError(f"{path} must have at most {_MOST_BYTES:,} bytes, got {size:,}")
    try:
        params = copy.deepcopy(_parse(path.read_text(encoding="utf-8-sig")))
    except ValueError as error:
        raise ValueError(f"{path} must be plain YAML in UTF-8: {error}") from error
    if not isinstance(params, dict):
        got = "an empty file" if params is None else _shown(params)
        raise ValueError(f"{path} must be a mapping of keys to values, got {got}")
    _check_plain(params, "")
    return params


@functools.lru_cache(maxsize=1)
def _parse(text: str) -> Any:
    """Return what a YAML text holds, or refuse it with the line."""
    from ruamel.yaml import YAML  # here, for chat and export run without it
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    try:
        _check_yaml(text)
        return YAML(typ="safe").load(text)
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ValueError(f"{error.problem}, line {line}") from error
    except (YAMLError, OverflowError) as error:
        raise ValueError(str(error)) from error


def _check_yaml(text: str) -> None:
    """Refuse what takes minutes to read, what two keys share, and values with a tag."""
    from ruamel.yaml import YAML
    from ruamel.yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent

    depth = 0
    for event in YAML(typ="safe").parse(text):
        at = f"line {event.start_mark.line + 1}"
        depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
        if depth > _MOST_NESTED:
            raise ValueError(f"{at} is nested more than {_MOST_NESTED} levels deep")
        if isinstance(event, AliasEvent):  # -S would change both
            raise ValueError(f"{at} has the alias *{event.anchor}: write its value out")
        if tag := getattr(event, "tag", None):
            raise ValueError(f"{at} has the tag {tag}: write the value without it")


def _check_plain(value: Any, name: str) -> None:
    """Refuse values that no parameter can have, whatever its section says."""
    if isinstance(value, dict):
        for key, item in value.items():
            at = f"{name}.{key}".lstrip(".")
            if not isinstance(key, str):
                raise ValueError(f"{at!r} must be a key of text, got {_shown(key)}")
            _check_plain(key, f"the key {key!a}")
            _check_plain(item, at)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _check_plain(item, f"{name}.{index}")
    elif isinstance(value, str):
        if len(value) > _MOST_LETTERS:
            raise ValueError(f"{_cut(name)} must have at most {_MOST_LETTERS} characters")
        if any(unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") for letter in value):
            raise ValueError(f"{name} must be text without control characters, got {value!a}")
    elif isinstance(value, int):
        if abs(value) > _MOST_NUMBER:
            most = f"{_MOST_NUMBER:,} in size"
            raise ValueError(f"{name} must be at most {most}, got {_shown(value)}")
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{name} must be a finite number, got {value}")
    elif value is not None:
        raise ValueError(f"{name} must be a plain value, got a {type(value).__name__}: quote it")


def _shown(value: Any) -> str:
    return _cut(repr(value))


def _cut(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}..."
