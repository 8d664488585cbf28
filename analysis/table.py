"""Finished experiments side by side: `python -m analysis table [NAME ...]`.

Knows which metrics the stages write, and how to write them.
"""

import argparse
from collections.abc import Sequence

import pandas as pd

from analysis.comparing import describe_texts, split_comparable
from analysis.loading import (
    MINUTES,
    TOKENS_SEEN,
    differing,
    find_experiments,
    load_metrics,
    load_scores,
    load_settings,
)

MISSING = "-"


def ppl(protocol: str, model: str = "finetuned") -> str:
    """Return the column of a perplexity on the test split."""
    return f"eval_sliding.{model}.{protocol}_test_ppl"


def gain(other: str) -> str:
    """Return the column of the nats a token by which the model is better."""
    return f"eval_sliding.finetuned.gain_over_{other}"


SEGMENT, CONTROL, BASE = (ppl("segment", model) for model in ("finetuned", "control", "base"))
GAP = "eval_sliding.finetuned.gap_recovered"
STATE_BYTES = "eval_sliding.finetuned.state_bytes"
PARAMETERS = "finetune.num_trainable_parameters"


# Headings of the columns, and the metric in each.
COLUMNS = {
    "summary": {
        "segment": SEGMENT,
        "control": CONTROL,
        "off": ppl("segment_off"),
        "swapped": ppl("segment_swapped"),
        "kv": ppl("segment_kv"),
        "gap_recovered": GAP,
        "bytes": STATE_BYTES,
    },
    "protocols": {
        "sliding": ppl("sliding"),
        "full": ppl("full"),
        "segment": SEGMENT,
        "control": CONTROL,
        "off": ppl("segment_off"),
        "recent": ppl("segment_recent"),
        "swapped": ppl("segment_swapped"),
        "kv": ppl("segment_kv"),
        "control kv": ppl("segment_kv", "control"),
    },
    "gains": {
        "gap_recovered": GAP,
        "over control": gain("control"),
        "over off": gain("off"),
        "over recent": gain("recent"),
        "over swapped": gain("swapped"),
        "over kv": gain("kv"),
        "bytes": STATE_BYTES,
        "trained parameters": PARAMETERS,
        "tokens seen": TOKENS_SEEN,
    },
    # Beside the parameters in which the experiments differ.
    "choices": {
        "segment": SEGMENT,
        "control": CONTROL,
        "gap_recovered": GAP,
        "over control": gain("control"),
        "bytes": STATE_BYTES,
    },
    # What the seeds' doubly shifted labels do.
    "labels": {
        "distillation loss": "distill.val_loss",
        "distilled: sliding": ppl("sliding", "distilled"),
        "distilled: t2": ppl("t2", "distilled"),
        "fine-tuned: sliding": ppl("sliding"),
        "fine-tuned: segment": SEGMENT,
        "fine-tuned: t2": ppl("t2"),
        "control: sliding": ppl("sliding", "control"),
        "control: t2": ppl("t2", "control"),
        "best epoch": "finetune.best_epoch",
        "epochs run": "finetune.epochs_run",
    },
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the named experiments, those that do not compare in tables of their own."""
    options = _options(arguments)
    experiments = find_experiments("table", options.names)
    metrics, scores = load_metrics(experiments), load_scores(experiments)
    settings = load_settings(experiments) if options.columns == "choices" else None
    best_first = metrics.reindex(columns=[SEGMENT]).sort_values(SEGMENT, kind="stable").index
    tables = {}
    for names in split_comparable(scores, best_first):
        own = None if settings is None else settings.loc[names]
        tables[names[0]] = markdown(lay_out(metrics.loc[names], options.columns, own))
    if len(tables) > 1:
        tables = {n: f"{describe_texts(scores, n)}:\n\n{table}" for n, table in tables.items()}
    print("\n\n".join(tables.values()))


def lay_out(
    metrics: pd.DataFrame, columns: str, settings: pd.DataFrame | None = None
) -> pd.DataFrame:
    """Return a table of text.

    Args:
        metrics: as `load_metrics` returns them, a row for each row of the table.
        columns: a key of `COLUMNS`.
        settings: parameters of the same experiments; columns of those that differ come first.
    """
    headings = COLUMNS[columns]
    found = metrics.reindex(columns=list(headings.values()))
    shown = found.apply(lambda column: column.map(lambda value: write(column.name, value)))
    shown.columns = list(headings)
    return shown if settings is None else differing(settings).fillna(MISSING).join(shown)


def write(metric: str, value: float) -> str:
    """Write a metric with the digits that two machines agree on."""
    name = metric.rpartition(".")[2]
    if pd.isna(value):
        return MISSING
    if name == "gap_recovered":
        return f"{value:.1%}"
    if name.startswith("gain_over"):
        return f"{value:+.4f}"
    if name == MINUTES:
        return f"{value:.1f}"
    if name.endswith(("_nats", "_loss")):
        return f"{value:.4f}"
    return f"{value:.2f}" if name.endswith("_ppl") and value < 1000 else f"{value:,.0f}"


def write_interval(low: float, high: float) -> str:
    """Write the ends of an interval of gains."""
    return f"[{low:+.4f}, {high:+.4f}]"


def markdown(table: pd.DataFrame) -> str:
    """Write a table of text in Markdown: the index on the left, columns flush right."""
    sides = ["left", *["right"] * table.shape[1]]
    return table.reset_index().to_markdown(index=False, disable_numparse=True, colalign=sides)


def rows_as_markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write rows of text in Markdown, the first column flush left."""
    return markdown(pd.DataFrame(rows, columns=list(header)).set_index(header[0]))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m analysis table",
        description="Print finished experiments side by side, the best under `segment` first.",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="experiments; none: all recipes")
    about = (
        "what a memory wins back (default: summary), perplexities by protocol, gains, the "
        "parameters in which experiments differ, or what labels do"
    )
    parser.add_argument("--columns", choices=COLUMNS, default="summary", help=about)
    return parser.parse_intermixed_args(arguments)
