"""Runs and scores: which token is scored where, how often, and with what context."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from infini_retrofit.evaluation import protocols
from infini_retrofit.evaluation.protocols import (
    score_full,
    score_sliding,
    score_unigram,
    sliding_runs,
)
from infini_retrofit.evaluation.rival import Rival, make_rival
from infini_retrofit.layer.probe import Probe
from infini_retrofit.layer.state import State
from infini_retrofit.model.running import run_in_layer
from infini_retrofit.scoring.score import (
    Score,
    next_token_nlls,
    score_rows,
    score_segments,
    segment_runs,
    t2_nlls,
    total,
)
from tests.reference import both_families, make_model, segment_loop
from tests.tiny import ids_for, tiny_llama, tiny_model

SEGMENT, DOCUMENT, STREAM = 5, 15, 47


def retrofitted(family: str = "llama", **form: object) -> PreTrainedModel:
    return make_model(family, form, torch.float32)


@torch.no_grad()
def plain_nlls(model: PreTrainedModel, ids: Tensor, shift: int = 1) -> Tensor:
    """Score one row by its logits, all but its first tokens."""
    logits = model(input_ids=ids[None], use_cache=False).logits[0]
    return F.cross_entropy(logits[:-shift], ids[shift:], reduction="none")


def slide(model: PreTrainedModel, ids: Tensor, window: int = 11, stride: int = 4) -> Tensor:
    return torch.cat(
        [next_token_nlls(model, *run) for run in sliding_runs(model, ids, window, stride)]
    )


@both_families
@pytest.mark.parametrize(("window", "stride"), [(11, 4), (STREAM, 7), (100, 7), (16, 15), (11, 10)])
def test_sliding_equals_a_loop_over_windows_divided_once(family, window, stride):
    model, nlls, means = tiny_model(family), [], []
    ids = ids_for(model, 1, STREAM)[0]
    for begin in range(0, STREAM, stride):
        new = plain_nlls(model, ids[begin : begin + window])[len(nlls) - begin :]
        nlls += new.tolist()
        means.append(new.mean().item())
        if len(nlls) == STREAM - 1:
            break
    assert slide(model, ids, window, stride).tolist() == pytest.approx(nlls, rel=1e-4)
    score = score_sliding(model, ids, window, stride)
    assert score.num_scored == STREAM - 1
    assert score.nll == pytest.approx(sum(nlls) / (STREAM - 1), rel=1e-5)
    assert score.ppl == pytest.approx(math.exp(score.nll))
    mean_of_windows = sum(means) / len(means)
    assert len(means) == 1 or mean_of_windows != pytest.approx(score.nll, rel=1e-3)


def future_changed(model: PreTrainedModel, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Return two streams that differ from token 30 on."""
    ids = ids_for(model, 1, num_tokens)[0]
    other = ids.clone()
    other[30:] = (other[30:] + 1) % model.config.vocab_size
    return ids, other


# The last window of 42 tokens is shorter than a segment and than its context.
@both_families
@pytest.mark.parametrize(
    ("num_tokens", "stride", "local_context"), [(STREAM, 4, 0), (42, 10, 0), (42, 10, 4)]
)
def test_future_tokens_do_not_move_earlier_sliding_scores_by_a_bit(
    family, num_tokens, stride, local_context
):
    model = retrofitted(family, local_context=local_context)
    first, second = (slide(model, ids, 11, stride) for ids in future_changed(model, num_tokens))
    assert len(first) == num_tokens - 1
    assert torch.equal(first[:29], second[:29])
    assert not torch.equal(first, second)


def test_a_memory_that_lives_on_between_windows_lets_future_tokens_in(monkeypatch):
    model, before = retrofitted(), {}

    def run_with_living_memory(model: PreTrainedModel, rows: Tensor) -> Tensor:
        state = State(before=dict(before))
        hidden = model.base_model(input_ids=rows, use_cache=False, state=state)
        before.update(state.after)
        return hidden.last_hidden_state

    monkeypatch.setattr(protocols, "WINDOWS_PER_BATCH", 1)
    monkeypatch.setattr(protocols, "run_in_layer", run_with_living_memory)
    results = []
    for ids in future_changed(model, STREAM):
        before.clear()
        slide(model, ids)
        results.append(slide(model, ids)[:29])
    assert not torch.allclose(*results, rtol=1e-3)


@both_families
@pytest.mark.parametrize("read", ["own", "off"])
def test_segments_equal_a_loop_with_border_tokens_scored(family, read):
    model = retrofitted(family)
    documents = ids_for(model, 2, DOCUMENT)
    scores = score_segments(model, documents, SEGMENT, read)
    runs = segment_runs(model, documents, SEGMENT, read)
    t2_scores = [Score.of(t2_nlls(model, *run, SEGMENT)) for run in runs]
    with torch.no_grad():
        hidden = segment_loop(model, documents, SEGMENT, Probe(read=read))
        logits = model.get_output_embeddings()(hidden)
    for score, t2, ids, row in zip(scores, t2_scores, documents, logits, strict=True):
        want = F.cross_entropy(row[:-1], ids[1:], reduction="none")
        assert score.num_scored == DOCUMENT - 1
        assert score.nll_sum == pytest.approx(want.sum().item(), rel=1e-5)
        inside = [t for t in range(DOCUMENT - 1) if (t + 1) % SEGMENT]
        assert want[inside].mean().item() != pytest.approx(score.nll, rel=1e-3)
        twice = [s + t for s in range(0, DOCUMENT, SEGMENT) for t in range(SEGMENT - 2)]
        want = F.cross_entropy(row[twice], ids[[t + 2 for t in twice]], reduction="sum")
        assert t2.num_scored == DOCUMENT // SEGMENT * (SEGMENT - 2)
        assert t2.nll_sum == pytest.approx(want.item(), rel=1e-5)


@pytest.mark.parametrize("num_documents", [2, 3, 5])
def test_a_document_s_score_is_its_own_and_a_swapped_memory_is_not(num_documents):
    model = retrofitted()
    documents = ids_for(model, num_documents, DOCUMENT)
    own = [score.nll for score in score_segments(model, documents, SEGMENT)]
    apart = [score_segments(model, row[None], SEGMENT)[0].nll for row in documents]
    assert own == pytest.approx(apart, rel=1e-5)
    for score, nll in zip(score_segments(model, documents, SEGMENT, "swapped"), own, strict=True):
        assert score.nll != pytest.approx(nll, rel=1e-4)
    with pytest.raises(ValueError, match="swapped memories need at least 2 documents, got 1"):
        score_segments(model, documents[:1], SEGMENT, "swapped")


@both_families
def test_one_segment_equals_no_segments_equals_the_plain_forward(family):
    base, model = tiny_model(family), retrofitted(family)
    documents = ids_for(base, 2, DOCUMENT)
    want = [plain_nlls(base, ids).sum().item() for ids in documents]
    for scores in (
        score_full(base, documents),
        score_full(model, documents),
        score_segments(base, documents, DOCUMENT),
        score_segments(model, documents, DOCUMENT),
        score_rows(base, documents),
    ):
        assert [s.nll_sum for s in scores] == pytest.approx(want, rel=1e-5)
        assert total(scores).num_scored == 2 * (DOCUMENT - 1)
    with torch.no_grad():
        in_layer = model.get_output_embeddings()(run_in_layer(model, documents[:1]))[0]
    want = F.cross_entropy(in_layer[:-1], documents[0, 1:], reduction="sum").item()
    assert score_rows(model, documents)[0].nll_sum == pytest.approx(want, rel=1e-5)


def test_unigram_scores_are_counts_plus_one():
    train, test = torch.tensor([0, 0, 2]), torch.tensor([1, 0, 2, 1])
    want = -(math.log(3 / 6) + math.log(2 / 6) + math.log(1 / 6))
    score = score_unigram(train, test, vocab_size=3)
    assert score.num_scored == 3
    assert score.nll_sum == pytest.approx(want)


def rote_model(vocab_size: int = 23) -> PreTrainedModel:
    """Make a base that knows one thing: after token i comes token i + 7."""
    model = tiny_llama(vocab_size=vocab_size, tie_word_embeddings=False)
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.data.zero_()
    one_hot = 9 * torch.eye(vocab_size, model.config.hidden_size)
    model.get_input_embeddings().weight.data.copy_(one_hot)
    model.get_output_embeddings().weight.data.copy_(one_hot.roll(7, dims=0))
    return model


def test_a_base_that_knows_its_text_is_below_the_unigram_on_every_path_but_the_doubly_shifted():
    base = rote_model()
    documents = torch.stack([(torch.arange(DOCUMENT) * 7 + i) % 23 for i in range(3)])
    unigram = score_unigram(documents.flatten(), documents.flatten(), 23).nll
    rival = make_rival(base, Rival(segment_length=SEGMENT, num_tokens=2))
    reads = ("own", "recent", "off", "swapped")
    scores = [s for read in reads for s in score_segments(base, documents, SEGMENT, read)]
    scores += score_segments(rival, documents, SEGMENT) + score_full(base, documents)
    scores += [*score_rows(base, documents), score_sliding(base, documents[0], 11, 4)]
    assert all(score.nll < 0.01 * unigram for score in scores)
    runs = segment_runs(base, documents, SEGMENT)
    assert all(Score.of(t2_nlls(base, *run, SEGMENT)).nll > unigram for run in runs)
    assert torch.stack([plain_nlls(base, ids, shift=2) for ids in documents]).mean() > unigram
