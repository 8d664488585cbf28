"""A table in Markdown whose columns line up.

Knows nothing of what is in it.
"""

from collections.abc import Sequence


def render(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Align rows under the header: the first column to the left, the others to the right."""
    widths = [max(3, *map(len, column)) for column in zip(header, *rows, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join(_row(line, widths) for line in (header, rule, *rows))


def _row(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *rest = cells
    aligned = [first.ljust(widths[0]), *map(str.rjust, rest, widths[1:])]
    return f"| {' | '.join(aligned)} |"
