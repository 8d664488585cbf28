"""Which score stands under which name, and what is not scored twice or not at all."""

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from infini_retrofit.evaluation import evaluation
from infini_retrofit.evaluation.evaluation import (
    PROTOCOLS,
    EvalParams,
    evaluate,
    read_document_rows,
    rows_of_documents,
    rows_of_positions,
)
from infini_retrofit.evaluation.gains import gains
from infini_retrofit.evaluation.protocols import score_full, score_sliding
from infini_retrofit.evaluation.rival import Rival, carried_tokens, make_rival, rival_of
from infini_retrofit.model.families import FAMILIES
from infini_retrofit.model.retrofit import insert_infini
from infini_retrofit.pipeline import tokens as texts
from infini_retrofit.scoring import score as perplexity
from infini_retrofit.scoring.labels import t2_nlls
from infini_retrofit.scoring.score import Score, score_segments, segment_runs, total
from tests.reference import infini_params
from tests.tiny import random_ids, tiny_model

SEGMENT, DOCUMENT, STREAM = 5, 15, 47
TITLES = ["a", "b", "a"]
EVAL = {"window": 11, "stride": 4, "sliding_tokens": STREAM, "documents": 3}
INFINI = infini_params(layers=[0, 2], local_context=2)
both_families = pytest.mark.parametrize("family", sorted(FAMILIES))


def text_for(model: PreTrainedModel) -> texts.TestText:
    documents = random_ids(model.config.vocab_size, 3, DOCUMENT)
    stream = random_ids(model.config.vocab_size, STREAM)
    return texts.TestText(stream, documents, TITLES)


def scores_of(model: PreTrainedModel, text: texts.TestText) -> evaluation.Evaluation:
    return evaluate(model, rival_of(model, INFINI), EvalParams(**EVAL), text)


def make_model(family: str, inserted: bool) -> PreTrainedModel:
    model = tiny_model(family)
    if inserted:
        insert_infini(model, INFINI)
    return model


@both_families
@pytest.mark.parametrize("inserted", [True, False])
def test_every_name_stands_for_its_own_protocol(family, inserted):
    model, rival = make_model(family, inserted), make_model(family, inserted)
    make_rival(rival, carried_tokens(rival, INFINI), SEGMENT)
    text = text_for(model)
    runs = segment_runs(model, text.documents, SEGMENT)
    want = {
        "sliding": score_sliding(model, text.stream, 11, 4),
        "full": total(score_full(model, text.documents)),
        "segment": total(score_segments(model, text.documents, SEGMENT)),
        "t2": total(Score.of(t2_nlls(model, *run, SEGMENT)) for run in runs),
        "segment_off": total(score_segments(model, text.documents, SEGMENT, "off")),
        "segment_recent": total(score_segments(model, text.documents, SEGMENT, "recent")),
        "segment_swapped": total(score_segments(model, text.documents, SEGMENT, "swapped")),
        "segment_kv": total(score_segments(rival, text.documents, SEGMENT)),
    }
    metrics = scores_of(model, text).metrics
    num_bytes = 2 * INFINI_BYTES[family] if inserted else 0
    assert metrics == {f"{name}_test_ppl": pytest.approx(s.ppl) for name, s in want.items()} | {
        "full_test_nll": pytest.approx(want["full"].nll),
        "segment_test_nll": pytest.approx(want["segment"].nll),
        "state_bytes": num_bytes,
        "num_documents": 3,
        "num_articles": 2,
    }
    different = {round(score.nll, 4) for score in want.values()}
    assert len(different) == (len(want) if inserted else len(want) - 3)


# Memory in float32, and two tokens' keys and values at two bytes a channel.
INFINI_BYTES = {
    "llama": 4 * 2 * (6 * 6 + 6) + 2 * 2 * 2 * 6 * 2,
    "gpt_neox": 4 * 3 * (10 * 10 + 10) + 2 * 2 * 3 * 10 * 2,
}


@both_families
def test_documents_weighed_by_their_tokens_give_the_total_and_are_each_their_own(family):
    model = make_model(family, True)
    text = text_for(model)
    want = score_segments(model, text.documents, SEGMENT, "off")
    found = scores_of(model, text)
    by_document = found.of_documents()["segment_off"]
    assert list(by_document) == pytest.approx([score.nll for score in want])
    assert len({round(nll, 3) for nll in by_document}) == len(want)
    num_scored = DOCUMENT - 1
    assert (by_document * num_scored).sum() == pytest.approx(total(want).nll_sum, rel=1e-12)
    for name in ("full", "segment"):
        mean = found.of_documents()[name].mean()
        assert mean == pytest.approx(found.metrics[f"{name}_test_nll"], rel=1e-12)


@pytest.mark.parametrize(("inserted", "num_runs"), [(True, 5), (False, 2)])
def test_no_protocol_runs_twice(inserted, num_runs, monkeypatch):
    model, lengths = make_model("llama", inserted), []

    def spied(run: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def spy(model: PreTrainedModel, ids: torch.Tensor, *others: object, **named: object):
            lengths.append(len(ids))
            return run(model, ids, *others, **named)

        return spy

    for name in ("run_folded", "run_swapped"):
        monkeypatch.setattr(perplexity, name, spied(getattr(perplexity, name)))
    text = text_for(model)
    scores_of(model, text)
    assert sum(lengths) == num_runs * len(text.documents)


def test_a_protocol_that_is_not_asked_for_is_not_run(monkeypatch):
    model, text = make_model("llama", True), text_for(make_model("llama", True))
    every = scores_of(make_model("llama", True), text)
    monkeypatch.setattr(evaluation, "make_rival", lambda *_: pytest.fail("run"))
    monkeypatch.setattr(perplexity, "run_swapped", lambda *_: pytest.fail("run"))
    few = ("full", "segment", "segment_off")
    rival = Rival(segment_length=SEGMENT, num_tokens=2)
    found = evaluate(model, rival, EvalParams(**EVAL), text, few)
    assert set(found.nlls) == set(few) < set(PROTOCOLS) == set(every.nlls)
    assert all(torch.equal(found.nlls[name], every.nlls[name]) for name in few)
    left_out = {f"{name}_test_ppl" for name in set(PROTOCOLS) - set(few)}
    assert every.metrics.keys() - found.metrics.keys() == left_out


@pytest.mark.parametrize("over", [{"layers": []}, {"memory": "off"}])
@pytest.mark.parametrize("inserted", [True, False])
def test_a_form_that_carries_nothing_has_no_rival_and_nothing_to_gain(over, inserted):
    model, infini = tiny_model("llama"), infini_params(**over)
    if inserted:
        insert_infini(model, infini)
    found = evaluate(model, rival_of(model, infini), EvalParams(**EVAL), text_for(model))
    assert found.metrics["state_bytes"] == 0
    for name in ("segment_off", "segment_recent", "segment_swapped", "segment_kv"):
        assert found.metrics[f"{name}_test_ppl"] == found.metrics["segment_test_ppl"]
        assert torch.equal(found.nlls[name], found.nlls["segment"])
    nlls = found.of_documents()
    assert set(gains(nlls, nlls, TITLES).values()) == {0.0}


def test_rows_hold_every_document_and_every_position_of_the_protocols_asked_for():
    model = make_model("llama", True)
    found = scores_of(model, text_for(model))
    documents = rows_of_documents("tuned", found, ["x", "y", "x"])
    assert [row["document"] for row in documents] == [0, 1, 2] * len(found.nlls)
    assert [row["article"] for row in documents] == [0, 1, 0] * len(found.nlls)
    for protocol in found.nlls:
        rows = [row for row in documents if row["protocol"] == protocol]
        assert [row["nll"] for row in rows] == list(found.of_documents()[protocol])
    read = read_document_rows([{k: str(v) for k, v in row.items()} for row in documents])
    assert {k: list(v) for k, v in read.items()} == {
        k: list(v) for k, v in found.of_documents().items()
    }
    positions = rows_of_positions("tuned", found, SEGMENT, ["segment", "full"])
    assert {row["model"] for row in documents + positions} == {"tuned"}
    for protocol in ("segment", "full"):
        rows = [row for row in positions if row["protocol"] == protocol]
        assert [row["position"] for row in rows] == [0, 1, 2, 4]
        sums = sum(row["nll"] * row["num_scored"] for row in rows)
        nll = sums / sum(row["num_scored"] for row in rows)
        assert nll == pytest.approx(found.metrics[f"{protocol}_test_nll"], rel=1e-12)
    assert {row["protocol"] for row in rows_of_positions("tuned", found, SEGMENT)} == {"segment"}


@pytest.mark.parametrize("num_positions", [DOCUMENT, DOCUMENT - 1])
def test_documents_beyond_the_base_s_positions_are_warned_of(num_positions, capsys):
    model = tiny_model("llama", max_position_embeddings=num_positions)
    evaluation.warn_of_length(model, text_for(model))
    warned = capsys.readouterr().err.startswith("warning: documents of 15 tokens exceed the 14")
    assert warned == (num_positions < DOCUMENT)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stride": 11}, r"eval\.stride must be in 1\.\.10 tokens .* got 11"),
        ({"stride": 0}, r"eval\.stride must be in 1\.\.10 tokens .* got 0"),
        ({"sliding_tokens": 1}, r"eval\.sliding_tokens must be at least 2, got 1"),
        ({"documents": 1}, r"eval\.documents must be at least 2, got 1"),
    ],
)
def test_values_under_which_nothing_can_be_scored_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        EvalParams(**EVAL | change)
