"""One finished experiment against others, document by document, and which of them compare.

Knows the file of scores that experiments leave; not how they are run.
"""

import csv
from collections.abc import Mapping, Sequence
from math import exp

from infini_retrofit.evaluation.gains import MIN_GROUPS_FOR_INTERVAL, paired_bootstrap
from recipes.experiments import Source, read_file
from recipes.kept import SCORES

PROTOCOL = "segment"
MODELS = ("finetuned", "control")
COLUMNS = ("than", "its model", "nats a token better", "95% interval")

# Of the base a score that no parameter of an experiment changes, but for its texts and its base.
_SAME_TEXTS = ("base", "full")
_ROUNDING = 1e-2  # nats a token, between machines and number types

# A document's mean in nats a token and its article, by the document's number.
Scores = dict[str, tuple[float, str]]


def read_rows(source: Source) -> list[dict[str, str]]:
    """Read an experiment's scores: a row for each model, protocol and document; or none."""
    try:
        text = read_file(source, SCORES)
    except FileNotFoundError:
        return []
    return list(csv.DictReader(text.splitlines(), delimiter="\t"))


def read_scores(name: str, source: Source, model: str, protocol: str = PROTOCOL) -> Scores:
    """Read what a model of an experiment scored under a protocol; raises as `scores_in`."""
    return scores_in(read_rows(source), name, model, protocol)


def scores_in(
    rows: Sequence[Mapping[str, str]], name: str, model: str, protocol: str = PROTOCOL
) -> Scores:
    """Take a model's scores under a protocol from an experiment's rows.

    Raises:
        ValueError: if there are no such scores.
    """
    wanted = [r for r in rows if (r["model"], r["protocol"]) == (model, protocol)]
    if not wanted or "article" not in wanted[0]:
        raise ValueError(
            f"{SCORES} of {name} must hold scores of {model} by article, got none: it was scored "
            "by an older version, run it again"
        )
    return {r["document"]: (float(r["nll"]), r["article"]) for r in wanted}


def gains(sources: Mapping[str, Source], names: Sequence[str]) -> list[tuple[str, str, str, str]]:
    """Say by how much the first experiment's model is better than the others and all controls.

    Args:
        sources: where the files of each experiment are.
        names: of experiments that scored the same documents.

    Returns:
        Rows as `COLUMNS` says: the mean of the differences, and the interval of a paired
        bootstrap over articles, `-` where these are too few for one.

    Raises:
        ValueError: if documents, articles or bases differ.
    """
    read_titles(sources, names)
    own = read_scores(names[0], sources[names[0]], "finetuned")
    pairs = [(name, model) for name in names for model in MODELS][1:]
    return [
        (name, model, *gain(own, read_scores(name, sources[name], model))) for name, model in pairs
    ]


def read_titles(sources: Mapping[str, Source], names: Sequence[str]) -> list[str]:
    """Return the article of each document that all of these experiments scored.

    Raises:
        ValueError: if documents, articles or bases differ.
    """
    base = read_scores(names[0], sources[names[0]], *_SAME_TEXTS)
    for name in names[1:]:
        others = read_scores(name, sources[name], *_SAME_TEXTS)
        if not are_alike(others, base):
            raise ValueError(
                f"experiments must have scored the same documents of the same base, got "
                f"{len(base)} of {names[0]} and {len(others)} of {name}, or of other texts or bases"
            )
    return list(articles(base).values())


def comparable(sources: Mapping[str, Source], names: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Part experiments that compare with each other from those that do not.

    Those of one part scored the same documents with the same base, in segments of the same length.
    How much of the stream `sliding` scored is not looked at.

    Args:
        sources: where the files of each experiment are. One that is missing has nothing that could
            be compared, and stays with the first.
        names: of experiments, in the order that they keep.

    Returns:
        What was scored, in words, and the names of those that scored it.
    """
    parts: list[tuple[dict[str, Scores], list[str]]] = []
    for name in filter(sources.__contains__, names):
        base = _base_scores(name, sources[name])
        same = (found for other, found in parts if _are_same(base, other))
        if found := next(same, None):
            found.append(name)
        else:
            parts.append((base, [name]))
    first, *others = parts or [({}, [])]
    missing = set(names) - set(sources)
    first = (first[0], [name for name in names if name in missing or name in first[1]])
    return [(_what_was_scored(base), found) for base, found in (first, *others)]


def _are_same(base: Mapping[str, Scores], other: Mapping[str, Scores]) -> bool:
    return base.keys() == other.keys() and all(are_alike(base[p], other[p]) for p in base)


def _base_scores(name: str, source: Source) -> dict[str, Scores]:
    """Read what the base scored, by protocol; nothing where articles are not told."""
    rows = [row for row in read_rows(source) if row["model"] == "base" and "article" in row]
    there = {row["protocol"] for row in rows}
    return {
        protocol: scores_in(rows, name, "base", protocol)
        for protocol in (_SAME_TEXTS[1], PROTOCOL)
        if protocol in there
    }


def _what_was_scored(base: Mapping[str, Scores]) -> str:
    if not base:
        return "no scores by article, so that these rows may not compare"
    ppls = [
        f"{exp(sum(nll for nll, _ in scores.values()) / len(scores)):.4g} under {protocol}"
        for protocol, scores in base.items()
    ]
    scores = next(iter(base.values()))
    return (
        f"{len(scores)} documents of {len(set(articles(scores).values()))} articles, on which the "
        f"base has a perplexity of {' and '.join(ppls)}"
    )


def gain(own: Scores, other: Scores) -> tuple[str, str]:
    """Say by how much one model's scores are better than another's on the same documents."""
    groups = list(articles(own).values())
    found = paired_bootstrap([other[k][0] - own[k][0] for k in own], groups)
    is_sure = len(set(groups)) >= MIN_GROUPS_FOR_INTERVAL
    return f"{found.mean:+.4f}", write_interval(found.low, found.high) if is_sure else "-"


def write_interval(low: float, high: float) -> str:
    """Write the ends of an interval of gains."""
    return f"[{low:+.4f}, {high:+.4f}]"


def are_alike(scores: Scores, others: Scores) -> bool:
    """Tell whether scores are of one model and the same documents of the same articles."""
    if articles(scores) != articles(others):
        return False
    return all(abs(scores[k][0] - others[k][0]) < _ROUNDING for k in scores)


def articles(scores: Scores) -> dict[str, str]:
    """Return each document's article."""
    return {document: article for document, (_, article) in scores.items()}
