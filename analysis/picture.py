"""Finished experiments as a picture: each a line of marks on an axis of perplexity.

The base is a line across them. Marks far beyond it would squeeze all others: an arrow at the edge
and their numbers stand for them. Knows which metrics the stages write.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from analysis.comparing import describe_texts, split_comparable
from analysis.loading import find_experiments, load_metrics, load_scores
from analysis.table import BASE, CONTROL, SEGMENT, STATE_BYTES, ppl
from infini_retrofit.pipeline.files import whole_file

INCHES_PER_LINE, WIDTH_INCHES, DPI = 0.42, 8.5, 160
TITLE = "Test perplexity of each recipe, every layer confined to its segment: left is better"
BEYOND = 1.1  # times the base's perplexity: where the axis ends, if marks stand beyond


class Mark(NamedTuple):
    """One number of each experiment: the lowest of some metrics."""

    label: str
    metrics: tuple[str, ...]
    marker: str
    colour: str
    size: float  # points
    needs_memory: bool = True  # a model without a memory has no such mark


MARKS = (
    Mark("full attention", (ppl("full"),), "|", "black", 13, needs_memory=False),
    Mark("its control, without a memory", (CONTROL,), "o", "0.55", 7, needs_memory=False),
    Mark("memory off", (ppl("segment_off"),), "x", "0.45", 6),
    Mark("another document's memory", (ppl("segment_swapped"),), "v", "tab:orange", 7),
    Mark(
        "the same bytes of keys and values",
        (ppl("segment_kv"), ppl("segment_kv", "control")),
        "D",
        "tab:green",
        6,
    ),
    Mark("with its memory", (SEGMENT,), "o", "tab:blue", 9),
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw the named experiments; those that do not compare have an axis of their own."""
    about = "Draw finished experiments: each a line of marks on an axis of perplexity."
    parser = argparse.ArgumentParser("python -m analysis picture", description=about)
    parser.add_argument("path", type=Path, metavar="FILE", help="such as recipes.png or .svg")
    parser.add_argument("names", nargs="*", metavar="NAME", help="experiments; none: all recipes")
    options = parser.parse_args(arguments)
    experiments = find_experiments("picture", options.names)
    scores = load_scores(experiments)
    groups = split_comparable(scores, list(experiments))
    parts = [(describe_texts(scores, names[0]), names) for names in groups]
    save(draw(load_metrics(experiments), parts), options.path)
    print(options.path)


def draw(metrics: pd.DataFrame, parts: Sequence[tuple[str, Sequence[str]]]) -> Figure:
    """Draw a line for each experiment, in that order from the top.

    Args:
        metrics: as `load_metrics` returns them; a missing number has no mark.
        parts: what experiments scored, and their names; each part has its own axis.
    """
    heights = [len(names) for _, names in parts]
    inches = 0.8 + 0.8 * len(parts) + INCHES_PER_LINE * sum(heights)
    figure = Figure(figsize=(WIDTH_INCHES, inches), layout="constrained")
    grid = figure.subplots(len(parts), squeeze=False, gridspec_kw={"height_ratios": heights})
    for axes, (what, names) in zip(grid[:, 0], parts, strict=True):
        lines = metrics.loc[list(names)]
        base = lines.reindex(columns=[BASE])[BASE].iloc[0]
        _label(axes, names)
        _mark(axes, lines, base * BEYOND)
        axes.axvline(base, color="tab:red", linestyle="--", label="the base as it was")
        if len(parts) > 1:
            axes.set_title(what, loc="left", fontsize="small")
    axes.set_xlabel("perplexity (full attention: of the same model, not confined)")
    figure.legend(
        *axes.get_legend_handles_labels(),
        title=TITLE,
        title_fontproperties={"weight": "bold"},
        loc="outside upper center",
        ncols=3,
        frameon=False,
    )
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write the whole picture or nothing, in the format that the path's suffix names.

    Raises:
        ValueError: if there is no such format.
    """
    formats = sorted(figure.canvas.get_supported_filetypes())
    if (suffix := path.suffix.removeprefix(".")) not in formats:
        raise ValueError(f"FILE must end in one of {', '.join(formats)}, got {path}")
    with whole_file(path) as partial:
        figure.savefig(partial, dpi=DPI, format=suffix)


def _mark(axes: Axes, metrics: pd.DataFrame, end: float) -> None:
    """Draw the numbers of each experiment on its line, and write those beyond the axis's end."""
    lines = pd.Series(range(len(metrics)), index=metrics.index)
    has_memory = metrics.get(STATE_BYTES, lines * 0).fillna(0) > 0
    beyond: dict[int, list[float]] = {}
    for mark in MARKS:
        lowest = metrics.reindex(columns=list(mark.metrics)).min(axis=1)
        shown = lowest[has_memory | (not mark.needs_memory)].dropna()
        is_beyond = shown > end
        for name, value in shown[is_beyond].items():
            beyond.setdefault(lines[name], []).append(value)
        shown = shown[~is_beyond]
        axes.plot(
            shown,
            lines[shown.index],
            mark.marker,
            color=mark.colour,
            markersize=mark.size,
            label=mark.label,
            zorder=3 - mark.size / 100,  # where marks coincide, the smaller ones stay visible
        )
    for line, values in beyond.items():
        axes.text(
            1,
            line,
            f"{len(values)} marks: {min(values):.1f} to {max(values):.1f} \N{RIGHTWARDS ARROW}",
            transform=axes.get_yaxis_transform(),
            ha="right",
            va="center",
            fontsize="small",
            backgroundcolor="white",
        )


def _label(axes: Axes, names: Sequence[str]) -> None:
    """Name the lines from the top, and the values along the axis."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(axis="both", color="0.9", linewidth=0.7)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(8))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())
