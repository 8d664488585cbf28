"""Paired bootstrap: how sure a mean difference is, given what few documents say.

Knows numbers only: not models, protocols or documents.

Source: Efron 1979, "Bootstrap methods: another look at the jackknife"; the percentile interval.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Interval:
    """A mean, and the range in which the means of resamples lie."""

    mean: float
    low: float
    high: float


def paired_bootstrap(
    differences: Sequence[float] | np.ndarray,
    num_resamples: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Return the mean of differences and its percentile bootstrap interval.

    With few differences the interval is too narrow, and with a single one it is a point.

    Args:
        differences: one for each thing that was measured twice.
        num_resamples: how often as many differences are drawn, with replacement.
        level: share of the resamples' means that the interval holds.
        seed: of the draws.
    """
    values = np.asarray(differences, dtype=np.float64)
    assert values.ndim == 1, values.shape
    assert len(values), "nothing to resample"
    generator = np.random.default_rng(seed)
    drawn = generator.integers(len(values), size=(num_resamples, len(values)))
    tail = (1 - level) / 2
    low, high = np.quantile(values[drawn].mean(axis=1), [tail, 1 - tail])
    return Interval(float(values.mean()), float(low), float(high))
