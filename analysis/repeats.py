"""Repeats are experiments that differ in random seeds alone: what the memory gains in each.

Knows parameters and scores of documents; not how experiments are run.
"""

import argparse
from collections.abc import Sequence

import pandas as pd

from analysis.comparing import MODELS, PROTOCOL, check_comparable
from analysis.loading import differing, find_experiments, load_scores, load_settings
from analysis.table import MISSING, rows_as_markdown, write_interval
from infini_retrofit.evaluation.gains import gains

# What the model is compared with, by the names that `gains` gives the gains.
RIVALS = {
    "gain_over_off": "its memory off",
    "gain_over_swapped": "another document's memory",
    "gain_over_recent": "the memory of the last segment only",
    "gain_over_control": "the control",
    "gain_over_kv": "the better rival of equal bytes",
    "gain_over_selected": "the control with as many bytes of selected keys and values",
    "gain_over_pointer": "the control with a pointer",
    "gain_beside_pointer": "the control with a pointer, both with it",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the gains of the memory in each experiment and on average."""
    about = "Print what the memory gains under each random seed, and on average."
    parser = argparse.ArgumentParser("python -m analysis repeats", description=about)
    parser.add_argument("names", nargs="+", metavar="NAME", help="finished experiments")
    names = parser.parse_args(arguments).names
    experiments = find_experiments("repeats", names)
    check_repeats(load_settings(experiments), names)
    rows = gains_of_repeats(load_scores(experiments), names)
    print(f"finetuned, protocol {PROTOCOL}:\n")
    header = ["nats a token better than", *names, "on average", "95% interval"]
    print(rows_as_markdown(header, rows))


def check_repeats(settings: pd.DataFrame, names: Sequence[str]) -> None:
    """Refuse experiments that are not one configuration under several random seeds.

    The code that they ran is not compared.

    Raises:
        ValueError: if so.
    """
    if others := [key for key in differing(settings) if not key.endswith(".seed")]:
        raise ValueError(
            "repeats needs experiments that differ in seeds alone, got some that differ in "
            + ", ".join(sorted(others))
        )
    if len(names) < 2 or len(set(names)) < len(names) or settings.duplicated().any():
        raise ValueError(
            "repeats needs two experiments or more, each of other seeds, got " + ", ".join(names)
        )


def gains_of_repeats(scores: pd.DataFrame, names: Sequence[str]) -> list[list[str]]:
    """Write the gains of each experiment, and those of the scores averaged over experiments.

    Returns:
        For each rival the gains over it in nats a token, their average and its interval. The
        interval resamples articles for the seeds at hand; the columns show what a seed changes.

    Raises:
        ValueError: if documents, articles or bases differ.
    """
    check_comparable(scores, names)
    found = [_gains(scores[scores.experiment == name]) for name in names]
    keys = ["model", "protocol", "document", "article"]
    average = _gains(scores.groupby(keys, as_index=False).nll.mean())
    found.append(average)
    rows = []
    for key, description in RIVALS.items():
        if all(key in own for own in found):
            ends = [average.get(f"{key}_{end}") for end in ("low", "high")]
            interval = MISSING if None in ends else write_interval(*ends)
            rows.append([description, *(f"{own[key]:+.4f}" for own in found), interval])
    return rows


def _gains(scores: pd.DataFrame) -> dict[str, float]:
    """Compare a model with its rivals, given one score for each model, protocol and document."""
    keys = ["document", "article"]
    nlls = scores.pivot(index=keys, columns=["model", "protocol"], values="nll").sort_index(axis=1)
    model, control = (
        {protocol: column.to_numpy() for protocol, column in nlls[name].items()} for name in MODELS
    )
    return gains(model, control, list(nlls.index.get_level_values("article")))
