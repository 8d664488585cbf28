"""The pictures of the report, as SVG.

Each is narrow enough for a telephone. Knows which protocols tell something about which model;
analysis/report/long_texts.py draws what is asked of long texts.
"""

import io
import math
from collections.abc import Callable, Mapping, Sequence

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator, ScalarFormatter

from analysis.report.long_texts import draw_grid, draw_long_positions, draw_recall
from analysis.report.results import Results
from analysis.report.table import HAVE_MEMORY, MODELS
from analysis.report.verdict import gains

WIDTH_INCHES = 5.2
STYLE = {"font.size": 10, "svg.fonttype": "none", "svg.hashsalt": "report", "axes.axisbelow": True}
BLUE, SKY, ORANGE, GREEN, PINK = "#0072b2", "#56b4e9", "#d55e00", "#009e73", "#cc79a7"
# The marks of the protocols, in the order of the legend.
MARKS = {
    "segment": ("segments", "o", BLUE, 8),
    "segment_off": ("memory off", "x", ORANGE, 7),
    "segment_swapped": ("memory swapped", "v", PINK, 7),
    "segment_kv": ("equal bytes", "D", GREEN, 6),
    "full": ("full attention", "|", "black", 12),
    "sliding": ("sliding", "s", "0.6", 5),
}
NEED_MEMORY = ("segment_off", "segment_swapped")
CURVES = {"distilled": SKY, "finetuned": BLUE, "control": ORANGE, "base": "0.4"}
# The lines by position: model, protocol, words, colour.
LINES = (
    ("control", "segment", "control", ORANGE),
    ("base", "segment", "base", "0.4"),
    ("finetuned", "segment_off", "finetuned, memory off", PINK),
    ("finetuned", "segment", "finetuned", BLUE),
    ("control", "full", "control, full attention", "black"),
)
Draw = Callable[[Axes, Results], None]


def pictures(results: Results, seconds: Mapping[str, float]) -> dict[str, str]:
    """Return the SVG of every picture that the results allow, by its heading.

    `seconds` of a token in a long text stand beside the models that were timed.
    """
    drawn = {"What the memory gains over each rival": _svg(2.8, draw_gains, results)}
    drawn["Perplexity by protocol"] = _svg(3.2, draw_protocols, results)
    if not results.curves.empty:
        drawn["Training"] = _svg(3.6, draw_curves, results)
    if not results.positions.empty:
        drawn["Loss by position in the segment"] = _svg(3.6, draw_positions, results)
    if not results.grid.empty:
        drawn["A pass key in a long prompt"] = _figure(draw_grid, results.grid)
    if not results.recalled.empty:
        drawn["Recall by what was stored since"] = _figure(draw_recall, results.recalled)
    if not results.long_positions.empty:
        rows = results.long_positions
        drawn["Loss by position in the document"] = _figure(draw_long_positions, rows, seconds)
    return drawn


def draw_gains(axes: Axes, results: Results) -> None:
    """Draw each gain with its interval; right of zero the memory is better."""
    of_rivals = gains(results)
    if "base" in of_rivals:
        del of_rivals["off"]  # with its memory off the model is the base
    found = list(of_rivals.values())
    for line, gain in enumerate(found):
        colour = BLUE if gain.nats > 0 else ORANGE
        if gain.low is not None:
            axes.plot([gain.low, gain.high], [line, line], color=colour, linewidth=3, alpha=0.5)
        axes.plot(gain.nats, line, "o", color=colour)
    axes.axvline(0, color="0.3", linewidth=1)
    axes.set_xlabel("gain (nats a token; right of 0: better)")
    axes.xaxis.set_major_locator(MaxNLocator(5))  # or numbers of three decimals touch
    _name_lines(axes, [gain.rival for gain in found])


def draw_protocols(axes: Axes, results: Results) -> None:
    """Draw a line of marks for each model on a linear axis, but for the score `t2`."""
    models = [model for model in MODELS if model in results.scores]
    for protocol, (label, marker, colour, size) in MARKS.items():
        whose = HAVE_MEMORY if protocol in NEED_MEMORY else models
        if protocol in NEED_MEMORY and not results.has_memory:
            continue
        ppls = {model: results.ppl(protocol, model) for model in models if model in whose}
        shown = [(ppl, models.index(model)) for model, ppl in ppls.items() if ppl is not None]
        places, lines = zip(*shown, strict=True) if shown else ((), ())
        axes.plot(places, lines, marker, color=colour, markersize=size, label=label)
    axes.set_xlabel("test perplexity (lower is better)")
    axes.xaxis.set_major_locator(MaxNLocator(7))
    _name_lines(axes, models)
    _legend(axes, 3)


def draw_curves(axes: Axes, results: Results) -> None:
    """Draw validation perplexity by epoch of every training, and the base as a line."""
    rows = results.curves
    for model, colour in CURVES.items():
        curve = rows[rows.model == model]
        if not curve.empty:
            style, label = "--" if model == "base" else ".-", f"{model} ({curve.text.iloc[0]})"
            axes.plot(curve.epoch, curve.ppl, style, color=colour, label=label)
    axes.set_xlabel("epoch")
    axes.set_ylabel("validation perplexity")
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    if rows.ppl.max() > 3 * rows.ppl.min():
        axes.set_ylabel("validation perplexity (log)")
        axes.set_yscale("log")
        _plain_log_ticks(axes)
    axes.grid(color="0.92")
    _legend(axes)


def draw_positions(axes: Axes, results: Results) -> None:
    """Draw loss by position; each mark stands where its range of positions begins."""
    rows = results.positions
    for model, protocol, label, colour in LINES:
        if protocol in NEED_MEMORY and not results.has_memory:
            continue
        line = rows[(rows.model == model) & (rows.protocol == protocol)]
        places = [1 + math.log2(p) if p else 0 for p in line.position]
        if not line.empty:
            style = ".:" if model == "base" else ".-"
            axes.plot(places, line.nll, style, color=colour, label=label)
    positions = sorted(rows.position.unique())
    axes.set_xticks(range(len(positions)), [f"{p}" for p in positions])
    axes.set_xlabel("tokens of its segment before (each range from here on)")
    axes.set_ylabel("loss (nats a token, log)")
    axes.set_yscale("log")
    _plain_log_ticks(axes)
    axes.grid(color="0.92")
    _legend(axes)


def _svg(height: float, draw: Draw, results: Results) -> str:
    """Draw one pair of axes and return it as SVG."""

    def draw_axes(figure: Figure) -> None:
        figure.set_figheight(height)
        axes = figure.subplots()
        axes.spines[["top", "right"]].set_visible(False)
        draw(axes, results)

    return _figure(draw_axes)


def _figure(draw: Callable[..., None], *about: object) -> str:
    """Draw a figure, which sets its height, and return it as SVG, equal for equal results."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_INCHES, WIDTH_INCHES), layout="constrained")
        draw(figure, *about)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def _name_lines(axes: Axes, names: Sequence[str]) -> None:
    """Name the lines from the top."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(color="0.92")
    axes.tick_params(axis="y", length=0)


def _plain_log_ticks(axes: Axes) -> None:
    """Write plain numbers beside a logarithmic axis of less than a few decades."""
    low, high = axes.get_ylim()
    steps = [1, 1.5, 2, 3, 4, 5, 6, 8] if high / low < 10 else [1, 2, 5]
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    ticks = [step * 10.0**power for power in range(first, last + 1) for step in steps]
    axes.set_yticks([tick for tick in ticks if low <= tick <= high])
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(ScalarFormatter())


def _legend(axes: Axes, columns: int = 2) -> None:
    """Put the legend above the axes."""
    axes.figure.legend(
        *axes.get_legend_handles_labels(),
        loc="outside upper left",
        ncols=columns,
        fontsize=9,
        frameon=False,
        handletextpad=0.5,
        columnspacing=1.0,
    )
