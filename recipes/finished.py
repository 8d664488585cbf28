"""Experiments that ran to their end, and which of them a command means.

Knows what DVC shows of an experiment; no metric by name.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from recipes.experiments import Source
from recipes.overlays import recipe_names

Metrics = Mapping[str, Any]  # of one experiment, by file


class Finished(NamedTuple):
    """An experiment that ran to its end: where its files are, its metrics, and its code."""

    source: Source
    metrics: Metrics
    code: str  # the commit that it started from


def finished(commits: Sequence[Mapping[str, Any]]) -> dict[str, Finished]:
    """Return every experiment that ran to its end, the newest of a name.

    Args:
        commits: what `dvc exp show --json` prints.
    """
    newest: dict[str, tuple[Mapping[str, Any], str]] = {}
    for commit in commits:
        for experiment in commit["experiments"] or []:
            last = experiment["revs"][0]
            state = (experiment["executor"] or {}).get("state", "success")
            if last["data"] is None or state != "success":
                continue
            before = newest.get(experiment["name"])
            if before is None or last["data"]["timestamp"] > before[0]["data"]["timestamp"]:
                newest[experiment["name"]] = last, commit["rev"]
    return {
        name: Finished(last["rev"], last["data"]["metrics"], code)
        for name, (last, code) in newest.items()
    }


def choose(option: str, names: Sequence[str], experiments: Mapping[str, Finished]) -> Sequence[str]:
    """Return which experiments are meant: if none is named, all that there are of recipes.

    Raises:
        ValueError: if a name is neither a recipe nor an experiment, or there are none of recipes.
    """
    names = names or [name for name in recipe_names() if name in experiments]
    if not names:
        raise ValueError("no recipe has been run yet: try python -m recipes --list")
    if strange := [name for name in names if name not in {*recipe_names(), *experiments}]:
        raise ValueError(
            f"{option} needs names of recipes or experiments, got {', '.join(strange)}"
        )
    return names


def check_finished(option: str, names: Sequence[str], experiments: Mapping[str, Finished]) -> None:
    """Refuse names that stand for no finished experiment.

    Raises:
        ValueError: if there is one, or no name at all.
    """
    if not names or (missing := [name for name in names if name not in experiments]):
        raise ValueError(
            f"{option} needs names of finished experiments, got "
            + (f"some that have not been run: {', '.join(missing)}" if names else "none")
        )


def sources_of(experiments: Mapping[str, Finished]) -> dict[str, Source]:
    """Return where the files of every experiment are."""
    return {name: experiment.source for name, experiment in experiments.items()}
