"""Rows of the plots that the report adds to those of the stages.

A template of DVC draws text only from rows: those of the summary are its sentences and cells.
"""

import textwrap
from typing import Any

from analysis.report.figures import base_ppl
from analysis.report.results import Results
from analysis.report.table import summary_table
from analysis.report.verdict import verdict

Row = dict[str, Any]
_LINE = 110  # characters of a line of the verdict
_NAMES = {"distill": "distilled", "finetune": "finetuned", "finetune_control": "control"}


def summary_rows(results: Results) -> list[Row]:
    """Return the verdict line by line, then the table cell by cell: line, column, text."""
    lines = [*textwrap.wrap(verdict(results), _LINE), ""]
    rows: list[Row] = [{"line": i, "column": "verdict", "text": t} for i, t in enumerate(lines)]
    header, table = summary_table(results)
    for number, cells in enumerate([header, *table], len(lines)):
        for column, text in zip(header, cells, strict=True):
            rows.append({"line": number, "column": column, "text": text})
    return rows


def training_rows(results: Results) -> list[Row]:
    """Return validation perplexity by epoch: model, text, epoch, ppl; the base is a level line."""
    rows: list[Row] = []
    for stage, curve in results.curves.items():
        val = curve[(curve.split == "val") & curve.ppl.notna()]
        text = "samples" if stage == "distill" else "documents"
        rows += [
            {"model": _NAMES[stage], "text": text, "epoch": int(epoch), "ppl": float(ppl)}
            for epoch, ppl in zip(val.epoch, val.ppl, strict=True)
        ]
    base = base_ppl(results.curves.get("finetune_control"))
    if base is not None:
        ends = (0, max(row["epoch"] for row in rows))
        rows += [{"model": "base", "text": "documents", "epoch": e, "ppl": base} for e in ends]
    return rows
