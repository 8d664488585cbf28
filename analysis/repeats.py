"""Repeats, experiments that differ in their random seeds alone: what the memory gains in each.

Knows the files that experiments leave; not how they are run.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations, product

import numpy as np

from analysis.against import MODELS, read_rows, read_titles, scores_in, write_interval
from analysis.settings import read_settings
from infini_retrofit.evaluation.evaluation import DocumentNlls, read_document_rows
from infini_retrofit.evaluation.gains import gains
from recipes.experiments import Source
from recipes.overlays import Settings, differing

# By the name that `gains` gives to what a model is compared with.
OTHERS = {
    "off": "its memory off",
    "swapped": "another document's memory",
    "recent": "the memory of the last segment only",
    "control": "the control",
    "kv": "the better rival of equal bytes",
}


def columns(names: Sequence[str]) -> list[str]:
    """Return the header of the table of these experiments."""
    return ["nats a token better than", *names, "on average", "95% interval"]


def gains_of_repeats(sources: Mapping[str, Source], names: Sequence[str]) -> list[list[str]]:
    """Say what the memory gains in each experiment, and on average over all of them.

    Args:
        sources: where the files of each experiment are.
        names: of the experiments.

    Returns:
        Rows as `columns` says. Averaged are each document's scores. The interval is of articles
        resampled, for the seeds at hand; how much a seed matters show the columns beside it.

    Raises:
        ValueError: if their parameters differ in more than seeds, or in none; or if they scored
            other documents. Whether they ran the same code is for the reader to know.
    """
    check_repeats(names, [read_settings(sources[name]) for name in names])
    titles = read_titles(sources, names)
    rows = [read_rows(sources[name]) for name in names]
    for (name, own), scored in product(zip(names, rows, strict=True), MODELS):
        scores_in(own, name, scored)
    model, control = ([nlls_of(r, m) for r in rows] for m in MODELS)
    each = [gains(m, c, titles) for m, c in zip(model, control, strict=True)]
    each.append(gains(average(model), average(control), titles))
    found = [(what, f"gain_over_{other}") for other, what in OTHERS.items()]
    return [
        [what, *(f"{g[key]:+.4f}" for g in each), interval(each[-1], key)]
        for what, key in found
        if all(key in g for g in each)
    ]


def check_repeats(names: Sequence[str], settings: Sequence[Settings]) -> None:
    """Refuse experiments that are not one configuration under several random seeds.

    Raises:
        ValueError: if so.
    """
    for name, own in zip(names, settings, strict=True):
        differ = differing([settings[0], own])
        if strange := sorted(key for key in differ if not key.endswith(".seed")):
            raise ValueError(
                f"--repeats must come with experiments that differ in seeds alone, got {names[0]} "
                f"and {name}, which differ in {', '.join(strange)}"
            )
    if len(names) < 2 or any(one == other for one, other in combinations(settings, 2)):
        raise ValueError(
            "--repeats must come with two experiments or more, each of other seeds, got "
            + ", ".join(names)
        )


def nlls_of(rows: Sequence[Mapping[str, str]], model: str) -> DocumentNlls:
    """Return a model's scores under every protocol."""
    return read_document_rows([row for row in rows if row["model"] == model])


def average(scored: Sequence[DocumentNlls]) -> DocumentNlls:
    """Return each document's mean score over experiments, where all have it."""
    shared = set.intersection(*(set(nlls) for nlls in scored))
    return {name: np.mean([nlls[name] for nlls in scored], axis=0) for name in sorted(shared)}


def interval(found: Mapping[str, float], key: str) -> str:
    """Write the interval of a gain; `-` where there are too few articles for one."""
    is_sure = f"{key}_low" in found
    return write_interval(found[f"{key}_low"], found[f"{key}_high"]) if is_sure else "-"
