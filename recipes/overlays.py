"""Recipes as `-S` overrides for `dvc exp run`.

Knows the files of this folder and DVC's override grammar; no section of params.yaml, no metric.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from infini_retrofit.pipeline.params import read_params
from infini_retrofit.pipeline.schema import leaves

FOLDER = Path(__file__).parent
BUDGET = "budget"  # applied before every overlay; no recipe itself
# Words that need no quotes in DVC's (Hydra's) grammar, and words that it reads as no text.
_WORD = re.compile(r"[A-Za-z_][\w./-]*")
_NOT_TEXT = {"true", "false", "null", "inf", "nan"}


def recipe_names() -> list[str]:
    """List the recipes."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml") if path.stem != BUDGET)


def check_recipe(name: str) -> None:
    """Refuse a name that no recipe has.

    Raises:
        ValueError: with the choices.
    """
    if name not in recipe_names():
        raise ValueError(f"a recipe must be one of {', '.join(recipe_names())}, got {name!r}")


def describe(name: str) -> str:
    """Return the first line of a recipe's file, a comment that says what it is.

    Raises:
        ValueError: if that line is no comment.
    """
    path = FOLDER / f"{name}.yaml"
    line = path.read_text(encoding="utf-8").partition("\n")[0]
    if not line.startswith("# "):
        raise ValueError(f"{path.name} must begin with a line `# what it is`, got {line!r}")
    return line.removeprefix("# ").strip()


def read_overlay(name: str) -> dict[str, Any]:
    """Read a recipe's values by dotted name; they win over those of the common budget."""
    return {
        k: v for part in (BUDGET, name) for k, v in leaves(read_params(FOLDER / f"{part}.yaml"))
    }


def left_over(params: Mapping[str, Any], committed: Mapping[str, Any]) -> dict[str, Any]:
    """Return the committed values that params.yaml now differs from, by dotted name.

    A run in the workspace leaves its overrides in params.yaml, and the next recipe must not inherit
    them. Keys that only one of the two has are ignored.
    """
    now = dict(leaves(params))
    return {k: v for k, v in leaves(committed) if k in now and now[k] != v}


def overrides(
    name: str, params: Mapping[str, Any], put_back: Mapping[str, Any], given: Sequence[str]
) -> list[str]:
    """Return the `key=value` of every `-S` for a recipe.

    Args:
        name: of the recipe.
        params: the content of params.yaml.
        put_back: committed values to restore, by dotted name; the recipe's values win.
        given: the user's own overrides; they win over all others.

    Raises:
        ValueError: if params.yaml lacks a key, with the choices.
    """
    overlay = read_overlay(name)
    for key in overlay:
        check_key(key, params, f"recipe {name}")
    own = [check_override(text, params) for text in given]
    wanted = {**put_back, **overlay}
    return [f"{k}={literal(v)}" for k, v in wanted.items() if k not in own] + list(given)


def check_key(key: str, params: Mapping[str, Any], where: str) -> Any:
    """Refuse a key that params.yaml lacks, and return its value.

    Raises:
        ValueError: with the keys of the section where the search ended.
    """
    section: Any = params
    parts = key.split(".")
    for depth, part in enumerate(parts):
        if not isinstance(section, Mapping) or part not in section:
            place = ".".join(parts[:depth]) or "params.yaml"
            choices = sorted(map(str, section)) if isinstance(section, Mapping) else ["no keys"]
            raise ValueError(
                f"{where}: {key} must be a key of params.yaml; {place} has {', '.join(choices)}"
            )
        section = section[part]
    return section


def check_override(override: str, params: Mapping[str, Any]) -> str:
    """Refuse an override that is no `key=value` of one parameter, and return its key.

    Raises:
        ValueError: if so, with what it must be.
    """
    key, equals, value = override.partition("=")
    if not (key and equals) or key != key.strip():
        raise ValueError(f"-S must be key=value, without blanks beside the =, got {override!r}")
    present = check_key(key, params, f"-S {override}")
    if isinstance(present, Mapping) and not value.startswith("{"):
        raise ValueError(
            f"-S must name one value of {key}, such as {key}.{next(iter(present))}=..., got "
            f"{override!r}"
        )
    return key


def literal(value: Any) -> str:
    """Write a value in DVC's override grammar."""
    if isinstance(value, list):
        return "[" + ",".join(map(literal, value)) + "]"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{k}:{literal(v)}" for k, v in value.items()) + "}"
    if isinstance(value, str) and _WORD.fullmatch(value) and value.lower() not in _NOT_TEXT:
        return value
    return json.dumps(value, ensure_ascii=False)
