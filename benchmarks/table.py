"""The benchmark's result as a Markdown table."""

from benchmarks.measuring import Measured

HEADER = ["measured", "tokens", "seconds", "share of product rate", "time", "peak GiB"]


def rows_of(group: list[Measured]) -> list[list[str]]:
    """Describe a group, each case's time as a multiple of the first one's."""
    first = group[0]
    return [
        [
            case.name,
            f"{case.num_tokens:,}",
            f"{min(case.seconds):.2f}",
            f"{case.share:.0%}",
            "1" if case is first else f"{case.times(first):.2f} x {first.name}",
            f"{case.peak_bytes / 2**30:.1f}",
        ]
        for case in group
    ]


def render(rows: list[list[str]], header: list[str] = HEADER) -> str:
    """Align rows under the header; numbers to the right."""
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = [header, rule, *rows]
    return "\n".join(
        "| "
        + " | ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        + " |"
        for line in lines
    )
