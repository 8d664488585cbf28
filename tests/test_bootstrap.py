"""The bootstrap against a loop, and whether its intervals hold what they promise."""

import numpy as np
import pytest

from infini_retrofit.evaluation.gains import Interval, paired_bootstrap

DIFFERENCES = [0.3, -0.1, 0.7, 0.2, 0.05, -0.4, 0.11]
APART = list("abcdefg")
TOGETHER = list("bacabad")


def alone(number: int) -> list[str]:
    """Give each difference a group of its own."""
    return [f"{i:04}" for i in range(number)]


def loop_over_resamples(
    values: list[float], labels: list[str], number: int, level: float, seed: int
) -> Interval:
    """Draw one resample after another; read the ends off the sorted means between two ranks."""
    generator, means = np.random.default_rng(seed), []
    groups = [
        [v for v, mark in zip(values, labels, strict=True) if mark == label]
        for label in sorted(set(labels))
    ]
    for _ in range(number):
        drawn = [v for i in generator.integers(len(groups), size=len(groups)) for v in groups[i]]
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
@pytest.mark.parametrize("labels", [APART, TOGETHER])
def test_the_interval_is_that_of_a_loop_over_resamples(labels, number, level, seed):
    got = paired_bootstrap(DIFFERENCES, labels, number, level, seed)
    want = loop_over_resamples(DIFFERENCES, labels, number, level, seed)
    for name in ("mean", "low", "high"):
        assert getattr(got, name) == pytest.approx(getattr(want, name), rel=1e-9), name


def test_by_default_it_is_ten_thousand_resamples_and_95_percent_and_the_same_each_time():
    found = paired_bootstrap(DIFFERENCES, TOGETHER)
    assert found == paired_bootstrap(DIFFERENCES, TOGETHER, 10_000, 0.95, 0)
    assert found != paired_bootstrap(DIFFERENCES, TOGETHER, seed=1)


def test_a_difference_measured_twice_in_one_group_makes_nothing_surer():
    once = paired_bootstrap(DIFFERENCES, APART)
    twice = paired_bootstrap(DIFFERENCES * 2, APART * 2)
    for name in ("mean", "low", "high"):
        assert getattr(twice, name) == pytest.approx(getattr(once, name), rel=1e-9), name
    as_if_new = paired_bootstrap(DIFFERENCES * 2, alone(14))
    assert as_if_new.high - as_if_new.low < 0.8 * (once.high - once.low)


def test_differences_weigh_alike_however_many_their_group_has():
    found = paired_bootstrap([1.0, 1.0, 1.0, 5.0], list("aaab"))
    assert found == Interval(2.0, 1.0, 5.0)
    assert paired_bootstrap([1.0, 3.0], list("aa")) == Interval(2.0, 2.0, 2.0)


@pytest.mark.parametrize("num_values", [2, 3, 20, 100])
def test_the_interval_holds_the_mean_and_grows_with_its_level(num_values):
    for seed in range(20):
        values = np.random.default_rng(seed).exponential(size=num_values)
        narrow, wide = (
            paired_bootstrap(values, alone(num_values), 2000, level) for level in (0.5, 0.95)
        )
        assert wide.mean == pytest.approx(values.mean())
        assert wide.low <= narrow.low <= narrow.high <= wide.high
        assert wide.low < wide.mean < wide.high


@pytest.mark.parametrize(("level", "least", "most"), [(0.95, 0.90, 0.98), (0.7, 0.62, 0.75)])
def test_the_interval_holds_the_truth_about_as_often_as_it_says(level, least, most):
    truth, generator, num_held, num_tries = 0.3, np.random.default_rng(0), 0, 1000
    for seed in range(num_tries):
        values = generator.normal(truth, 2.0, size=30)
        found = paired_bootstrap(values, alone(30), 500, level, seed)
        num_held += found.low <= truth <= found.high
    assert least < num_held / num_tries < most


def test_what_differs_alike_on_documents_that_differ_is_certain():
    documents = np.array([2.0, 3.5, 9.0, 4.25])
    found = paired_bootstrap(documents + 0.25 - documents, alone(4))
    assert found == Interval(0.25, 0.25, 0.25)
    assert paired_bootstrap([0.7], ["a"]) == Interval(0.7, 0.7, 0.7)
