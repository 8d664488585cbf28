"""What a model gains over what it must beat, and how sure that is.

Knows scores only: no models and no files.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from infini_retrofit.evaluation.evaluation import MEMORY_PROTOCOLS, DocumentNlls


def gains(model: DocumentNlls, control: DocumentNlls, titles: Sequence[str]) -> dict[str, float]:
    """Compare a model with what it must beat, document by document.

    Its rival at equal bytes is its own or the control's, whichever is better over all documents.
    What a protocol is needed for that the model was not scored under is left out.

    Args:
        model: what its memory gains is asked for.
        control: what was trained alike without a memory.
        titles: of each document's article; documents of one article are not independent.

    Returns:
        `gain_over_<other>`, the nats a token by which the model is better, and, given enough
        articles, the ends of its 95% paired bootstrap interval, `_low` and `_high`.
    """
    cut = {name: model.get(f"segment_{name}") for name in MEMORY_PROTOCOLS}
    others = {name: nlls for name, nlls in cut.items() if nlls is not None}
    others["control"] = control["segment"]
    if "segment_kv" in model:
        others["kv"] = min(model["segment_kv"], control["segment_kv"], key=np.mean)
    metrics = {}
    for name, other in others.items():
        gain = paired_bootstrap(other - model["segment"], titles)
        metrics[f"gain_over_{name}"] = gain.mean
        if len(set(titles)) >= MIN_GROUPS_FOR_INTERVAL:
            metrics |= {f"gain_over_{name}_low": gain.low, f"gain_over_{name}_high": gain.high}
    return metrics


def has_gap(control: dict[str, float]) -> bool:
    """Tell whether the control loses anything to segmentation; where it does not, warn of it."""
    segment, full = control["segment_test_nll"], control["full_test_nll"]
    if segment > full:
        return True
    print(
        f"warning: gap_recovered is left out: the control scores {segment:.4f} nats a token "
        f"in segments and {full:.4f} under full attention, so there is no gap; documents are "
        "probably longer than what the model was trained on",
        file=sys.stderr,
    )
    return False


def gap_test_nats(control: dict[str, float]) -> float:
    """Return what the control loses to segmentation, in nats a token."""
    return control["segment_test_nll"] - control["full_test_nll"]


def gap_recovered(model: dict[str, float], control: dict[str, float]) -> float:
    """Return the share of the control's loss to segmentation that a model wins back."""
    gap = gap_test_nats(control)
    assert gap > 0, gap
    return (control["segment_test_nll"] - model["segment_test_nll"]) / gap


# Fewer give too narrow an interval: of 10 groups a nominal 95% interval holds the truth about 90%
# of the time, of 5 about 84%, of 2 half of the time.
MIN_GROUPS_FOR_INTERVAL = 10


@dataclass(frozen=True)
class Interval:
    """A mean, and the range in which the means of resamples lie."""

    mean: float
    low: float
    high: float


def paired_bootstrap(
    differences: Sequence[float] | np.ndarray,
    groups: Sequence[str],
    num_resamples: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Return the mean of differences and its percentile bootstrap interval.

    Differences of one group need not be independent: a group is drawn as a whole. All
    differences weigh alike, so a resample's mean is over as many as its groups hold.
    With few groups the interval is too narrow, and with a single one it is a point.

    Args:
        differences: one for each thing that was measured twice.
        groups: the label of each difference's group.
        num_resamples: how often as many groups are drawn, with replacement.
        level: share of the resamples' means that the interval holds.
        seed: of the draws.
    """
    values = np.asarray(differences, dtype=np.float64)
    assert values.ndim == 1, values.shape
    assert len(values) == len(groups) > 0, (len(values), len(groups))
    _, group_indices = np.unique(groups, return_inverse=True)
    sums, sizes = np.bincount(group_indices, weights=values), np.bincount(group_indices)
    generator = np.random.default_rng(seed)
    drawn = generator.integers(len(sums), size=(num_resamples, len(sums)))
    means = sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)
    tail = (1 - level) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(float(values.mean()), float(low), float(high))
