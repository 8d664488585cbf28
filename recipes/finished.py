"""Experiments that ran to their end, and which of them a command means.

Knows what DVC shows of an experiment; no metric by name.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from recipes.experiments import Source
from recipes.overlays import recipe_names

Metrics = Mapping[str, Any]  # of one experiment, by file


class Finished(NamedTuple):
    """An experiment that ran to its end: where its files are, and its metrics."""

    source: Source
    metrics: Metrics


def finished(commits: Sequence[Mapping[str, Any]]) -> dict[str, Finished]:
    """Return every experiment that ran to its end, the newest of a name.

    Args:
        commits: what `dvc exp show --json` prints.
    """
    newest: dict[str, Mapping[str, Any]] = {}
    for commit in commits:
        for experiment in commit["experiments"] or []:
            last = experiment["revs"][0]
            state = (experiment["executor"] or {}).get("state", "success")
            if last["data"] is None or state != "success":
                continue
            before = newest.get(experiment["name"])
            if before is None or last["data"]["timestamp"] > before["data"]["timestamp"]:
                newest[experiment["name"]] = last
    return {name: Finished(last["rev"], last["data"]["metrics"]) for name, last in newest.items()}


def choose(option: str, names: Sequence[str], experiments: Mapping[str, Finished]) -> Sequence[str]:
    """Return which experiments are meant: if none is named, those of recipes.

    Raises:
        ValueError: if a name is neither a recipe nor an experiment, or no recipe has been run.
    """
    names = names or [name for name in recipe_names() if name in experiments]
    if not names:
        raise ValueError("no recipe has been run yet: try python -m recipes --list")
    if strange := [name for name in names if name not in {*recipe_names(), *experiments}]:
        raise ValueError(
            f"{option} needs names of recipes or experiments, got {', '.join(strange)}"
        )
    return names


def sources_of(
    option: str, names: Sequence[str], experiments: Mapping[str, Finished]
) -> dict[str, Source]:
    """Return where the files of every finished experiment are.

    Raises:
        ValueError: if no name is asked for, or one that has not been run.
    """
    if not names or (missing := [name for name in names if name not in experiments]):
        raise ValueError(
            f"{option} needs names of finished experiments, got "
            + (f"some that have not been run: {', '.join(missing)}" if names else "none")
        )
    return {name: experiment.source for name, experiment in experiments.items()}
