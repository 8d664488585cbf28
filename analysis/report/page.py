"""The report as one HTML page that opens without internet, and as Markdown.

Knows no file.
"""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

from analysis.report.figures import pictures
from analysis.report.results import Results
from analysis.report.table import explain, markdown, summary_table
from analysis.report.verdict import number, verdict

Rows = Sequence[Sequence[str]]
NOTES = {
    "Perplexity by protocol": (
        "In segments attention sees its own segment and the carried tokens; the memory holds older "
        "ones."
    ),
    "Training": (
        "Documents are scored in segments, samples are not: compare only curves of one kind."
    ),
    "Loss by position in the segment": (
        "At 0 a token is predicted without any other token of its segment."
    ),
    "A pass key in a long prompt": "Right by forced choice (greedily); chance is 1 of 10.",
    "Recall by what was stored since": (
        "Right by forced choice (solid) and greedily (dotted). Grey: by knowing only which "
        "numbers were stored."
    ),
    "Loss by position in the document": (
        "Megabytes kept at the end; milliseconds a token, of the last run here."
    ),
}
_TEXTS = ("Continuations", "Where it ran")  # tables of words: their cells stand flush left
# The columns of recall, with their metrics.
_RECALL = {
    "pass key": "passkey_accuracy",
    "worst cell": "passkey_worst_cell",
    "stored numbers": "capacity_accuracy",
    "in a haystack": "needles_accuracy",
    "asked": "num_asked",
    "first tokens, nats": "first_range_nll",
    "last tokens, nats": "last_range_nll",
    "bytes kept": "state_bytes",
}
_ABOUT_RECALL = (
    "Right answers, likelier than 9 others (chance: 10%); mean loss of the first and the last "
    "tokens of a long article (docs/long-context.md). The default asks few questions."
)
_TRAINED = ("stage", "epochs", "best", "parameters", "tokens")
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #222; margin: 0 auto; max-width: 1160px;
  padding: 1em 1.2em 3em; }}
h1 {{ font-size: 1.5em; margin: 0.4em 0; }}
h2 {{ font-size: 1.15em; margin: 2em 0 0.5em; }}
.verdict {{ font-size: 1.2em; border-left: 5px solid #0072b2; padding: 0.1em 0 0.1em 0.8em; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: 0.25em 0.9em 0.25em 0; text-align: right; vertical-align: top;
  border-bottom: 1px solid #ddd; }}
th {{ font-weight: 600; white-space: nowrap; }}
td:first-child, th:first-child, .words td, .words th {{ text-align: left; }}
.words td:first-child {{ white-space: nowrap; font-weight: 600; }}
.pictures {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr));
  gap: 0 2.5em; }}
img {{ width: 100%; max-width: 560px; }}
.note {{ color: #555; font-size: 0.9em; }}
@media (max-width: 600px) {{ body {{ font-size: 15px; padding: 0.6em; }}
  th, td {{ padding-right: 0.5em; font-size: 0.8em; }} th {{ white-space: normal; }} }}
</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""


@dataclass(frozen=True)
class Report:
    """What the page shows.

    Attributes:
        title: heading of the page.
        results: metrics and rows of plots.
        prefix: the end of the text that was continued; nothing: no model was asked.
        continuations: who continued it, and how.
        changed: parameters that differ from the default: name, default, value.
        setting: machine, number type, commit and the like: name, value.
        seconds: each stage and its seconds, "-" where it did not run here.
        token_seconds: of each model that scored a long document here.
    """

    title: str
    results: Results
    prefix: str = ""
    continuations: Rows = ()
    changed: Rows = ()
    setting: Rows = ()
    seconds: Rows = ()
    token_seconds: Mapping[str, float] = field(default_factory=dict)


def as_markdown(report: Report) -> str:
    """Return the report without pictures; what stands above the first `##` is the result."""
    results = report.results
    parts = [f"# {report.title}", verdict(results), markdown(*summary_table(results))]
    parts += [explain(results), *filter(None, [about_t2(results)])]
    for heading, note, header, rows in _tables(report):
        is_table = heading not in _TEXTS
        shown = markdown(header, rows) if is_table else "\n".join(_item(*row) for row in rows)
        parts += [f"## {heading}", *filter(None, [note]), shown]
    return "\n\n".join(parts) + "\n"


def as_html(report: Report) -> str:
    """Return the report as one page; pictures and style are inside."""
    results = report.results
    body = [
        f'<p class="verdict">{escape(verdict(results))}</p>',
        _table(*summary_table(results)),
        _note(explain(results)),
        f'<div class="pictures">{_figures(pictures(results, report.token_seconds))}</div>',
        _note(about_t2(results)),
    ]
    for heading, note, header, rows in _tables(report):
        body += [f"<h2>{heading}</h2>", _note(note), _table(header, rows, heading in _TEXTS)]
    return _PAGE.format(title=escape(report.title), body="\n".join(filter(None, body)))


def about_t2(results: Results) -> str:
    """Return a sentence on the doubly shifted score, if the models have one."""
    base, own = (results.ppl("t2", model) for model in ("base", "finetuned"))
    if base is None or own is None:
        return ""
    return (
        "The first experiments scored the token after the next (`t2`, docs/seeds.md): base "
        f"{number(base)}, finetuned {number(own)}."
    )


def _tables(report: Report) -> list[tuple[str, str, Sequence[str], Rows]]:
    """Return what stands below the pictures: heading, note, header and rows."""
    note = f"The likeliest token each time, after: ... {report.prefix}"
    ran_here = "Of its last run here, cached results apart; -: it never ran here."
    tables = [
        ("Continuations", note, ["model", "text"], report.continuations),
        ("Recall in long texts", _ABOUT_RECALL, ["model", *_RECALL], _recall(report.results)),
        ("What was trained", "", _TRAINED, _trained(report.results)),
        (
            "Parameters that differ from the default",
            "",
            ["parameter", "default", "here"],
            report.changed,
        ),
        ("Where it ran", "", ["what", "here"], report.setting),
        ("Seconds of each stage", ran_here, ["stage", "seconds"], report.seconds),
    ]
    return [table for table in tables if table[3]]


def _trained(results: Results) -> list[list[str]]:
    """Return what each training took: stage, epochs, the best one, parameters, tokens."""
    keys = ("epochs_run", "best_epoch", "num_trainable_parameters", "num_trained_tokens")
    return [
        [stage, *(f"{metrics[key]:,}" if key in metrics else "-" for key in keys)]
        for stage, metrics in results.training.items()
    ]


def _recall(results: Results) -> list[list[str]]:
    """Return a row for each model: shares, nats and bytes; "-" where it was not asked."""

    def shown(key: str, value: float | None) -> str:
        if value is None:
            return "-"
        if key.endswith("_nll"):
            return f"{value:.3f}"
        return f"{value:,}" if key in ("num_asked", "state_bytes") else f"{value:.0%}"

    return [
        [model, *(shown(key, metrics.get(key)) for key in _RECALL.values())]
        for model, metrics in results.recall.items()
    ]


def _item(name: str, text: str) -> str:
    return f"- **{name}**: {text}"


def _figures(drawn: Mapping[str, str]) -> str:
    """Return the pictures under their headings, each as an image inside the page."""
    return "\n".join(
        f'<div><h2>{heading}</h2><img alt="{heading}" src="data:image/svg+xml;base64,'
        f'{base64.b64encode(svg.encode()).decode()}">{_note(NOTES.get(heading, ""))}</div>'
        for heading, svg in drawn.items()
    )


def _table(header: Sequence[str], rows: Rows, is_words: bool = False) -> str:
    """Return a table; a narrow screen scrolls it."""
    head = "".join(f"<th>{escape(str(cell))}</th>" for cell in header)
    lines = ("".join(f"<td>{escape(str(cell))}</td>" for cell in row) for row in rows)
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    kind = ' class="words"' if is_words else ""
    return f'<div class="scroll"><table{kind}>\n<tr>{head}</tr>\n{body}\n</table></div>'


def _note(text: str) -> str:
    """Return a small paragraph; `code` keeps its marks off."""
    return f'<p class="note">{escape(text).replace("`", "")}</p>' if text else ""
