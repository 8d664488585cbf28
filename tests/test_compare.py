"""What `eval_sliding` makes of scores: gains, their intervals, and the share of the gap."""

import pytest
import torch

from infini_retrofit.evaluation.evaluation import PROTOCOLS, Evaluation, rows_of_documents
from stages.eval_sliding import DISTILLED_PROTOCOLS, Scored, compare

GAINS = {f"gain_over_{other}" for other in ("off", "recent", "swapped", "control", "kv")}
ENDS = {f"{gain}{end}" for gain in GAINS for end in ("_low", "_high")}


def compared(full_nll: float, titles: str) -> dict[str, dict[str, float]]:
    """Compare made-up scores of twelve documents; segments cost every model 3 nats a token."""
    metrics = {"segment_test_nll": 3.0, "full_test_nll": full_nll}

    def made_up(protocols: tuple[str, ...]) -> Evaluation:
        return Evaluation(dict(metrics), dict.fromkeys(protocols, torch.full((12, 5), 3.0)))

    rows = rows_of_documents("control", made_up(PROTOCOLS), list(titles))
    control = Scored(metrics, rows, [])
    found = {"distilled": made_up(DISTILLED_PROTOCOLS), "finetuned": made_up(PROTOCOLS)}
    return compare(found, control, list(titles))


@pytest.mark.parametrize(("full_nll", "has_gap"), [(2.5, True), (3.0, False), (3.25, False)])
def test_without_a_gap_the_share_of_it_is_left_out_and_one_line_says_so(full_nll, has_gap, capsys):
    metrics = compared(full_nll, "abcdefghijkl")
    warnings = capsys.readouterr().err.splitlines()
    for model in ("distilled", "finetuned"):
        assert ("gap_recovered" in metrics[model]) == has_gap
    assert metrics["finetuned"].keys() >= GAINS | ENDS
    of_distilled = {name for name in metrics["distilled"] if name.startswith("gain_over_")}
    assert of_distilled == {name for name in GAINS | ENDS if "_off" in name or "_control" in name}
    if has_gap:
        assert warnings == []
    else:
        (warning,) = warnings
        assert warning.startswith("warning: gap_recovered is left out: the control scores 3.0000 ")
        assert f"{full_nll:.4f} under full attention" in warning
        assert "documents are probably longer than what the model was trained on" in warning


def test_documents_of_few_articles_have_gains_without_intervals():
    metrics = compared(2.5, "abcdefghiaaa")
    assert metrics["finetuned"].keys() >= GAINS
    assert not ENDS & metrics["finetuned"].keys()
