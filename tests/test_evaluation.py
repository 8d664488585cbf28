"""Which score stands under which name, and that no run is repeated."""

from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedModel

from infini_retrofit.evaluation.evaluation import (
    document_rows,
    evaluate,
    position_rows,
    score_positions,
)
from infini_retrofit.evaluation.gains import gains
from infini_retrofit.evaluation.key_tokens import KeyTokens, read_key_tokens
from infini_retrofit.evaluation.protocols import (
    PROTOCOLS,
    EvalParams,
    Setting,
    carrying_runs,
    full_runs,
    score_full,
    score_sliding,
)
from infini_retrofit.evaluation.rival import make_rival, make_windowed, rival_of
from infini_retrofit.layer.form import InfiniParams
from infini_retrofit.model.retrofit import insert_infini, state_bytes
from infini_retrofit.pipeline import tokens
from infini_retrofit.pipeline.files import write_sealed
from infini_retrofit.scoring.score import (
    Score,
    next_token_nlls,
    score_runs,
    score_segments,
    segment_runs,
    t2_nlls,
    total,
)
from tests.reference import both_families, infini_params
from tests.tiny import ids_for, tiny_model

SEGMENT, DOCUMENT, STREAM = 5, 15, 47
TITLES = ["a", "b", "a"]
EVAL = {"window": 11, "stride": 4, "sliding_tokens": STREAM, "documents": 3}
INFINI = infini_params(layers=[0, 2], local_context=2)
OTHERS = {f"segment_{name}" for name in ("off", "recent", "swapped", "kv")}
# Of a layer: memory in float32, and a token's keys and values at two bytes a channel.
MEMORY_BYTES = {"llama": 4 * 2 * (6 * 6 + 6), "gpt_neox": 4 * 3 * (10 * 10 + 10)}
CONTEXT_BYTES = {"llama": 2 * 2 * 6 * 2, "gpt_neox": 2 * 3 * 10 * 2}


def make(
    family: str = "llama", inserted: bool = True, infini: InfiniParams = INFINI
) -> tuple[PreTrainedModel, Setting]:
    model = tiny_model(family)
    if inserted:
        insert_infini(model, infini)
    text = tokens.TestText(ids_for(model, 1, STREAM)[0], ids_for(model, 3, DOCUMENT), TITLES)
    return model, Setting(EvalParams(**EVAL), text, rival_of(model, infini))


@both_families
@pytest.mark.parametrize("inserted", [True, False])
def test_every_name_stands_for_its_own_protocol(family, inserted):
    model, setting = make(family, inserted)
    documents, rival = setting.text.documents, make_rival(model, setting.rival)
    own = make_windowed(model, setting.rival)  # a base, in the retrofit's window
    runs = list(segment_runs(own, documents, SEGMENT))
    want = {
        "full": score_full(model, documents),
        "t2": [Score.of(t2_nlls(own, *run, SEGMENT)) for run in runs],
        "segment": score_segments(own, documents, SEGMENT),
        "segment_off": score_segments(own, documents, SEGMENT, "off"),
        "segment_recent": score_segments(own, documents, SEGMENT, "recent"),
        "segment_swapped": score_segments(own, documents, SEGMENT, "swapped"),
        "segment_kv": score_segments(rival, documents, SEGMENT),
    }
    totals = {name: total(scores) for name, scores in want.items()}
    totals["sliding"] = score_sliding(model, setting.text.stream, 11, 4)
    nlls = torch.stack([next_token_nlls(own, *run) for run in runs])
    full = torch.stack([next_token_nlls(model, *run) for run in full_runs(model, documents)])
    is_key = nlls - full > 1
    report = evaluate("finetuned", model, setting)
    assert report.key_tokens.mask.equal(is_key)
    shorts = ("full", "segment", "off", "recent", "swapped", "kv")
    assert {k for k in report.metrics if "key" in k} == {
        "num_key_tokens",
        *(f"key_token_nll_{short}" for short in shorts),
    }
    assert report.metrics["num_key_tokens"] == is_key.sum()
    assert report.metrics["key_token_nll_full"] == pytest.approx(full[is_key].mean().item())
    assert report.metrics["key_token_nll_segment"] == pytest.approx(nlls[is_key].mean().item())
    given = replace(setting, key_tokens=KeyTokens(num_scored=DOCUMENT - 1, positions=[[3], [], []]))
    of_one = evaluate("finetuned", model, given).metrics["key_token_nll_segment"]
    assert of_one == pytest.approx(nlls[0, 3].item())
    assert {k: v for k, v in report.metrics.items() if "key" not in k} == {
        f"{name}_test_ppl": pytest.approx(score.ppl) for name, score in totals.items()
    } | {
        "full_test_nll": pytest.approx(totals["full"].nll),
        "segment_test_nll": pytest.approx(totals["segment"].nll),
        "state_bytes": state_bytes(own),
        "num_documents": 3,
        "num_articles": 2,
    }
    assert {name: list(nlls) for name, nlls in report.document_nlls().items()} == {
        name: pytest.approx([score.nll for score in scores]) for name, scores in want.items()
    }
    window = 2 * 2 * CONTEXT_BYTES[family]  # of a base too
    assert state_bytes(own) == 2 * MEMORY_BYTES[family] * inserted + window
    assert evaluate("finetuned", model, setting) == report  # the model stays as it is
    different = {round(score.nll, 4) for score in totals.values()}
    assert len(different) == (len(totals) if inserted else len(totals) - 3)


@pytest.mark.parametrize("over", [{"layers": []}, {"memory": "off"}])
@pytest.mark.parametrize("inserted", [True, False])
def test_a_form_that_carries_nothing_has_no_rival_and_nothing_to_gain(over, inserted):
    report = evaluate("finetuned", *make(inserted=inserted, infini=infini_params(**over)))
    assert report.metrics["state_bytes"] == 0
    nlls = report.document_nlls()
    for name in OTHERS:
        assert list(nlls[name]) == list(nlls["segment"])
    assert set(gains(nlls, nlls, TITLES).values()) == {0.0}


def test_rows_hold_every_document_and_the_positions_that_the_table_names():
    nlls = {name: torch.rand(3, DOCUMENT - 1) for name in PROTOCOLS}
    rows = document_rows("control", nlls, ["x", "y", "x"])
    assert [row["document"] for row in rows] == [0, 1, 2] * len(nlls)
    assert [row["article"] for row in rows] == [0, 1, 0] * len(nlls)
    rows = position_rows("control", nlls, SEGMENT)
    wanted = {
        (name, at): score.nll
        for name in ("segment", "full", "segment_kv")
        for at, score in score_positions(nlls[name], SEGMENT).items()
    }
    assert {(row["protocol"], row["position"]): row["nll"] for row in rows} == wanted


@pytest.mark.parametrize(
    ("length", "begins"), [(5, [0, 1, 2, 4]), (3, [0, 1, 2]), (15, [0, 1, 2, 4, 8])]
)
def test_positions_are_those_of_the_token_that_predicts_and_lose_no_token(length, begins):
    nlls = torch.rand(2, DOCUMENT - 1)
    found = score_positions(nlls, length)
    assert list(found) == begins
    for begin, end in zip(begins, [*begins[1:], length], strict=True):
        columns = [t for t in range(DOCUMENT - 1) if begin <= t % length < end]
        assert found[begin].num_scored == 2 * len(columns)
        assert found[begin].nll == pytest.approx(nlls[:, columns].double().mean().item())


@pytest.mark.parametrize(
    ("num_scored", "positions", "fault"),
    [
        (14, [[0], [13]], "must be of 3 documents with 14 scored tokens each, got 2 with 14"),
        (13, [[0], [], []], "must be of 3 documents with 14 scored tokens each, got 3 with 13"),
        (14, [[0], [14], []], r"must name tokens in 0\.\.13"),
    ],
)
def test_key_tokens_of_other_documents_are_refused(num_scored, positions, fault, tmp_path):
    path, documents = tmp_path / "key_tokens.json", torch.zeros(3, DOCUMENT, dtype=torch.long)
    good = KeyTokens(num_scored=14, positions=[[0, 13], [], [5]])
    write_sealed(path, good)
    assert read_key_tokens(path, documents) == good
    write_sealed(path, replace(good, num_scored=num_scored, positions=positions))
    with pytest.raises(ValueError, match=f"key_tokens.json {fault}.*dvc repro baseline_eval"):
        read_key_tokens(path, documents)


@both_families
def test_keys_and_values_of_no_more_tokens_than_a_document_has_are_carried(family):
    base, setting = make(family, inserted=False)
    documents = setting.text.documents
    carrying = carrying_runs(base, replace(setting.rival, num_tokens=2**40), documents)
    whole = [score.nll for score in score_full(base, documents)]
    assert [score.nll for score in score_runs(base, carrying)] == pytest.approx(whole)
