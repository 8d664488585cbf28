"""The report of finished experiments, as stage `report` makes it: `python -m analysis reports v2`.

Without continuations, which need the models.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from analysis.loading import find_experiments, load_results, read_seconds
from analysis.report.page import Report, as_html, as_markdown
from analysis.report.setting import differences
from infini_retrofit.pipeline.files import write_text
from recipes.experiments import Experiment, committed_params

FOLDER = Path("build/report")


def main(arguments: Sequence[str] | None = None) -> None:
    """Write a report for each experiment and print its verdict and table."""
    about = "Write the report of finished experiments, as stage `report` does of a run."
    parser = argparse.ArgumentParser("python -m analysis reports", description=about)
    parser.add_argument("names", nargs="+", metavar="NAME", help="finished experiments")
    experiments = find_experiments("reports", parser.parse_args(arguments).names)
    default = committed_params()
    for name, experiment in experiments.items():
        report = make_report(name, experiment, default)
        page, text = FOLDER / f"{name}.html", as_markdown(report)
        write_text(page, as_html(report))
        print(text.split("\n## ")[0].rstrip(), f"{page} (open it in a browser)", sep="\n\n")


def make_report(name: str, experiment: Experiment, default: Mapping[str, Any]) -> Report:
    """Gather what the report of an experiment shows.

    Args:
        name: of the experiment.
        experiment: a finished one.
        default: the params.yaml that its parameters are compared with; presets are not.
    """
    results = load_results(experiment)
    presets = ("models.", "corpora.")
    changed = [
        tuple(map(str, row))
        for row in differences(default, results.params)
        if not row[0].startswith(presets)
    ]
    return Report(
        title=f"{name}: {results.params['model']} with a memory",
        results=results,
        changed=changed,
        setting=[("commit", experiment.code[:7])],
        seconds=list(read_seconds(experiment.source).items()),
    )
