"""Kept results as DVC experiments: `python -m analysis revisions v1 v2`.

DVC then reads them as revisions: `dvc metrics diff v1 v2`, `dvc params diff v1 v2`. A clone has
no experiments of its own, so this is needed once in each.
"""

import argparse
import json
from collections.abc import Sequence
from typing import Any

from analysis.loading import load_results
from analysis.report.verdict import summarize
from recipes.experiments import check_finished, newest_experiments
from recipes.kept import METRICS, PLOTTED, kept_experiments, read_kept
from recipes.revisions import write_revision

SUMMARY = f"{METRICS}/summary.json"
# What `dvc metrics diff` and `dvc plots diff` read of such a revision.
SHOWN: dict[str, Any] = {
    "metrics": [SUMMARY],
    "plots": [
        {PLOTTED[0]: {"template": "documents", "x": "document", "y": "nll"}},
        {PLOTTED[1]: {"template": "positions", "x": "position", "y": "nll"}},
    ],
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Make each named result, or all, an experiment of DVC."""
    about = "Make results kept in results/ known to DVC, as experiments of their names."
    parser = argparse.ArgumentParser("python -m analysis revisions", description=about)
    parser.add_argument("names", nargs="*", metavar="NAME", help="kept results; none: all")
    known = kept_experiments()
    run_here = newest_experiments()
    names = parser.parse_args(arguments).names or [name for name in known if name not in run_here]
    check_finished("revisions", names, known)
    for name in names:
        texts = read_kept(known[name].source)
        summary = summarize(load_results(known[name]))
        texts[SUMMARY] = json.dumps(summary, indent=2) + "\n"
        print(f"{write_revision(name, known[name], texts, SHOWN)[:7]} {name}")
    print(f"now for example: dvc metrics diff {' '.join(names[:2])} --md")
