"""What the memory gains over its rivals, in a sentence and in a few numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.report.results import Results
from infini_retrofit.evaluation.bootstrap import MIN_GROUPS_FOR_INTERVAL, paired_bootstrap

RELATIONS = ("better than", "worse than", "not told apart from")


@dataclass(frozen=True)
class Gain:
    """How much better the finetuned model is than a rival, both over the same documents.

    Attributes:
        rival: what it is compared with, in words.
        ppl: the rival's perplexity.
        nats: a token, by which the model is better.
        low: the lower end of the 95% interval; None: too few articles.
        high: its upper end.
    """

    rival: str
    ppl: float
    nats: float
    low: float | None = None
    high: float | None = None

    @property
    def relation(self) -> str:
        """One of `RELATIONS`; without an interval the sign of the rounded gain decides."""
        low = round(self.nats, 3) if self.low is None else self.low
        high = round(self.nats, 3) if self.high is None else self.high
        return RELATIONS[0] if low > 0 else RELATIONS[1] if high < 0 else RELATIONS[2]


def gains(results: Results) -> dict[str, Gain]:
    """Return the gains over every rival that was scored, by a short name.

    Where nothing but the memory was trained, the rivals of equal bytes and of full attention are
    untrained, too.
    """
    alone = results.has_memory and results.trained_memory_alone
    reference = "base" if alone else "control"
    kv = ["finetuned"] if alone else ["finetuned", "control"]
    is_base = results.has_memory and results.is_base_when_off
    base = {"base": ("its untouched base", ["base"], "segment")} if is_base else {}
    rivals = base | {
        "control": ("its trained control", ["control"], "segment"),
        "off": ("itself with the memory off", ["finetuned"], "segment_off"),
        "kv": ("equal bytes of keys and values", kv, "segment_kv"),
        "full": ("full attention", [reference], "full"),
        "swapped": ("another document's memory", ["finetuned"], "segment_swapped"),
    }
    if not results.has_memory:
        rivals = {name: rivals[name] for name in ("control", "full")}
    measured = results.scores["finetuned"]
    found = {}
    for name, (words, models, protocol) in rivals.items():
        ppls = {model: results.ppl(protocol, model) for model in models}
        scored = {model: ppl for model, ppl in ppls.items() if ppl is not None}
        if not scored:
            continue
        model, key = min(scored, key=scored.__getitem__), f"gain_over_{name}"
        if key in measured and (name != "kv" or not alone):
            nats, low, high = (measured.get(key + end) for end in ("", "_low", "_high"))
        else:
            nats, low, high = _compare(results, model, protocol)
        found[name] = Gain(words, scored[model], nats, low, high)
    return found


def verdict(results: Results) -> str:
    """Return the answer of a run in one sentence: whether the memory helps, and against what."""
    found = gains(results)
    # With its memory off, the untouched base is the base.
    told = ("base", "control", *(() if "base" in found else ("off",)), "kv", "full")
    rivals = [found[name] for name in told if name in found]
    parts = [
        f"{relation} {_enumerate([f'{g.rival} ({number(g.ppl)})' for g in of_relation])}"
        for relation in RELATIONS
        if (of_relation := [gain for gain in rivals if gain.relation == relation])
    ]
    subject = _lead(results, found) if results.has_memory else "The model has no memory"
    score = number(results.ppl("segment"))
    basis = _basis(results, rivals[0].low is not None)
    return f"{subject}: perplexity {score} {results.sight}, {'; '.join(parts)}. {basis}"


def _lead(results: Results, found: Mapping[str, Gain]) -> str:
    """Return what the memory does: for the same model without it, and against training alone.

    A control trains other weights than a memory on an untouched base, and decides nothing there.
    """
    off, control = found["off"], found["control"]
    better, worse, _ = RELATIONS
    if off.relation not in (better, worse):
        return "Undecided whether the memory helps"
    verb = "help" if off.relation == better else "harm"
    told = f"The memory {verb}s" if off.low is not None else f"The memory seems to {verb}"
    if off.relation == worse or results.trained_memory_alone or control.relation == better:
        return told
    return f"{told} its own model, which is no better than its control"


def _basis(results: Results, has_intervals: bool) -> str:
    """Return what the verdict rests on."""
    num_groups, groups = results.scores["finetuned"].get("num_articles"), results.groups
    if has_intervals:
        return f"Judged by 95% intervals over {num_groups} {groups}."
    return f"({num_groups or 'Unknown'} {groups}: too few for intervals.)"


def summarize(results: Results) -> dict[str, float]:
    """Return the numbers of `metrics/summary.json`; docs/protocols.md tells what each is.

    They are few, short and rounded: `dvc metrics show` then fits 120 columns.
    """
    found = gains(results)
    ppls = {name: found[name].ppl for name in ("control", "full", "kv", "off") if name in found}
    ppls |= {"base": results.ppl("segment", "base")}
    ppls |= {"ppl": results.ppl("segment"), "sliding": results.ppl("sliding")}
    control = found["control"]
    nats = {"gain": control.nats, "low": control.low, "high": control.high}
    nats |= {"own": found["off"].nats} if "off" in found else {}
    rounded = {name: round(ppl, 2) for name, ppl in ppls.items()}
    # Adding zero makes -0.0 a plain zero.
    return rounded | {name: round(v, 3) + 0.0 for name, v in nats.items() if v is not None}


def number(value: float | None) -> str:
    """Write a perplexity in four digits or more, thousands apart; "-": it was not measured."""
    if value is None:
        return "-"
    return f"{value:,.{2 if value < 100 else 1 if value < 1000 else 0}f}"


def _compare(
    results: Results, model: str, protocol: str
) -> tuple[float, float | None, float | None]:
    """Return how many nats a token the finetuned model is better, and the ends of the interval.

    Without rows that tell the articles, or with few articles, there is no interval.
    """
    rows = results.documents
    if rows.empty or "article" not in rows:
        return float(np.log(results.ppl(protocol, model) / results.ppl("segment"))), None, None
    own, rival = _nlls(rows, "finetuned", "segment"), _nlls(rows, model, protocol)
    differences = (rival.nll - own.nll).to_numpy()
    mean, low, high = paired_bootstrap(differences, own.article.astype(str).tolist())
    if own.article.nunique() < MIN_GROUPS_FOR_INTERVAL:
        return mean, None, None
    return mean, low, high


def _nlls(rows: pd.DataFrame, model: str, protocol: str) -> pd.DataFrame:
    """Return the rows of one model and protocol, by document."""
    chosen = rows[(rows.model == model) & (rows.protocol == protocol)]
    return chosen.set_index("document").sort_index()


def _enumerate(words: Sequence[str]) -> str:
    """Join words with commas, the last with `and`."""
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))
