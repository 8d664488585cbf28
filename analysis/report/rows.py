"""The answer as rows of a plot: a template of DVC draws text from rows alone."""

import textwrap
from typing import Any

from analysis.report.results import Results
from analysis.report.table import summary_table
from analysis.report.verdict import verdict

Row = dict[str, Any]
_LINE = 110  # characters of a line of the verdict


def summary_rows(results: Results) -> list[Row]:
    """Return the verdict line by line, then the table cell by cell: line, column, text."""
    lines = [*textwrap.wrap(verdict(results), _LINE), ""]
    rows: list[Row] = [{"line": i, "column": "verdict", "text": t} for i, t in enumerate(lines)]
    header, table = summary_table(results)
    for number, cells in enumerate([header, *table], len(lines)):
        for column, text in zip(header, cells, strict=True):
            rows.append({"line": number, "column": column, "text": text})
    return rows
