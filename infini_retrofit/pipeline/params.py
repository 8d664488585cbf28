"""Read values of `params.yaml`, and of files made from it, into the dataclasses of their code.

Knows nothing of any section: a dataclass lives with the module that owns its knobs, and checks
its own ranges in `__post_init__`. The file is read with DVC's own reader, so that `1e-4` is a
number and `on` is text to both.
"""

import json
import math
import typing
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar

from infini_retrofit.pipeline.files import check_made

T = TypeVar("T")
PARAMS_PATH = Path("params.yaml")
_WORDS = {int: "an integer", float: "a finite number", str: "text", bool: "true or false"}


def load_section(cls: type[T], name: str, path: Path = PARAMS_PATH) -> T:
    """Read what stands at `name` (dots go down) as a `cls`.

    Args:
        cls: a dataclass, whose fields are the section's only allowed keys, or a plain type such
            as `int` for a single value (`load_section(int, "infini.segment_length")`).
        name: such as `distill` or `finetune.lr_scale`.
        path: the parameters' file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if a key is unknown or missing, or a value has another type than its field
            (an integer is accepted where a number is asked for).
    """
    return _convert(_find(read_params(path), name, path), cls, name)


def load_choice(
    kinds: Mapping[str, type], chooser: str, table: str, path: Path = PARAMS_PATH
) -> Any:
    """Read the preset that `chooser` names in `table`, as the dataclass of its `source`.

    Raises:
        ValueError: if the preset or its source is unknown (the choices are listed), or as in
            `load_section`.
    """
    name = load_section(str, chooser, path)
    presets = _mapping(_find(read_params(path), table, path), table)
    if name not in presets:
        choices = ", ".join(sorted(map(str, presets)))
        raise ValueError(f"{chooser} must be one of {choices} (the keys of {table}), got {name!r}")
    return _preset(kinds, presets[name], f"{table}.{name}")


def load_presets(kinds: Mapping[str, type], table: str, path: Path = PARAMS_PATH) -> dict[str, Any]:
    """Read every preset of `table`, chosen or not, so that none rots unseen."""
    presets = _mapping(_find(read_params(path), table, path), table)
    return {name: _preset(kinds, preset, f"{table}.{name}") for name, preset in presets.items()}


def load_json(cls: type[T], path: Path, made_by: str) -> T:
    """Read a file that holds a dataclass's fields as JSON.

    Args:
        cls: the dataclass.
        path: the file.
        made_by: the command that makes it, for the message when it is missing.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not valid JSON, or as in `load_section`.
    """
    check_made(path, made_by)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        message = f"{path} is not valid JSON ({error}): run `{made_by}` to make it again"
        raise ValueError(message) from error
    return _convert(values, cls, str(path))


def read_params(path: Path = PARAMS_PATH) -> dict[str, Any]:
    """Read the whole file as DVC reads it: YAML 1.2, duplicate keys refused.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not a mapping in valid YAML and UTF-8.
    """
    # Here, for commands without parameters run without this package.
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: run this in the project's top folder")
    try:
        params = YAML(typ="safe").load(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be UTF-8 text: {error.reason}") from error
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise ValueError(f"{path}, line {line}, is not valid YAML: {error.problem}") from error
    except YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    return _mapping(params, str(path))


def _find(params: dict[str, Any], name: str, path: Path) -> Any:
    """Walk down the dots of `name`."""
    value: Any = params
    for key in name.split("."):
        if not isinstance(value, dict) or key not in value:
            raise ValueError(f"{path} must have the key {name}, which is missing")
        value = value[key]
    return value


def _preset(kinds: Mapping[str, type], preset: Any, name: str) -> Any:
    """Build the dataclass that `source` names; `source` itself is none of its fields."""
    source = _mapping(preset, name).get("source")
    if source not in kinds:
        raise ValueError(f"{name}.source must be one of {', '.join(sorted(kinds))}, got {source!r}")
    try:
        return _build({k: v for k, v in preset.items() if k != "source"}, kinds[source], name)
    except ValueError as error:
        # A preset's dataclass does not know the name it was given.
        message = str(error)
        raise ValueError(message if name in message else f"{name}: {message}") from error


def _build(section: Any, cls: type, name: str) -> Any:
    """Make a dataclass of a section whose keys are exactly its fields."""
    types = typing.get_type_hints(cls)
    names = {field.name for field in fields(cls)}
    given = _mapping(section, name).keys()
    if given != names:
        raise ValueError(
            f"{name} must have exactly its own keys, "
            f"got unknown {sorted(map(str, given - names))}, missing {sorted(names - given)}"
        )
    return cls(**{key: _convert(section[key], types[key], f"{name}.{key}") for key in section})


def _convert(value: Any, annotation: Any, name: str) -> Any:
    """Return `value` as its annotation asks, or refuse it by name."""
    if is_dataclass(annotation):
        return _build(value, annotation, name)
    if _fits(value, annotation):
        return _shape(value, annotation)
    raise ValueError(f"{name} must be {_describe(annotation)}, got {value!r}")


def _fits(value: Any, annotation: Any) -> bool:
    """Tell whether a value read from YAML has the type of `annotation`."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (UnionType, typing.Union):
        return any(_fits(value, argument) for argument in arguments)
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in arguments)
    if origin in (list, tuple):
        return isinstance(value, list) and all(_fits(item, arguments[0]) for item in value)
    if annotation is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is annotation


def _shape(value: Any, annotation: Any) -> Any:
    """Turn an integer into a float and a list into a tuple where the field says so."""
    if annotation is float:
        return float(value)
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (list, tuple):
        return origin(_shape(item, arguments[0]) for item in value)
    if origin in (UnionType, typing.Union):
        return _shape(value, next(a for a in arguments if _fits(value, a)))
    return value


def _describe(annotation: Any) -> str:
    """Say in words what a field takes."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (UnionType, typing.Union):
        return " or ".join(_describe(argument) for argument in arguments)
    if origin is Literal:
        return "one of " + ", ".join(str(choice) for choice in arguments)
    if origin in (list, tuple):
        return f"a list, each item {_describe(arguments[0])}"
    return "null" if annotation is type(None) else _WORDS[annotation]


def _mapping(value: Any, name: str) -> dict[str, Any]:
    """Refuse what is not a mapping of keys to values."""
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be a mapping of keys to values, got {value!r}")
    return value
