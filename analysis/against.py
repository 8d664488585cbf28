"""One finished experiment against others, document by document, with intervals.

Knows scores of documents only.
"""

import argparse
from collections.abc import Sequence
from itertools import product

import pandas as pd

from analysis.comparing import MODELS, PROTOCOL, check_comparable, document_nlls
from analysis.loading import find_experiments, load_scores
from analysis.table import MISSING, rows_as_markdown, write_interval
from infini_retrofit.evaluation.bootstrap import MIN_GROUPS_FOR_INTERVAL, paired_bootstrap

HEADER = ("than", "its model", "nats a token better", "95% interval")


def main(arguments: Sequence[str] | None = None) -> None:
    """Print by how much the first experiment's model is better than all others."""
    about = "Print by how much the first experiment's model is better than the others' models."
    parser = argparse.ArgumentParser("python -m analysis against", description=about)
    parser.add_argument("names", nargs="+", metavar="NAME", help="finished experiments")
    names = parser.parse_args(arguments).names
    scores = load_scores(find_experiments("against", names))
    print(f"{names[0]}, finetuned, protocol {PROTOCOL}, is better:\n")
    print(rows_as_markdown(HEADER, compare(scores, names)))


def compare(scores: pd.DataFrame, names: Sequence[str]) -> list[list[str]]:
    """Compare the model of the first experiment with the other models and all controls.

    Returns:
        Rows of `HEADER`.

    Raises:
        ValueError: if documents, articles or bases differ.
    """
    check_comparable(scores, names)
    nlls = document_nlls(scores)
    own = nlls[names[0], MODELS[0]]
    pairs = list(product(names, MODELS))[1:]
    return [[*pair, *write_lead(nlls[pair] - own)] for pair in pairs]


def write_lead(differences: pd.Series) -> tuple[str, str]:
    """Write the mean of differences, and the interval of a paired bootstrap over articles.

    Args:
        differences: in nats a token, one for each document, with `article` in the index. Fewer
            than `MIN_GROUPS_FOR_INTERVAL` articles give no interval.
    """
    articles = list(differences.index.get_level_values("article"))
    mean, low, high = paired_bootstrap(differences.to_numpy(), articles)
    is_sure = len(set(articles)) >= MIN_GROUPS_FOR_INTERVAL
    return f"{mean:+.4f}", write_interval(low, high) if is_sure else MISSING
