"""Which score stands under which name."""

import pytest
from transformers import PreTrainedModel

from infini_retrofit import evaluation
from infini_retrofit.evaluation import EvalParams, evaluate, gap_recovered
from infini_retrofit.perplexity import score_full, score_segments, score_sliding, total
from infini_retrofit.retrofit import FAMILIES, insert_infini, make_rival
from tests.reference import infini_params
from tests.tiny import random_ids, tiny_model

SEGMENT, DOCUMENT, STREAM = 5, 15, 47
EVAL = {"window": 11, "stride": 4, "sliding_tokens": STREAM, "documents": 3}
INFINI = infini_params(layers=[0, 2], local_context=2)
both_families = pytest.mark.parametrize("family", sorted(FAMILIES))


def text_for(model: PreTrainedModel) -> evaluation.TestText:
    documents = random_ids(model.config.vocab_size, 3, DOCUMENT)
    return evaluation.TestText(random_ids(model.config.vocab_size, STREAM), documents)


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
    own, t2 = map(total, score_segments(model, text.documents, SEGMENT, with_t2=True))
    want = {
        "sliding": score_sliding(model, text.stream, 11, 4),
        "full": total(score_full(model, text.documents)),
        "segment": own,
        "t2": t2,
        "segment_off": total(score_segments(model, text.documents, SEGMENT, "off")[0]),
        "segment_swapped": total(score_segments(model, text.documents, SEGMENT, "swapped")[0]),
        "segment_kv": total(score_segments(rival, text.documents, SEGMENT)[0]),
    }
    metrics = evaluate(model, INFINI, EvalParams(**EVAL), text)
    num_bytes = 2 * INFINI_BYTES[family] if inserted else 0
    assert metrics == {f"{name}_test_ppl": pytest.approx(s.ppl) for name, s in want.items()} | {
        "full_test_nll": pytest.approx(want["full"].nll),
        "segment_test_nll": pytest.approx(want["segment"].nll),
        "state_bytes": num_bytes,
        "num_documents": len(text.documents),
    }
    different = {round(score.nll, 4) for score in want.values()}
    assert len(different) == (len(want) if inserted else len(want) - 2)


# Memory in float32, and two tokens' keys and values at two bytes a channel.
INFINI_BYTES = {
    "llama": 4 * 2 * (6 * 6 + 6) + 2 * 2 * 2 * 6 * 2,
    "gpt_neox": 4 * 3 * (10 * 10 + 10) + 2 * 2 * 3 * 10 * 2,
}


@pytest.mark.parametrize(
    ("segment_nll", "share"), [(3.0, 0.0), (2.5, 0.5), (2.0, 1.0), (3.5, -0.5)]
)
def test_the_gap_runs_from_the_control_s_segments_to_its_full_attention(segment_nll, share):
    control = {"segment_test_nll": 3.0, "full_test_nll": 2.0}
    model = {"segment_test_nll": segment_nll, "full_test_nll": 9.0}
    assert gap_recovered(model, control) == pytest.approx(share)


@pytest.mark.parametrize("full_nll", [3.0, 3.5])
def test_where_full_attention_is_no_better_there_is_no_gap_to_recover(full_nll):
    control = {"segment_test_nll": 3.0, "full_test_nll": full_nll}
    with pytest.raises(ValueError, match=r"^gap_recovered needs documents .* got a gap of -?0\."):
        gap_recovered(control, control)


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
