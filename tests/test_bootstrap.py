"""The bootstrap against a loop, and whether its intervals hold what they promise."""

import numpy as np
import pytest

from infini_retrofit.bootstrap import Interval, paired_bootstrap

DIFFERENCES = [0.3, -0.1, 0.7, 0.2, 0.05, -0.4, 0.11]


def loop_over_resamples(values: list[float], number: int, level: float, seed: int) -> Interval:
    """Draw one resample after another; read the ends off the sorted means between two ranks."""
    generator, means = np.random.default_rng(seed), []
    for _ in range(number):
        drawn = [values[i] for i in generator.integers(len(values), size=len(values))]
        means.append(sum(drawn) / len(drawn))
    means.sort()
    ends = []
    for tail in ((1 - level) / 2, (1 + level) / 2):
        rank = tail * (number - 1)
        below, between = int(rank), rank % 1
        ends.append((1 - between) * means[below] + between * means[min(below + 1, number - 1)])
    return Interval(sum(values) / len(values), *ends)


@pytest.mark.parametrize(
    ("number", "level", "seed"), [(10_000, 0.95, 0), (999, 0.8, 0), (1000, 0.95, 3)]
)
def test_the_interval_is_that_of_a_loop_over_resamples(number, level, seed):
    got = paired_bootstrap(DIFFERENCES, number, level, seed)
    want = loop_over_resamples(DIFFERENCES, number, level, seed)
    for name in ("mean", "low", "high"):
        assert getattr(got, name) == pytest.approx(getattr(want, name), rel=1e-9), name


def test_by_default_it_is_ten_thousand_resamples_and_95_percent_and_the_same_each_time():
    assert paired_bootstrap(DIFFERENCES) == paired_bootstrap(DIFFERENCES, 10_000, 0.95, 0)
    assert paired_bootstrap(DIFFERENCES) != paired_bootstrap(DIFFERENCES, seed=1)


@pytest.mark.parametrize("num_values", [2, 3, 20, 100])
def test_the_interval_holds_the_mean_and_grows_with_its_level(num_values):
    for seed in range(20):
        values = np.random.default_rng(seed).exponential(size=num_values)
        narrow, wide = (paired_bootstrap(values, 2000, level) for level in (0.5, 0.95))
        assert wide.mean == pytest.approx(values.mean())
        assert wide.low <= narrow.low <= narrow.high <= wide.high
        assert wide.low < wide.mean < wide.high


@pytest.mark.parametrize(("level", "least", "most"), [(0.95, 0.90, 0.98), (0.7, 0.62, 0.75)])
def test_the_interval_holds_the_truth_about_as_often_as_it_says(level, least, most):
    truth, generator, num_held, num_tries = 0.3, np.random.default_rng(0), 0, 1000
    for seed in range(num_tries):
        found = paired_bootstrap(generator.normal(truth, 2.0, size=30), 500, level, seed)
        num_held += found.low <= truth <= found.high
    assert least < num_held / num_tries < most


def test_what_differs_alike_on_documents_that_differ_is_certain():
    documents = np.array([2.0, 3.5, 9.0, 4.25])
    found = paired_bootstrap(documents + 0.25 - documents)
    assert found == Interval(0.25, 0.25, 0.25)
    assert paired_bootstrap([0.7]) == Interval(0.7, 0.7, 0.7)
