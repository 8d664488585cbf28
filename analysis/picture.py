"""Finished experiments as a picture: each a line of marks on an axis of perplexity.

Knows which metrics the stages write; not how experiments are run or found.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from analysis.table import find
from recipes.finished import Finished

INCHES_A_LINE, WIDTH_INCHES, DPI = 0.42, 8.5, 160
_STATE_BYTES = ("eval_sliding", "finetuned", "state_bytes")


class Mark(NamedTuple):
    """One number of each experiment: the least of its metrics that are there."""

    label: str
    metrics: tuple[tuple[str, str], ...]  # model and protocol
    marker: str
    colour: str
    size: float  # points
    is_of_memory: bool = True  # no mark of a model that has none


MARKS = (
    Mark("full attention", (("finetuned", "full"),), "|", "black", 13, False),
    Mark("its control, without a memory", (("control", "segment"),), "o", "0.55", 7, False),
    Mark("memory off", (("finetuned", "segment_off"),), "x", "0.45", 6),
    Mark("another document's memory", (("finetuned", "segment_swapped"),), "v", "tab:orange", 7),
    Mark(
        "the same bytes of keys and values",
        (("finetuned", "segment_kv"), ("control", "segment_kv")),
        "D",
        "tab:green",
        6,
    ),
    Mark("with its memory", (("finetuned", "segment"),), "o", "tab:blue", 9),
)


def draw(experiments: Mapping[str, Finished], parts: Sequence[tuple[str, Sequence[str]]]) -> Figure:
    """Draw a line for each name, in that order from the top; what is not there has no mark.

    Args:
        experiments: by name.
        parts: what was scored, in words, and the names of those that scored it, which have an
            axis of their own.
    """
    heights = [len(names) for _, names in parts]
    inches = 0.8 + 0.8 * len(parts) + INCHES_A_LINE * sum(heights)
    figure = Figure(figsize=(WIDTH_INCHES, inches), layout="constrained")
    grid = figure.subplots(len(parts), squeeze=False, gridspec_kw={"height_ratios": heights})
    for axes, (what, names) in zip(grid[:, 0], parts, strict=True):
        _mark(axes, experiments, names)
        _label(axes, names)
        if len(parts) > 1:
            axes.set_title(what, loc="left", fontsize="small")
    axes.set_xlabel("test perplexity, every layer confined to its segment (full attention apart)")
    figure.legend(
        *axes.get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False
    )
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write the picture, in the format that the file's ending names, all of it or nothing.

    Raises:
        ValueError: if there is no such format.
    """
    formats = sorted(figure.canvas.get_supported_filetypes())
    if (ending := path.suffix.removeprefix(".")) not in formats:
        raise ValueError(f"--picture must end in one of {', '.join(formats)}, got {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    figure.savefig(partial, dpi=DPI, format=ending)
    partial.replace(path)


def _least(experiment: Finished, mark: Mark) -> float | None:
    if mark.is_of_memory and not find(experiment.metrics, *_STATE_BYTES):
        return None
    found = (
        find(experiment.metrics, "eval_sliding", model, f"{protocol}_test_ppl")
        for model, protocol in mark.metrics
    )
    return min((value for value in found if value is not None), default=None)


def _mark(axes: Axes, experiments: Mapping[str, Finished], names: Sequence[str]) -> None:
    """Put the numbers of each experiment on its line."""
    for mark in MARKS:
        points = [
            (value, line)
            for line, name in enumerate(names)
            if name in experiments and (value := _least(experiments[name], mark)) is not None
        ]
        axes.plot(
            [value for value, _ in points],
            [line for _, line in points],
            mark.marker,
            color=mark.colour,
            markersize=mark.size,
            label=mark.label,
            zorder=3 - mark.size / 100,  # where marks fall together the smaller ones stay visible
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
