"""Two finished experiments in the rows of the seeds' reports: `python -m analysis compare v1 v2`.

Knows which metrics the stages write. A comparison with intervals is `against`.
"""

import argparse
import sys
from collections.abc import Callable, Sequence

import pandas as pd

from analysis.comparing import split_comparable
from analysis.loading import (
    MINUTES,
    TOKENS_SEEN,
    find_experiments,
    load_metrics,
    load_scores,
    load_settings,
)
from analysis.table import MISSING, SEGMENT, ppl, rows_as_markdown, write

GAP = "gap"  # of the distilled model's sliding perplexity to the base's
T2, AS_THE_SEEDS = ppl("t2"), "the same for the token after next, as the seeds"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print two experiments side by side, and how the second differs from the first."""
    about = "Print two finished experiments side by side, in the rows of the seeds' reports."
    parser = argparse.ArgumentParser("python -m analysis compare", description=about)
    parser.add_argument("names", nargs=2, metavar="NAME", help="finished experiments")
    names = parser.parse_args(arguments).names
    if names[0] == names[1]:
        raise ValueError(f"compare needs two experiments, got {names[0]} twice")
    experiments = find_experiments("compare", names)
    metrics, settings = load_metrics(experiments), load_settings(experiments)
    rows = compare(metrics.loc[names], settings.loc[names])
    print(rows_as_markdown(["metric", *names, "change"], rows))
    if len(split_comparable(load_scores(experiments), names)) > 1:
        note = "the two scored other documents or another base: perplexities do not compare"
        print(f"note: {note}", file=sys.stderr)


def compare(metrics: pd.DataFrame, settings: pd.DataFrame) -> list[list[str]]:
    """Write each metric of the seeds' reports for two experiments, and its change.

    Args:
        metrics: of the two, as `load_metrics` returns them.
        settings: of the two, as `load_settings` returns them.

    Returns:
        Rows of metric, first, second, change. Metrics that neither has are left out.
    """
    gap = metrics.reindex(columns=[ppl("sliding", "distilled"), ppl("sliding", "base")])
    metrics = metrics.assign(**{GAP: gap.iloc[:, 0] - gap.iloc[:, 1]})
    metrics.loc[metrics["distill.epochs_run"].eq(0), "distill.val_loss"] = None  # nothing fitted
    of_the_seeds = settings["finetune.label_shift"].eq("2").any()
    parts = [
        _epochs("distillation epochs", "distill", metrics, settings),
        _row("distillation loss", metrics, "distill.val_loss", _share),
        _row("distilled PPL, sliding", metrics, ppl("sliding", "distilled"), _share),
        _row("its gap to the base's PPL", metrics, GAP, _share),
        _epochs("fine-tuning epochs", "finetune", metrics, settings),
        _row("best epoch", metrics, "finetune.best_epoch", _difference),
        _row("final PPL, in segments", metrics, SEGMENT, _share),
        *([_row(AS_THE_SEEDS, metrics, T2, _share)] if of_the_seeds else []),
        _row("trained on tokens", metrics, TOKENS_SEEN, _share),
        _row("minutes of training", metrics, MINUTES, _difference),
    ]
    return [row for row in parts if row[1:3] != [MISSING, MISSING]]


def _row(
    label: str, metrics: pd.DataFrame, metric: str, change: Callable[[float, float], str]
) -> list[str]:
    """Write one metric of two experiments, and its change if both have it."""
    before, after = metrics.reindex(columns=[metric])[metric]
    texts = [f"{v:+.2f}" if metric == GAP and v == v else write(metric, v) for v in (before, after)]
    return [label, *texts, MISSING if MISSING in texts else change(before, after)]


def _epochs(
    label: str, section: str, metrics: pd.DataFrame, settings: pd.DataFrame
) -> list[str]:
    """Write how many epochs ran, and whether fewer than allowed because it stopped early."""
    row = _row(label, metrics, f"{section}.epochs_run", _difference)
    allowed = settings[f"{section}.epochs"].map(lambda text: f"{int(text):,}")
    texts = [
        text if text in (MISSING, most) else f"{text} (stopped early)"
        for text, most in zip(row[1:3], allowed, strict=True)
    ]
    return [label, *texts, row[3]]


def _share(before: float, after: float) -> str:
    return f"{after / before - 1:+.0%}" if before else MISSING


def _difference(before: float, after: float) -> str:
    return f"{round(after - before, 1):+,g}"
