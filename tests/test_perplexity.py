"""The protocols: which token is scored where, how often, and with what context."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel

from infini_retrofit.evaluation import protocols
from infini_retrofit.evaluation.protocols import (
    score_full,
    score_sliding,
    score_unigram,
    sliding_spans,
)
from infini_retrofit.layer.probe import Probe
from infini_retrofit.layer.state import State
from infini_retrofit.model.families import FAMILIES
from infini_retrofit.model.retrofit import insert_infini
from infini_retrofit.model.running import run_in_layer
from infini_retrofit.scoring import labels
from infini_retrofit.scoring.labels import t2_nlls
from infini_retrofit.scoring.score import (
    Score,
    Whose,
    score_rows,
    score_segments,
    segment_runs,
    total,
)
from tests.reference import infini_params, segment_loop
from tests.tiny import random_ids, tiny_llama, tiny_model

SEGMENT, DOCUMENT, STREAM = 5, 15, 47
both_families = pytest.mark.parametrize("family", sorted(FAMILIES))


def retrofitted(family: str, **over: object) -> PreTrainedModel:
    model = tiny_model(family)
    insert_infini(model, infini_params(**over))
    return model


def ids_for(model: PreTrainedModel, *shape: int) -> Tensor:
    return random_ids(model.config.vocab_size, *shape)


@torch.no_grad()
def plain_nlls(model: PreTrainedModel, ids: Tensor, shift: int = 1) -> Tensor:
    """Score one row by its logits, all but its first tokens."""
    logits = model(input_ids=ids[None], use_cache=False).logits[0]
    return F.cross_entropy(logits[:-shift], ids[shift:], reduction="none")


def scored(monkeypatch, score, *args: object) -> Tensor:
    """Return every single score that a protocol gives, in its order."""
    nlls, token_nlls = [], labels.token_nlls

    def spy(*inputs: Tensor) -> Tensor:
        nlls.append(token_nlls(*inputs))
        return nlls[-1]

    with monkeypatch.context() as patch:
        patch.setattr(labels, "token_nlls", spy)
        score(*args)
    return torch.cat(nlls)


@pytest.mark.parametrize("num_tokens", [2, 10, 11, 12, STREAM])
@pytest.mark.parametrize(("window", "stride"), [(11, 10), (11, 4), (2, 1), (100, 7)])
def test_every_token_but_the_first_is_scored_once_with_the_context_asked_for(
    num_tokens, window, stride
):
    times_scored = [0] * num_tokens
    for span in sliding_spans(num_tokens, window, stride):
        assert span.end - span.begin <= window
        for t in range(span.end - span.num_scored, span.end):
            times_scored[t] += 1
            assert t - span.begin >= min(t, window - stride)
    assert times_scored == [0] + [1] * (num_tokens - 1)


@both_families
@pytest.mark.parametrize(("window", "stride"), [(11, 4), (STREAM, 7), (16, 15)])
def test_sliding_equals_a_loop_over_windows_divided_once(family, window, stride):
    model = tiny_model(family)
    ids, sums, counts, scored_to = ids_for(model, STREAM), [], [], 1
    for begin in range(0, STREAM, stride):
        end = min(begin + window, STREAM)
        nlls = plain_nlls(model, ids[begin:end])[scored_to - end :]
        sums.append(nlls.sum().item())
        counts.append(len(nlls))
        scored_to = end
        if end == STREAM:
            break
    score = score_sliding(model, ids, window, stride)
    assert score.num_scored == sum(counts) == STREAM - 1
    assert score.nll == pytest.approx(sum(sums) / (STREAM - 1), rel=1e-5)
    assert score.ppl == pytest.approx(math.exp(score.nll))
    mean_of_windows = sum(s / c for s, c in zip(sums, counts, strict=True)) / len(sums)
    assert len(sums) == 1 or mean_of_windows != pytest.approx(score.nll, rel=1e-3)


@both_families
def test_an_infini_model_slid_in_windows_within_a_segment_is_the_base(family):
    base, model = tiny_model(family), retrofitted(family, segment_length=16)
    ids = ids_for(base, STREAM)
    for window in (11, 16):
        want = score_sliding(base, ids, window, 4)
        assert score_sliding(model, ids, window, 4).nll == pytest.approx(want.nll, rel=1e-6)
    beyond = score_sliding(model, ids, 23, 4).nll
    assert beyond != pytest.approx(score_sliding(base, ids, 23, 4).nll, rel=1e-4)


@pytest.mark.parametrize("local_context", [0, 4])
def test_the_last_window_may_be_shorter_than_a_segment_or_its_context(local_context):
    model = retrofitted("llama", local_context=local_context)
    assert score_sliding(model, ids_for(model, 42), 11, 10).num_scored == 41


@both_families
def test_future_tokens_do_not_move_earlier_sliding_scores_by_a_bit(family, monkeypatch):
    model, changed = retrofitted(family), 30
    ids = ids_for(model, STREAM)
    other = ids.clone()
    other[changed:] = (other[changed:] + 1) % model.config.vocab_size
    first, second = (scored(monkeypatch, score_sliding, model, x, 11, 4) for x in (ids, other))
    assert torch.equal(first[: changed - 1], second[: changed - 1])
    assert not torch.equal(first, second)


def test_a_memory_that_lives_on_between_windows_lets_future_tokens_in(monkeypatch):
    model, changed, before = retrofitted("llama"), 30, {}

    def run_with_living_memory(model: PreTrainedModel, rows: Tensor) -> Tensor:
        state = State(before=dict(before))
        hidden = model.base_model(input_ids=rows, use_cache=False, state=state)
        before.update(state.after)
        return hidden.last_hidden_state

    monkeypatch.setattr(protocols, "WINDOWS_PER_BATCH", 1)
    monkeypatch.setattr(protocols, "run_in_layer", run_with_living_memory)
    ids = ids_for(model, STREAM)
    other = ids.clone()
    other[changed:] = (other[changed:] + 1) % model.config.vocab_size
    results = []
    for stream in (ids, other):
        before.clear()
        for _ in range(2):
            nlls = scored(monkeypatch, score_sliding, model, stream, 11, 4)
        results.append(nlls[: changed - 1])
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


@pytest.mark.parametrize("num_documents", [1, 2, 3, 5])
def test_every_document_is_scored_and_its_score_is_its_own(num_documents):
    model = retrofitted("llama")
    documents = ids_for(model, num_documents, DOCUMENT)
    together = score_segments(model, documents, SEGMENT)
    apart = [score_segments(model, row[None], SEGMENT)[0] for row in documents]
    assert [s.nll_sum for s in together] == pytest.approx([s.nll_sum for s in apart], rel=1e-5)


def test_a_memory_is_never_swapped_with_its_own():
    model = retrofitted("llama")
    for num_documents in (2, 3, 5):
        documents = ids_for(model, num_documents, DOCUMENT)
        own = score_segments(model, documents, SEGMENT)
        swapped = score_segments(model, documents, SEGMENT, "swapped")
        for a, b in zip(own, swapped, strict=True):
            assert a.nll != pytest.approx(b.nll, rel=1e-4)
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


def rote_model(vocab_size: int = 23) -> LlamaForCausalLM:
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
    reads: tuple[Whose, ...] = ("own", "recent", "off", "swapped")
    scores = [total(score_segments(base, documents, SEGMENT, read)) for read in reads]
    scores += [total(score_full(base, documents)), total(score_rows(base, documents))]
    scores += [score_sliding(base, documents[0], 11, 4)]
    assert all(score.nll < 0.01 * unigram for score in scores)
    runs = segment_runs(base, documents, SEGMENT)
    assert total(Score.of(t2_nlls(base, *run, SEGMENT)) for run in runs).nll > unigram
    doubly_shifted = torch.cat([plain_nlls(base, ids, shift=2) for ids in documents])
    assert doubly_shifted.mean() > unigram
