"""Fill the tables of README.md and docs/ with numbers of metrics/ and results/, and draw them.

`python -m analysis fill_tables` in the top folder rewrites every table between the comments
`<!-- name -->` and `<!-- /name -->`, on whichever page these stand.
"""

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from analysis.against import write_lead
from analysis.comparing import check_comparable, document_nlls, split_comparable
from analysis.loading import load_metrics, load_scores, load_settings
from analysis.picture import draw, save
from analysis.table import (
    PARAMETERS,
    SEGMENT,
    lay_out,
    markdown,
    ppl,
    rows_as_markdown,
    write,
)
from recipes.kept import kept_experiments
from recipes.overlays import recipe_names

PICTURE = Path("docs/recipes.png")
BASE = "(the base as it was)"
DEFAULT_METRICS = [
    *("sliding_test_ppl", "full_test_ppl", "segment_test_ppl", "segment_off_test_ppl"),
    *("segment_swapped_test_ppl", "segment_kv_test_ppl", "t2_test_ppl", "unigram_test_ppl"),
    *("gap_test_nats", "gap_recovered", "state_bytes", "num_documents", "num_articles"),
]
SEED_RECIPES = ("v1", "v1-fixed", "v2", "v2-fixed", "two-stage", "two-stage-fixed")  # docs/seeds.md
# Other texts: their scores compare with no other recipe's.
ON_CODE = ("code-gated-delta", "code-neural-cache", "code-neural-cache-frozen")
LONG_CONTEXT = ("passkey", "passkey-mini", "streaming", "yarn")  # docs/long-context.md has theirs
DROPPED = ("lolcats",)  # of the recipes' budget; their form and recipe are gone from the code
# Of one control and one budget; each differs from another in what README speaks of.
CHOICES = (
    *("infini-all-delta", "infini-all", "infini-all-gamma", "infini-all-forgetting"),
    *("memory-and-attention-no-forgetting", "memory-and-attention-gamma"),
    *("memory-and-attention-one-rate", "memory-and-attention-head-gate", "memory-and-attention"),
)
# A row, and for each of two columns an experiment, one of its models and a protocol; None: not run.
Cell = tuple[str, str, str] | None
WON: tuple[tuple[str, Cell, Cell], ...] = (
    (
        "nothing crosses a border (the base; the control)",
        ("memory-only", "base", "segment"),
        ("memory-and-attention", "control", "segment"),
    ),
    (
        "Infini-attention as published, memory of 65 tokens' bytes (recipe `infini-all`)",
        None,
        ("infini-all", "finetuned", "segment"),
    ),
    (
        "the same, by the delta rule with ARMT's normaliser (recipe `infini-all-gamma`)",
        None,
        ("infini-all-gamma", "finetuned", "segment"),
    ),
    (
        "a memory of 8.1 tokens' bytes (recipes `memory-only`, `memory-and-attention`)",
        ("memory-only", "finetuned", "segment"),
        ("memory-and-attention", "finetuned", "segment"),
    ),
    (
        "the same, reading only what the segment just before wrote",
        ("memory-only", "finetuned", "segment_recent"),
        ("memory-and-attention", "finetuned", "segment_recent"),
    ),
    (
        "the same, reading another document's memory",
        ("memory-only", "finetuned", "segment_swapped"),
        ("memory-and-attention", "finetuned", "segment_swapped"),
    ),
    (
        "keys and values of 9 tokens",
        ("memory-only", "base", "segment_kv"),
        ("memory-and-attention", "control", "segment_kv"),
    ),
    (
        "keys and values of 64 tokens",
        ("memory-and-context", "finetuned", "segment_off"),
        ("memory-and-context", "control", "segment"),
    ),
    (
        "keys and values of 64 tokens, and the memory in float32 (recipe `memory-and-context`; "
        "right: `mca-4e-4` in `results/`)",
        ("memory-and-context", "finetuned", "segment"),
        ("mca-4e-4", "finetuned", "segment"),
    ),
    (
        "the same, reading another document's memory",
        ("memory-and-context", "finetuned", "segment_swapped"),
        ("mca-4e-4", "finetuned", "segment_swapped"),
    ),
    (
        "keys and values of 73 tokens: the bytes of 64 and of that memory in float32",
        ("memory-and-context", "base", "segment_kv"),
        ("mca-4e-4", "control", "segment_kv"),
    ),
    (
        "keys and values of 64 tokens, and the memory in 16 bits (recipe "
        "`memory-context-attention`)",
        None,
        ("memory-context-attention", "finetuned", "segment"),
    ),
    (
        "the same, reading another document's memory",
        None,
        ("memory-context-attention", "finetuned", "segment_swapped"),
    ),
    (
        "keys and values of 69 tokens: the bytes of 64 and of the memory in 16 bits (right: "
        "`control-69-tokens` in `results/`, trained with all of them)",
        ("memory-context-attention", "base", "segment_kv"),
        ("control-69-tokens", "finetuned", "segment"),
    ),
    (
        "full attention over the document",
        ("memory-only", "base", "full"),
        ("memory-and-attention", "control", "full"),
    ),
)
BEST = "memory-and-attention"
WITHOUT = (  # one choice of BEST, what replaces it, and the experiment with that
    (
        "each feature forgets at a learned rate (`decay: feature`)",
        "nothing is forgotten",
        "memory-and-attention-no-forgetting",
    ),
    ("the same", "ARMT's delta rule, which takes no decay", "memory-and-attention-gamma"),
    (
        "8 learned features a head (`feature_map: hedgehog`)",
        "64 fixed ones, eight times the bytes",
        "infini-all-forgetting",
    ),
    (
        "they and the gate's queries learn at 25 times the attention's rate",
        "at that rate",
        "memory-and-attention-one-rate",
    ),
    (
        "the query moves the gate (`gate: query`)",
        "one share a head",
        "memory-and-attention-head-gate",
    ),
)

_TABLE = re.compile(r"<!-- (?P<name>\w+) -->\n.*?<!-- /(?P=name) -->", re.DOTALL)


def main(arguments: Sequence[str] | None = None) -> None:
    """Rewrite the pages in place, and the picture."""
    about = "Rewrite the tables of README.md and docs/, and their picture."
    parser = argparse.ArgumentParser("python -m analysis fill_tables", description=about)
    parser.parse_args(arguments)
    made = tables()
    for page in pages():
        page.write_text(fill(page.read_text(encoding="utf-8"), made), encoding="utf-8")
    save(draw_recipes(), PICTURE)


def pages() -> list[Path]:
    """Return the pages that may hold tables."""
    return [Path("README.md"), *sorted(Path("docs").glob("*.md"))]


def fill(text: str, made: Mapping[str, str]) -> str:
    """Replace the tables of a page.

    Raises:
        ValueError: if the page names a table that is not made.
    """

    def replace(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in made:
            raise ValueError(f"a table must be one of {', '.join(sorted(made))}, got {name}")
        return f"<!-- {name} -->\n{made[name]}\n<!-- /{name} -->"

    return _TABLE.sub(replace, text)


def tables() -> dict[str, str]:
    """Make every table, by its name on the pages."""
    kept = kept_experiments()
    metrics = load_metrics(kept)
    recipes = metrics.loc[recipes_by_ppl(metrics)]
    chosen = load_settings({name: kept[name] for name in CHOICES})
    protocols = pd.concat([base_row(metrics), recipes]).rename_axis(metrics.index.name)
    return {
        "results": default_results(),
        "protocols": markdown(lay_out(protocols, "protocols")),
        "gains": markdown(lay_out(recipes, "gains")),
        "won": won(metrics),
        "choices": markdown(lay_out(metrics.loc[list(CHOICES)], "choices", chosen)),
        "earned": earned(metrics),
        "labels": markdown(lay_out(metrics.loc[list(SEED_RECIPES)], "labels")),
    }


def default_results() -> str:
    """Write the scores of the default run: a row a metric, a column a model."""
    metrics = pd.DataFrame(json.loads(Path("metrics/eval_sliding.json").read_text()))
    rows = [
        [f"`{name}`", *(write(name, value) for value in row)]
        for name, row in metrics.reindex(index=DEFAULT_METRICS).iterrows()
    ]
    return rows_as_markdown(["metric", *metrics.columns], rows)


def recipes_by_ppl(metrics: pd.DataFrame) -> list[str]:
    """Return the recipes that share budget and texts and those dropped, the best first."""
    shared = {*recipe_names(), *DROPPED} - {*SEED_RECIPES, *ON_CODE, *LONG_CONTEXT}
    ranked = metrics[SEGMENT].sort_values(kind="stable").index
    return [name for name in ranked if name in shared]


def base_row(metrics: pd.DataFrame) -> pd.DataFrame:
    """Return the scores of the base in the columns of a model, under protocols of every form."""
    columns = {ppl(name, "base"): ppl(name) for name in ("sliding", "full", "segment")}
    return metrics.loc[["infini-all"], list(columns)].set_axis([BASE]).rename(columns=columns)


def won(metrics: pd.DataFrame) -> str:
    """Write `WON`, in perplexities."""

    def show(cell: Cell) -> str:
        if cell is None:
            return "not run"
        name, model, protocol = cell
        return f"{metrics.loc[name, ppl(protocol, model)]:.3f}"

    header = ["test PPL", "base left as it is", "attention of all layers trained"]
    rows = [[label, show(base), show(trained)] for label, base, trained in WON]
    return rows_as_markdown(header, rows)


def earned(metrics: pd.DataFrame) -> str:
    """Write what `BEST` wins over the same without one choice, and how many parameters train."""
    kept, names = kept_experiments(), [BEST, *(name for *_, name in WITHOUT)]
    scores = load_scores({name: kept[name] for name in names})
    check_comparable(scores, names)
    nlls = document_nlls(scores).xs("finetuned", axis=1, level="model")
    rows = []
    for choice, instead, name in WITHOUT:
        trained = write(PARAMETERS, metrics.loc[name, PARAMETERS])
        rows.append([choice, instead, *write_lead(nlls[name] - nlls[BEST]), trained])
    header = ["choice", "in its place", "what it earns", "95% interval", "trained parameters"]
    return rows_as_markdown(header, rows)


def draw_recipes() -> Figure:
    """Draw the recipes that compare with the best one."""
    kept = kept_experiments()
    metrics = load_metrics(kept)
    best, *_ = split_comparable(load_scores(kept), recipes_by_ppl(metrics))
    return draw(metrics, [("", best)])
