"""What a model gains over what it must beat: over what, in nats, and with which interval."""

import math

import numpy as np
import pytest

from infini_retrofit.evaluation.evaluation import MEMORY_PROTOCOLS, DocumentNlls
from infini_retrofit.evaluation.gains import (
    gains,
    gap_recovered,
    gap_test_nats,
    has_gap,
    paired_bootstrap,
)

TITLES = ["a", "b", "a"]


def made_up(**document_nlls: list[float]) -> DocumentNlls:
    return {name: np.array(nlls) for name, nlls in document_nlls.items()}


OWN = [2.0, 3.0, 4.0]


@pytest.mark.parametrize(
    ("own_kv", "control_kv", "better"),
    [
        ([2.1, 3.3, 4.2], [2.2, 3.4, 4.6], [2.1, 3.3, 4.2]),
        ([2.3, 3.1, 4.9], [2.4, 3.0, 4.1], [2.4, 3.0, 4.1]),  # on the whole, not on each
    ],
)
def test_a_gain_is_what_the_other_loses_more_document_by_document(own_kv, control_kv, better):
    control = [2.5, 2.9, 4.4]
    others = {"off": [2.3, 3.1, 4.0], "recent": [2.1, 3.0, 4.3], "swapped": [1.9, 3.6, 4.2]}
    cut = {f"segment_{name}": values for name, values in others.items()}
    model = made_up(segment=OWN, segment_kv=own_kv, **cut)
    found = gains(model, made_up(segment=control, segment_kv=control_kv), TITLES)
    others |= {"control": control, "kv": better}
    assert found == {
        f"gain_over_{name}": pytest.approx(np.mean(other) - np.mean(OWN))
        for name, other in others.items()
    }
    assert found["gain_over_off"] > 0


def test_what_a_model_was_not_scored_under_is_left_out():
    control = made_up(segment=[2.5, 2.9, 4.4], segment_kv=OWN)
    found = gains(made_up(segment=OWN, segment_off=[2.3, 3.1, 4.0]), control, TITLES)
    assert found.keys() == {"gain_over_off", "gain_over_control"}


@pytest.mark.parametrize(("num_articles", "has_interval"), [(9, False), (10, True), (12, True)])
def test_only_enough_articles_give_an_interval_and_they_are_what_is_resampled(
    num_articles, has_interval
):
    gain = np.random.default_rng(0).normal(0.1, 0.3, size=12)
    titles = [f"article {i % num_articles}" for i in range(12)]
    own = dict.fromkeys(("segment", "segment_kv"), [3.0] * 12)
    others = {f"segment_{name}": list(3 + gain) for name in MEMORY_PROTOCOLS}
    found = gains(made_up(**own, **others), made_up(**own), titles)
    want = paired_bootstrap(gain, titles)
    assert found["gain_over_off"] == pytest.approx(gain.mean())
    assert ("gain_over_off_low" in found) == ("gain_over_off_high" in found) == has_interval
    if has_interval:
        assert found["gain_over_off_low"] == pytest.approx(want.low)
        assert found["gain_over_off_high"] == pytest.approx(want.high)
        assert (found["gain_over_control_low"], found["gain_over_control_high"]) == (0, 0)
    if 10 <= num_articles < 12:
        apart = paired_bootstrap(gain, list(map(str, range(12))))
        assert want.high != pytest.approx(apart.high, rel=1e-3)


@pytest.mark.parametrize(
    ("segment_nll", "share"), [(3.0, 0.0), (2.5, 0.5), (2.0, 1.0), (3.5, -0.5)]
)
def test_the_gap_runs_from_the_control_s_segments_to_its_full_attention(segment_nll, share):
    control = {"segment_test_nll": 3.0, "full_test_nll": 2.0}
    model = {"segment_test_nll": segment_nll, "full_test_nll": 9.0}
    assert gap_recovered(model, control) == pytest.approx(share)


@pytest.mark.parametrize(("full_nll", "num_lines"), [(2.9, 0), (3.0, 1), (3.5, 1), (math.nan, 1)])
def test_where_full_attention_is_no_better_that_is_said(full_nll, num_lines, capsys):
    control = {"segment_test_nll": 3.0, "full_test_nll": full_nll}
    assert gap_test_nats(control) == pytest.approx(3.0 - full_nll, nan_ok=True)
    assert has_gap(control) is (num_lines == 0)
    assert len(capsys.readouterr().err.splitlines()) == num_lines
