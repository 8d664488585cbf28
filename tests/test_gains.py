"""Gains over the right scores, in nats; their intervals against a loop over resamples."""

import math

import numpy as np
import pytest

from infini_retrofit.evaluation.bootstrap import paired_bootstrap
from infini_retrofit.evaluation.evaluation import DocumentNlls, Report
from infini_retrofit.evaluation.gains import gains
from stages.eval_sliding import add_gains

OWN, CONTROL = [2.0, 3.0, 4.0], [2.5, 2.9, 4.4]
DIFFERENCES = [0.3, -0.1, 0.7, 0.2, 0.05, -0.4, 0.11]
APART, TOGETHER = list("abcdefg"), list("bacabad")


def made_up(**document_nlls: list[float]) -> DocumentNlls:
    return {name: np.array(nlls) for name, nlls in document_nlls.items()}


@pytest.mark.parametrize(
    ("own_kv", "control_kv", "better"),
    [
        ([2.1, 3.3, 4.2], [2.2, 3.4, 4.6], [2.1, 3.3, 4.2]),
        ([2.3, 3.1, 4.9], [2.4, 3.0, 4.1], [2.4, 3.0, 4.1]),  # on the whole, not on each
    ],
)
def test_a_gain_is_what_the_other_loses_more_document_by_document(own_kv, control_kv, better):
    others = {"off": [2.3, 3.1, 4.0], "recent": [2.1, 3.0, 4.3], "swapped": [1.9, 3.6, 4.2]}
    model = made_up(
        segment=OWN, segment_kv=own_kv, **{f"segment_{name}": nlls for name, nlls in others.items()}
    )
    control = made_up(segment=CONTROL, segment_kv=control_kv)
    others |= {"control": CONTROL, "kv": better}
    assert gains(model, control, ["a", "b", "a"]) == {
        f"gain_over_{name}": pytest.approx(np.mean(other) - np.mean(OWN))
        for name, other in others.items()
    }
    few = gains(made_up(segment=OWN, segment_off=OWN), control, ["a", "b", "a"])
    assert few.keys() == {"gain_over_off", "gain_over_control"}


@pytest.mark.parametrize(("num_articles", "has_interval"), [(9, False), (10, True), (12, True)])
def test_only_enough_articles_give_an_interval_and_they_are_what_is_resampled(
    num_articles, has_interval
):
    gain = np.random.default_rng(0).normal(0.1, 0.3, size=12)
    titles = [f"article {i % num_articles}" for i in range(12)]
    own = made_up(segment=[3.0] * 12, segment_off=list(3 + gain))
    found, (_, low, high) = gains(own, own, titles), paired_bootstrap(gain, titles)
    ends = {"gain_over_off_low": low, "gain_over_off_high": high}
    none = {f"gain_over_control{end}": 0 for end in ("_low", "_high")}
    expected = {"gain_over_off": gain.mean(), "gain_over_control": 0}
    assert found == pytest.approx(expected | (ends | none if has_interval else {}))
    _, _, apart = paired_bootstrap(gain, list(map(str, range(12))))
    assert (high == pytest.approx(apart, rel=1e-2)) == (num_articles == 12)


def loop_over_resamples(
    values: list[float], labels: list[str], number: int, level: float, seed: int
) -> tuple[float, float, float]:
    """Draw one resample after another."""
    generator, means = np.random.default_rng(seed), []
    groups = [
        [v for v, mark in zip(values, labels, strict=True) if mark == label]
        for label in sorted(set(labels))
    ]
    for _ in range(number):
        drawn = [v for i in generator.integers(len(groups), size=len(groups)) for v in groups[i]]
        means.append(sum(drawn) / len(drawn))
    ends = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return sum(values) / len(values), *ends


@pytest.mark.parametrize("arguments", [(10_000, 0.95, 0), (999, 0.8, 0), (1000, 0.95, 3)])
@pytest.mark.parametrize("labels", [APART, TOGETHER])
def test_the_interval_is_that_of_a_loop_over_resamples(labels, arguments):
    found = paired_bootstrap(DIFFERENCES, labels, *arguments)
    want = loop_over_resamples(DIFFERENCES, labels, *arguments)
    assert found == pytest.approx(want, rel=1e-9)
    is_default = arguments == (10_000, 0.95, 0)
    assert (paired_bootstrap(DIFFERENCES, labels) == found) == is_default


def with_gap(full_nll: float, nll: float) -> dict[str, float]:
    """Add gains to the metrics of a model; in segments, its control loses 3 nats a token."""
    rows = [{"protocol": "segment", "nll": str(n)} for n in OWN]
    control, report = (
        Report({"segment_test_nll": n, "full_test_nll": full_nll}, rows, []) for n in (3.0, nll)
    )
    add_gains([report], control, list("aba"))
    assert report.metrics["gain_over_control"] == 0
    return report.metrics


@pytest.mark.parametrize(("nll", "share"), [(3.0, 0.0), (2.5, 0.5), (2.0, 1.0), (3.5, -0.5)])
def test_the_gap_runs_from_the_control_s_segments_to_its_full_attention(nll, share, capsys):
    assert with_gap(2.0, nll)["gap_recovered"] == pytest.approx(share)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("full_nll", [3.0, 3.25, math.nan])
def test_without_a_gap_the_share_of_it_is_left_out_and_one_line_says_so(full_nll, capsys):
    assert "gap_recovered" not in with_gap(full_nll, 2.5)
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning: gap_recovered is left out: the control scores 3.0000 ")
    assert f"{full_nll:.4f} under full attention" in warning
    assert "documents are probably longer than what the model was trained on" in warning
