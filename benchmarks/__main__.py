"""Measure speed and memory and print one table; writes nothing else.

Reads: models/base
"""

import argparse
import statistics
import sys
from pathlib import Path

import pandas as pd

from benchmarks.cases import GROUPS, Sizes
from benchmarks.measuring import Measured, ProductRate, measure_group
from infini_retrofit.pipeline.device import start_run
from infini_retrofit.pipeline.files import verify_manifest
from infini_retrofit.pipeline.guard import run_stage

BASE = Path("models/base")
ROUNDS = 3
QUICK = Sizes(document=1024, stream=1280)
# Between two scores, as a share of one: bfloat16 rounds each order of summation differently.
LARGEST_DIFFERENCE = 1e-3


def main() -> None:
    """Measure the chosen groups."""
    options = _options()
    verify_manifest(BASE, made_by="dvc repro prepare_base")
    rate = ProductRate(*start_run())
    sizes = QUICK if options.quick else Sizes()
    rounds = 1 if options.quick else ROUNDS
    groups = {}
    for name in options.groups:
        print(f"measuring: {', '.join(GROUPS[name])}", file=sys.stderr)
        groups[name] = measure_group(name, BASE, sizes, rounds, rate)
        print(table(groups[name]), file=sys.stderr)
    rates = [operations / 1e9 for operations in rate.measured]
    print(f"Matrix products of 4096^3: {statistics.median(rates):.0f} GFLOP/s, ", end="")
    print(f"{min(rates):.0f} to {max(rates):.0f} in this run.\n")
    print("\n\n".join(map(table, groups.values())))
    if "sliding" in groups:
        _compare_scores(*groups["sliding"])


def table(group: list[Measured]) -> str:
    """Return a group as Markdown, each time as a multiple of the first case's."""
    rows = {
        case.name: {
            "tokens": case.num_tokens,
            "seconds": min(case.seconds),
            "share of product rate": case.share,
            "times the first": case.times(group[0]),
            "peak GiB": case.peak_bytes / 2**30,
        }
        for case in group
    }
    formats = ("", ",.0f", ".2f", ".0%", ".2f", ".1f")
    return pd.DataFrame(rows).T.to_markdown(floatfmt=formats)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("groups", nargs="*", help=f"names among {', '.join(GROUPS)}; none: all")
    parser.add_argument("--quick", action="store_true", help="a quarter of the text, once")
    options = parser.parse_args()
    if unknown := sorted(set(options.groups) - set(GROUPS)):
        parser.error(f"unknown group {unknown[0]!r}, choose from {', '.join(sorted(GROUPS))}")
    options.groups = options.groups or list(GROUPS)
    return options


def _compare_scores(ours: Measured, reference: Measured) -> None:
    """Print both scores, and refuse scores that differ."""
    difference = abs(ours.found / reference.found - 1)
    print(f"\nSliding evaluation and reference loop score {ours.found:.4f} and ", end="")
    print(f"{reference.found:.4f} nats a token.")
    if difference > LARGEST_DIFFERENCE:
        raise ValueError(
            f"both scores must agree to {LARGEST_DIFFERENCE:.1%}, got {difference:.2%}"
        )


if __name__ == "__main__":
    run_stage(main)
