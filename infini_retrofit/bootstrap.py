"""Paired bootstrap: how sure a mean difference is, where some differences belong together.

Knows numbers and groups only: not models, protocols or documents.

Source: Efron 1979, "Bootstrap methods: another look at the jackknife"; the percentile interval.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

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
