"""The benchmark's result as rows of a table."""

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
