"""Everything kept in results/ as one page: `python -m analysis leaderboard`.

The page is one file that opens without internet: sortable tables, and perplexity against bytes.
Knows which metrics the stages write.
"""

import argparse
from collections.abc import Sequence
from html import escape
from io import StringIO
from pathlib import Path
from string import Template

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.comparing import describe_texts, split_comparable
from analysis.loading import (
    MINUTES,
    TOKENS_SEEN,
    load_metrics,
    load_results,
    load_scores,
    load_settings,
)
from analysis.picture import BEYOND
from analysis.report.verdict import gains
from analysis.table import BASE, PARAMETERS, SEGMENT, STATE_BYTES, gain, ppl, write, write_interval
from infini_retrofit.pipeline.files import whole_file
from recipes.experiments import check_finished
from recipes.kept import kept_experiments

PAGE = Path("build/leaderboard/index.html")
TEMPLATE = Path(__file__).with_suffix(".html")
SEEDS, KV = "seeds", gain("kv")
COLUMNS = {
    "memory, bytes": STATE_BYTES,
    "trained parameters": PARAMETERS,
    "trained on tokens": TOKENS_SEEN,
    "segment PPL": SEGMENT,
    "lead over its control": gain("control"),
    "lead over equal bytes": KV,
    "seeds": SEEDS,
    "minutes": MINUTES,
}
SECTIONS = ("model", "corpus", "longdocs", "infini", "distill", "finetune", "eval")
EQUAL_BYTES = ppl("equal_bytes")


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the page and print where it stands."""
    about = "Write everything kept in results/ as one page."
    parser = argparse.ArgumentParser("python -m analysis leaderboard", description=about)
    parser.parse_args(arguments)
    experiments = kept_experiments()
    check_finished("leaderboard", list(experiments), experiments)
    metrics, scores = load_metrics(experiments), load_scores(experiments)
    metrics[SEEDS] = count_seeds(load_settings(experiments))
    for name, experiment in experiments.items():
        rival = gains(load_results(experiment)).get("kv")
        if rival:  # the report's: it is not the control's where nothing but the memory was trained
            found = [rival.ppl, rival.nats, rival.low, rival.high]
            metrics.loc[name, [EQUAL_BYTES, KV, f"{KV}_low", f"{KV}_high"]] = found
    best_first = metrics[SEGMENT].sort_values(kind="stable").index
    groups = sorted(split_comparable(scores, best_first), key=len, reverse=True)
    parts = [(describe_texts(scores, names[0]), metrics.loc[names]) for names in groups]
    with whole_file(PAGE) as unfinished:
        unfinished.write_text(write_page(parts), encoding="utf-8")
    print(PAGE)


def count_seeds(settings: pd.DataFrame) -> pd.Series:
    """Return how many experiments, itself included, differ from each in random seeds alone."""
    kept = [
        key for key in settings if key.split(".")[0] in SECTIONS and not key.endswith(".seed")
    ]
    return settings.groupby(kept, dropna=False)[kept[0]].transform("size")


def write_page(parts: Sequence[tuple[str, pd.DataFrame]]) -> str:
    """Write the page.

    Args:
        parts: what experiments scored, and their metrics with the column `SEEDS`; each part is a
            table of its own. The first has a picture.
    """
    tables = "\n".join(
        f"<h2>{escape(what)}</h2>\n{_write_table(metrics)}" for what, metrics in parts
    )
    picture = StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "leaderboard"}):
        draw(parts[0][1]).savefig(picture, format="svg", metadata={"Date": None})
    svg = picture.getvalue()
    page = Template(TEMPLATE.read_text(encoding="utf-8"))
    return page.substitute(picture=svg[svg.index("<svg") :], tables=tables)


def draw(metrics: pd.DataFrame) -> Figure:
    """Draw perplexity against the bytes that cross a border, and the best for their bytes.

    Experiments far beyond the base's perplexity are left out, and named below the axis.
    """
    figure = Figure(figsize=(10, 6.4), layout="constrained")
    axes = figure.subplots()
    base = metrics[BASE].iloc[0]
    points = metrics[[STATE_BYTES, SEGMENT]].set_axis(["bytes", "ppl"], axis=1).dropna()
    out = points.ppl > base * BEYOND
    rivals = metrics[EQUAL_BYTES][points.index]
    axes.plot(points.bytes[~out], rivals[~out], "D", color="tab:green", markersize=5)
    axes.plot(points.bytes[~out], points.ppl[~out], "o", color="tab:blue", markersize=7)
    best = points[~out].sort_values(["bytes", "ppl"])
    best = best[best.ppl < best.ppl.shift(fill_value=float("inf")).cummin()]
    axes.step(best.bytes, best.ppl, where="post", color="tab:blue", linewidth=1, alpha=0.6)
    axes.axhline(base, color="tab:red", linestyle="--", linewidth=1.2)
    axes.set_xscale("symlog", linthresh=30_000, linscale=0.4)
    axes.set_xlim(left=-5_000)
    axes.set_ylabel("test perplexity, every layer confined to its segment")
    left_out = ", ".join(f"{name} ({value:.1f})" for name, value in points.ppl[out].items())
    note = f"; not shown: {left_out}" if left_out else ""
    axes.set_xlabel(f"bytes that cross a segment border{note}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(
        [
            "its rival of equal bytes of keys and values",
            "a run",
            "the best run of at most so many bytes",
            "the base as it was",
        ],
        loc="lower left",
        frameon=False,
    )
    _name(axes, points[~out])
    return figure


def _name(axes: Axes, points: pd.DataFrame) -> None:
    """Write the names of points beside the axes, one below another, a line from each point."""
    ordered = points.sort_values("ppl", ascending=False)
    for number, (name, (size, value)) in enumerate(ordered.iterrows()):
        height = 1 - (number + 0.5) / len(ordered)
        axes.annotate(
            name,
            (size, value),
            (1.04, height),
            textcoords=axes.transAxes,
            va="center",
            fontsize="small",
            arrowprops={"arrowstyle": "-", "relpos": (0, 0.5), "color": "0.75", "linewidth": 0.6},
        )


def _write_table(metrics: pd.DataFrame) -> str:
    """Write experiments as a table whose cells hold the numbers to sort by."""
    head = "".join(f"<th><button>{escape(text)}</button></th>" for text in ("run", *COLUMNS))
    rows = []
    for name, found in metrics.iterrows():
        cells = [f"<td>{escape(str(name))}</td>"]
        for metric in COLUMNS.values():
            value = found[metric]
            key = "" if pd.isna(value) else f' data-value="{value:g}"'
            cells.append(f"<td{key}>{_cell(found, metric)}</td>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    body = "\n".join(rows)
    return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>"


def _cell(found: pd.Series, metric: str) -> str:
    """Write a metric, and its interval if it has one."""
    low, high = (found.get(f"{metric}_{end}", float("nan")) for end in ("low", "high"))
    interval = "" if pd.isna(low) else f" <small>{write_interval(low, high)}</small>"
    return write(metric, found[metric]) + interval
