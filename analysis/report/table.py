"""The table of the report, at most 6 rows of 6 columns, as Markdown that aligns in a terminal."""

from collections.abc import Sequence

from analysis.report.results import Results
from analysis.report.verdict import Gain, gains, number

MODELS = ("base", "control", "distilled", "finetuned")
COLUMNS = {
    "sliding": "sliding",
    "segment": "segment",
    "memory off": "segment_off",
    "equal bytes": "segment_kv",
    "full": "full",
}
HAVE_MEMORY = ("distilled", "finetuned")
# The rival whose column shows what `finetuned` under `segment` gains over it.
RIVALS = {"segment": "control", "memory off": "off", "equal bytes": "kv", "full": "full"}
MISSING = "-"
Table = tuple[list[str], list[list[str]]]


def summary_table(results: Results) -> Table:
    """Return the header and rows: perplexities of each model, then gains and their intervals.

    Of the base and the control there is no score with the memory off.
    """
    rows = [
        [model, *(_ppl(results, model, protocol) for protocol in COLUMNS.values())]
        for model in MODELS
        if model in results.scores
    ]
    found = gains(results)
    rivals = [found.get(RIVALS.get(column, "")) for column in COLUMNS]
    rows.append(["gain (nats)", *(f"{g.nats:+z.3f}" if g else MISSING for g in rivals)])
    if any(gain and gain.low is not None for gain in rivals):
        rows.append(["95% interval", *map(_interval, rivals)])
    return ["perplexity", *COLUMNS], rows


def explain(results: Results) -> str:
    """Return what the gains of the table are."""
    alone = results.has_memory and results.trained_memory_alone
    return (
        "Perplexity, lower is better. Gain: nats a token by which finetuned under `segment` is "
        "better. It is compared with the control there, itself with the memory off, the best "
        f"equal bytes of keys and values, and the {'base' if alone else 'control'} under full "
        "attention. `sliding` scores another text."
    )


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a table in Markdown with columns of equal width, the first flush left."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    first, *others = widths
    rule = ["-" * first, *(f"{'-' * (width - 1)}:" for width in others)]
    lines = [
        " | ".join([row[0].ljust(first), *map(str.rjust, row[1:], others)])
        for row in (header, rule, *rows)
    ]
    return "\n".join(f"| {line} |" for line in lines)


def _ppl(results: Results, model: str, protocol: str) -> str:
    if protocol == "segment_off" and not (model in HAVE_MEMORY and results.has_memory):
        return MISSING
    return number(results.ppl(protocol, model))


def _interval(gain: Gain | None) -> str:
    if gain is None or gain.low is None:
        return MISSING
    return f"{gain.low:+z.3f} to {gain.high:+z.3f}"
