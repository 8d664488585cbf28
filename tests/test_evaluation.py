"""Which score stands under which name, and which forms fit a base."""

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from infini_retrofit import evaluation, perplexity
from infini_retrofit.evaluation import (
    EvalParams,
    evaluate,
    rows_of_documents,
    rows_of_positions,
)
from infini_retrofit.families import FAMILIES
from infini_retrofit.gains import gains
from infini_retrofit.labels import t2_nlls
from infini_retrofit.perplexity import (
    Score,
    score_full,
    score_segments,
    score_sliding,
    segment_runs,
    total,
)
from infini_retrofit.retrofit import insert_infini, make_rival
from tests.reference import infini_params
from tests.tiny import random_ids, tiny_model

SEGMENT, DOCUMENT, STREAM = 5, 15, 47
TITLES = ["a", "b", "a"]
EVAL = {"window": 11, "stride": 4, "sliding_tokens": STREAM, "documents": 3}
INFINI = infini_params(layers=[0, 2], local_context=2)
both_families = pytest.mark.parametrize("family", sorted(FAMILIES))


def text_for(model: PreTrainedModel) -> evaluation.TestText:
    documents = random_ids(model.config.vocab_size, 3, DOCUMENT)
    stream = random_ids(model.config.vocab_size, STREAM)
    return evaluation.TestText(stream, documents, TITLES)


def make_model(family: str, inserted: bool) -> PreTrainedModel:
    model = tiny_model(family)
    if inserted:
        insert_infini(model, INFINI)
    return model


@both_families
@pytest.mark.parametrize("inserted", [True, False])
def test_every_name_stands_for_its_own_protocol(family, inserted):
    model, rival = make_model(family, inserted), make_model(family, inserted)
    make_rival(rival, INFINI)
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
    metrics = evaluate(model, INFINI, EvalParams(**EVAL), text).metrics
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
    found = evaluate(model, INFINI, EvalParams(**EVAL), text)
    by_document = found.of_documents("segment_off")
    assert list(by_document) == pytest.approx([score.nll for score in want])
    assert len({round(nll, 3) for nll in by_document}) == len(want)
    num_scored = DOCUMENT - 1
    assert (by_document * num_scored).sum() == pytest.approx(total(want).nll_sum, rel=1e-12)
    for name in ("full", "segment"):
        mean = found.of_documents(name).mean()
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
    evaluate(model, INFINI, EvalParams(**EVAL), text)
    assert sum(lengths) == num_runs * len(text.documents)


@pytest.mark.parametrize("over", [{"layers": []}, {"memory": "off"}])
@pytest.mark.parametrize("inserted", [True, False])
def test_a_form_that_carries_nothing_has_no_rival_and_nothing_to_gain(over, inserted):
    model, infini = tiny_model("llama"), infini_params(**over)
    if inserted:
        insert_infini(model, infini)
    found = evaluate(model, infini, EvalParams(**EVAL), text_for(model))
    assert found.metrics["state_bytes"] == 0
    for name in ("segment_off", "segment_recent", "segment_swapped", "segment_kv"):
        assert found.metrics[f"{name}_test_ppl"] == found.metrics["segment_test_ppl"]
        assert torch.equal(found.nlls[name], found.nlls["segment"])
    assert set(gains(found, found, TITLES).values()) == {0.0}


def test_rows_hold_every_document_and_every_position_of_the_protocols_asked_for():
    model = make_model("llama", True)
    found = evaluate(model, INFINI, EvalParams(**EVAL), text_for(model))
    documents = rows_of_documents("tuned", found, ["x", "y", "x"])
    assert [row["document"] for row in documents] == [0, 1, 2] * len(found.nlls)
    assert [row["article"] for row in documents] == [0, 1, 0] * len(found.nlls)
    for protocol in found.nlls:
        rows = [row for row in documents if row["protocol"] == protocol]
        assert [row["nll"] for row in rows] == list(found.of_documents(protocol))
    positions = rows_of_positions("tuned", found, SEGMENT, ["segment", "full"])
    assert {row["model"] for row in documents + positions} == {"tuned"}
    for protocol in ("segment", "full"):
        rows = [row for row in positions if row["protocol"] == protocol]
        assert [row["position"] for row in rows] == [0, 1, 2, 4]
        sums = sum(row["nll"] * row["num_scored"] for row in rows)
        nll = sums / sum(row["num_scored"] for row in rows)
        assert nll == pytest.approx(found.metrics[f"{protocol}_test_nll"], rel=1e-12)
    assert {row["protocol"] for row in rows_of_positions("tuned", found, SEGMENT)} == {"segment"}


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ({"layers": [0, 3]}, r"infini\.layers must be in -3\.\.2 for a base of 3 layers, got 3"),
        (
            {"feature_map": "hedgehog", "num_features": 14},
            r"infini\.num_features must be at most 12 for heads of 6 channels, got 14",
        ),
    ],
)
def test_a_form_that_does_not_fit_the_base_is_refused(over, message):
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=message):
        evaluation.check_fit(model, infini_params(**over), text_for(model))


@pytest.mark.parametrize("num_positions", [DOCUMENT, DOCUMENT - 1])
def test_documents_beyond_the_base_s_positions_are_warned_of(num_positions, capsys):
    model = tiny_model("llama", max_position_embeddings=num_positions)
    evaluation.check_fit(model, INFINI, text_for(model))
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
