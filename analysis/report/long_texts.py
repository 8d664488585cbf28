"""The report's pictures of long texts: pass keys, recall, loss by position.

A model has the same colour in each.
"""

import math
from collections.abc import Mapping
from itertools import product
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

PANELS = {
    "capacity": "numbers stored",
    "needles": "numbers in a haystack",
    "compressions": "segments since the pass key",
    "distance": "segments, equal distance",
}
NUM_CANDIDATES = 10  # of forced choice
HAVE_STORED = ("capacity", "needles")  # whose wrong answers are stored numbers, if there are 9
COLOURS = {"control": "#d55e00", "finetuned": "#0072b2", "base": "black"}
OF_BASELINES = ("#009e73", "#cc79a7", "#e69f00", "#56b4e9", "0.6", "#b8a000", "#7f3c8d")
MOST_BESIDE = 3  # lengths in a map that has another at its side
_SHADES = LinearSegmentedColormap.from_list("shares", ["#ffffff", "#0072b2"])
_DARK = 0.55  # shares on which letters are white


def draw_grid(figure: Figure, rows: pd.DataFrame) -> None:
    """Draw a map for each model and haystack: depth downwards, length to the right."""
    models, haystacks = rows.model.unique(), rows.haystack.unique()
    lengths, depths = sorted(rows.tokens.unique()), sorted(rows.depth.unique())
    num_columns = len(haystacks) if len(lengths) <= MOST_BESIDE else 1
    num_lines = len(models) * len(haystacks) // num_columns
    figure.set_figheight(0.7 + num_lines * (0.4 + 0.24 * len(depths)))
    figure.get_layout_engine().set(h_pad=0.07)
    axes = figure.subplots(num_lines, num_columns, squeeze=False, sharex=True, sharey=True)
    for (model, haystack), panel in zip(product(models, haystacks), axes.flat, strict=True):
        found = rows[(rows.model == model) & (rows.haystack == haystack)]
        shares = found.pivot(index="depth", columns="tokens", values="accuracy")
        shares = shares.reindex(index=depths, columns=lengths)
        panel.imshow(shares, _SHADES, vmin=0, vmax=1, aspect="auto")
        words = {(row.depth, row.tokens): _counts(row) for row in found.itertuples()}
        for (y, depth), (x, length) in product(enumerate(depths), enumerate(lengths)):
            colour = "white" if shares.loc[depth, length] > _DARK else "black"
            shown = words.get((depth, length), "not asked")  # the base, beyond its trained length
            panel.text(x, y, shown, ha="center", va="center", color=colour, fontsize=8)
        panel.set_title(f"{model}, {haystack}", fontsize=9, loc="left", pad=3)
        panel.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
        panel.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths], fontsize=8)
        panel.tick_params(length=0)
    figure.supxlabel("tokens of the prompt", fontsize=10)
    figure.supylabel("depth of the pass key", fontsize=10)


def _counts(row: Any) -> str:
    """Return how many answers are right, and greedily: shares would hide how few were asked."""
    right, greedy = (round(share * row.num_asked) for share in (row.accuracy, row.greedy))
    return f"{right} of {row.num_asked} ({greedy})"


def draw_recall(figure: Figure, rows: pd.DataFrame) -> None:
    """Draw a panel for each task, a line for each model; dotted: greedily."""
    colours = colours_of(rows.model.unique())
    tasks = [task for task in PANELS if task in set(rows.task)]
    figure.set_figheight(0.6 + 2.1 * math.ceil(len(tasks) / 2))
    axes = figure.subplots(math.ceil(len(tasks) / 2), 2, squeeze=False, sharey=True).flat
    for task, panel in zip(tasks, axes, strict=False):
        own = rows[rows.task == task]
        for model, line in own.groupby("model", sort=False):
            places = line.number.map(math.log2)
            panel.plot(places, line.accuracy, "o-", color=colours[model], markersize=4)
            panel.plot(places, line.greedy, ".:", color=colours[model], markersize=4)
        numbers = sorted(own.number.unique())
        panel.set_xticks([math.log2(n) for n in numbers], [f"{n:,}" for n in numbers])
        panel.plot([math.log2(n) for n in numbers], [chance(task, n) for n in numbers], color="0.6")
        panel.set_xlabel(PANELS[task])
        panel.set_ylim(-0.04, 1.04)
        panel.yaxis.set_major_formatter(PercentFormatter(1))
        _clear(panel)
    for panel in axes:  # what the tasks left
        panel.remove()
    _legend(figure, {model: model for model in colours}, colours)


def chance(task: str, number: int) -> float:
    """Return the share of right answers of who knows which numbers were stored, and no more."""
    return 1 / min(number, NUM_CANDIDATES) if task in HAVE_STORED else 1 / NUM_CANDIDATES


def draw_long_positions(figure: Figure, rows: pd.DataFrame, seconds: Mapping[str, float]) -> None:
    """Draw loss by position in a document; `seconds` of a token stand beside the bytes."""
    figure.set_figheight(4)
    axes, colours, labels = figure.subplots(), colours_of(rows.model.unique()), {}
    positions = sorted(rows.position.unique())
    for model, line in rows.groupby("model", sort=False):
        style = ".--" if model == "base" else ".-"
        axes.plot(line.position.map(positions.index), line.nll, style, color=colours[model])
        labels[model] = f"{model}: {line.num_bytes.iloc[0] / 1e6:.1f} MB"
        if model in seconds:
            labels[model] += f", {1000 * seconds[model]:.1f} ms"
    axes.set_xticks(range(len(positions)), [f"{position:,}" for position in positions])
    axes.set_xlabel("position (each range from here on)")
    axes.set_ylabel("loss (nats a token)")
    _clear(axes)
    _legend(figure, labels, colours)


def colours_of(models: list[str]) -> dict[str, str]:
    """Give each model its colour; the baselines take theirs in order."""
    free = iter(OF_BASELINES)
    return {model: COLOURS.get(model) or next(free) for model in models}


def _clear(axes: Axes) -> None:
    axes.grid(color="0.92")
    axes.spines[["top", "right"]].set_visible(False)


def _legend(figure: Figure, labels: Mapping[str, str], colours: Mapping[str, str]) -> None:
    """Put a line for each model above the axes."""
    lines = [figure.axes[0].plot([], [], color=colours[model])[0] for model in labels]
    figure.legend(
        lines,
        labels.values(),
        loc="outside upper left",
        ncols=2,
        fontsize=9,
        frameon=False,
        handletextpad=0.5,
        columnspacing=1.0,
    )
