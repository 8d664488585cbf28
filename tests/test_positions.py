"""Documents scored token by token: which position each stands at, and that none is lost."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from infini_retrofit.evaluation.protocols import full_runs, score_positions
from infini_retrofit.model.retrofit import insert_infini
from infini_retrofit.scoring.labels import next_token_nlls
from infini_retrofit.scoring.score import score_segments, segment_runs, total
from tests.reference import infini_params
from tests.tiny import random_ids, tiny_llama

SEGMENT, DOCUMENT = 5, 15


def document_nlls(model: PreTrainedModel, documents: Tensor, segment_length: int) -> Tensor:
    runs = segment_runs(model, documents, segment_length)
    return torch.stack([next_token_nlls(model, *run) for run in runs])


@pytest.mark.parametrize(
    ("length", "begins"), [(5, [0, 1, 2, 4]), (3, [0, 1, 2]), (15, [0, 1, 2, 4, 8])]
)
def test_positions_are_those_of_the_token_that_predicts_and_lose_no_token(length, begins):
    model = tiny_llama()
    insert_infini(model, infini_params(segment_length=length))
    documents = random_ids(model.config.vocab_size, 2, DOCUMENT)
    nlls = document_nlls(model, documents, length)
    found = score_positions(nlls, length)
    assert list(found) == begins
    for begin, end in zip(begins, [*begins[1:], length], strict=True):
        columns = [t for t in range(DOCUMENT - 1) if begin <= t % length < end]
        assert found[begin].num_scored == 2 * len(columns)
        assert found[begin].nll == pytest.approx(nlls[:, columns].double().mean().item())
    whole, parts = total(score_segments(model, documents, length)), total(found.values())
    assert parts.num_scored == whole.num_scored == 2 * (DOCUMENT - 1)
    weighted = sum(s.nll * s.num_scored for s in found.values()) / whole.num_scored
    assert weighted == pytest.approx(whole.nll, rel=1e-12)


def test_only_tokens_that_begin_a_segment_predict_as_if_nothing_came_before():
    base = tiny_llama()
    documents = random_ids(base.config.vocab_size, 2, DOCUMENT)
    pairs = documents.unfold(1, 2, 1).flatten(0, 1)
    with torch.no_grad():
        logits = base(input_ids=pairs[:, :1], use_cache=False).logits[:, 0]
    alone = F.cross_entropy(logits, pairs[:, 1], reduction="none")
    cold = score_positions(alone.view(2, -1), SEGMENT)
    found = score_positions(document_nlls(base, documents, SEGMENT), SEGMENT)
    assert found[0].nll == pytest.approx(cold[0].nll, rel=1e-5)
    assert all(found[begin].nll != pytest.approx(cold[begin].nll, rel=1e-3) for begin in (1, 2, 4))


@pytest.mark.parametrize("runs", [segment_runs, full_runs])
def test_scoring_records_no_gradient_and_leaves_the_mode_as_it_was(runs):
    model = tiny_llama()
    documents = random_ids(model.config.vocab_size, 3, DOCUMENT)
    length = [SEGMENT] if runs is segment_runs else []
    for ids, hidden_states in runs(model, documents, *length):
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
        assert not hidden_states.requires_grad
        assert not next_token_nlls(model, ids, hidden_states).requires_grad
