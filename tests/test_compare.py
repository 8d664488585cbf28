"""What `eval_sliding` makes of scores: gains, their intervals, and the share of the gap."""

import pytest
import torch

from infini_retrofit.evaluation import Evaluation
from stages.eval_sliding import compare

GAINS = {f"gain_over_{other}" for other in ("off", "recent", "swapped", "control", "kv")}
ENDS = {f"{gain}{end}" for gain in GAINS for end in ("_low", "_high")}


def evaluated(full_nll: float) -> dict[str, Evaluation]:
    """Make scores of twelve documents; the control's segments cost 3 nats a token."""
    metrics = {"segment_test_nll": 3.0, "full_test_nll": full_nll}
    protocols = ("segment", "segment_off", "segment_recent", "segment_swapped", "segment_kv")
    nlls = dict.fromkeys(protocols, torch.full((12, 5), 3.0))
    return {name: Evaluation(metrics, nlls) for name in ("control", "distilled", "finetuned")}


@pytest.mark.parametrize(("full_nll", "has_gap"), [(2.5, True), (3.0, False), (3.25, False)])
def test_without_a_gap_the_share_of_it_is_left_out_and_one_line_says_so(full_nll, has_gap, capsys):
    metrics = compare(evaluated(full_nll), list("abcdefghijkl"))
    warnings = capsys.readouterr().err.splitlines()
    assert metrics["control"]["gap_test_nats"] == 3.0 - full_nll
    for model in ("distilled", "finetuned"):
        assert ("gap_recovered" in metrics[model]) == has_gap
        assert metrics[model].keys() >= GAINS | ENDS
        assert "gap_test_nats" not in metrics[model]
    if has_gap:
        assert warnings == []
    else:
        (warning,) = warnings
        assert warning.startswith("warning: gap_recovered is left out: the control scores 3.0000 ")
        assert f"{full_nll:.4f} under full attention" in warning
        assert "documents are probably longer than what the model was trained on" in warning


def test_documents_of_few_articles_have_gains_without_intervals():
    metrics = compare(evaluated(2.5), list("abcdefghiaaa"))
    assert metrics["finetuned"].keys() >= GAINS
    assert not ENDS & metrics["finetuned"].keys()
