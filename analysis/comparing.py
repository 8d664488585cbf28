"""Which experiments compare: those that scored the same documents with the same base.

Knows scores of documents only, as `loading.load_scores` returns them.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from recipes.kept import SCORES

PROTOCOL = "segment"
MODELS = ("finetuned", "control")
BASE_PROTOCOLS = ("full", "segment")
_ROUNDING = 1e-2  # nats a token, between machines and number types


def document_nlls(scores: pd.DataFrame, protocol: str = PROTOCOL) -> pd.DataFrame:
    """Return scores under one protocol: a row a document, a column an experiment and model."""
    wanted = scores[scores.protocol == protocol]
    keys = ["experiment", "model"]
    nlls = wanted.pivot(index=["document", "article"], columns=keys, values="nll")
    return nlls.sort_index(axis=1)


def split_comparable(
    scores: pd.DataFrame, names: Sequence[str], protocols: Sequence[str] = BASE_PROTOCOLS
) -> list[list[str]]:
    """Group the experiments that compare with each other.

    Experiments of one group have equal scores of the base, document by document. So they scored
    the same documents and, under `segment`, have segments of one length. Those without scores
    form a group. The length of the stream under `sliding` is not compared.
    """
    base = scores[(scores.model == "base") & scores.protocol.isin(protocols)]
    keys = ["protocol", "document", "article"]
    nlls = base.pivot(index=keys, columns="experiment", values="nll")
    nlls = nlls.reindex(columns=list(names)).fillna(-1.0)  # no score is below 0
    groups, rest = [], list(names)
    while rest:
        near = nlls[rest].sub(nlls[rest[0]], axis=0).abs() < _ROUNDING
        same = near.all()
        groups.append([name for name in rest if same[name]])
        rest = [name for name in rest if not same[name]]
    return groups


def check_comparable(scores: pd.DataFrame, names: Sequence[str]) -> None:
    """Refuse experiments that cannot be compared document by document.

    Raises:
        ValueError: if one has no scores by article, or scored other documents or another base.
    """
    has = scores[scores.protocol == PROTOCOL].groupby("experiment").model.agg(set)
    if missing := [name for name in names if not {*MODELS} <= has.get(name, set())]:
        raise ValueError(
            f"{SCORES} must hold scores of {' and '.join(MODELS)} by article, got none of "
            f"{', '.join(missing)}: run it again"
        )
    first, *others = split_comparable(scores, names, BASE_PROTOCOLS[:1])
    if others:
        raise ValueError(
            "experiments must have scored the same documents with the same base, got "
            f"{first[0]} and {others[0][0]}, which have not"
        )


def describe_texts(scores: pd.DataFrame, name: str) -> str:
    """Say which documents an experiment scored, and how well its base predicts them."""
    own = scores[(scores.experiment == name) & (scores.model == "base")]
    base = own[own.protocol.isin(BASE_PROTOCOLS)]
    if base.empty:
        return "no scores by article, so that these rows may not compare"
    ppls = np.exp(base.groupby("protocol").nll.mean())
    return (
        f"{base.document.nunique()} documents of {base.article.nunique()} articles, on which the "
        "base has a perplexity of "
        + " and ".join(f"{ppl:.4g} under {protocol}" for protocol, ppl in ppls.items())
    )
