"""Read params.yaml into the dataclasses of the code that uses them.

Knows no section: a dataclass stands with its code and checks its own ranges in `__post_init__`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from infini_retrofit.pipeline.schema import build

T = TypeVar("T")
PARAMS_PATH = Path("params.yaml")


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
        preset = build(dict, presets[name], at)
        source = preset.pop("source", None)
        if source not in list(kinds):  # a list, for a mapping has no hash
            choices = ", ".join(sorted(kinds))
            raise ValueError(f"{at}.source must be one of {choices}, got {source!r}")
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
