"""Stage `eval_sliding`: models, protocols and counts among its results."""

import math
from dataclasses import replace

import pyarrow.parquet as pq
import pytest

from infini_retrofit.evaluation.protocols import MODELS, PROTOCOLS, Protocol
from infini_retrofit.evaluation.rival import make_rival
from infini_retrofit.scoring.score import segment_runs
from tests.tiny_project import (
    LINEAR,
    SMALL,
    both_projects,
    metrics_of,
    rows_of,
    run_stage,
    write_params,
)

RIVALS = ("selected", "pointer", "dynamic")

@both_projects
def test_memory_and_context_count_in_the_models_that_have_them(name, finished):
    metrics = metrics_of(finished[name], "eval_sliding")
    num_bytes = [metrics[model]["state_bytes"] for model in MODELS]
    without = 0 if name == "linear" else 3 * 4 * 2 * 3 * 10 * 2
    memory = 4 * 2 * (6 * 6 + 6) if name == "linear" else 3 * 4 * 3 * (10 * 10 + 10)
    assert num_bytes == [without, without, without + memory, without + memory]
    different = {"base": 2, "control": 2, "distilled": 2, "finetuned": 5}
    for model, numbers in metrics.items():
        values = {value for key, value in numbers.items() if "segment" in key and "_ppl" in key}
        assert len(values) == different[model], model
    assert len({metrics[model]["segment_test_nll"] for model in MODELS}) == len(MODELS)


@both_projects
def test_the_gap_is_the_control_s_and_articles_are_counted_by_their_titles(name, finished):
    metrics = metrics_of(finished[name], "eval_sliding")
    path, number = finished[name] / "data/longdocs/test.parquet", SMALL["eval.documents"]
    titles = pq.read_table(path, columns=["title"])["title"].to_pylist()[:number]
    assert {numbers["num_articles"] for numbers in metrics.values()} == {len(set(titles))}
    control = metrics["control"]
    gap = control["segment_test_nll"] - control["full_test_nll"]
    assert control["gap_test_nats"] == gap > 0
    won = control["segment_test_nll"] - metrics["finetuned"]["segment_test_nll"]
    assert metrics["finetuned"]["gap_recovered"] == pytest.approx(won / gap)


def test_where_nothing_was_distilled_the_finetuned_is_scored_alone(project):
    before = metrics_of(project, "eval_sliding")
    write_params(project, SMALL | LINEAR | {"distill.epochs": 0})
    run_stage("eval_sliding")
    after = metrics_of(project, "eval_sliding")
    assert after == {model: before[model] for model in ("base", "control", "finetuned")}
    drawn = rows_of(project, "eval_sliding") + rows_of(project, "eval_documents")
    assert {row["model"] for row in drawn} == after.keys()


def test_a_protocol_is_one_entry_of_the_table(project, monkeypatch):
    """Of the segment before, only one token crosses a border."""
    sink = Protocol(
        run=lambda model, setting: segment_runs(
            make_rival(model, replace(setting.rival, num_tokens=1)),
            setting.text.documents,
            setting.rival.segment_length,
        ),
        models=("control", "finetuned"),
        by_position=("finetuned",),
        gain="sink",
        gain_models=("model", "control"),
    )
    before = metrics_of(project, "eval_sliding")
    monkeypatch.setitem(PROTOCOLS, "segment_sink", sink)
    run_stage("control_eval")
    run_stage("eval_sliding")
    after, key = metrics_of(project, "eval_sliding"), "segment_sink_test_ppl"
    new = {m: numbers.keys() - before[m].keys() for m, numbers in after.items()}
    keys, gain = {key, "key_token_nll_sink"}, {"gain_over_sink"}
    assert new == {"base": set(), "control": keys, "distilled": set(), "finetuned": keys | gain}
    best = min(after[model][key] for model in ("control", "finetuned"))
    won = math.log(best / after["finetuned"]["segment_test_ppl"])
    assert after["finetuned"]["gain_over_sink"] == pytest.approx(won)
    assert all(after[model].items() >= before[model].items() for model in MODELS)
    for plot, models in (("documents", {"control", "finetuned"}), ("positions", {"finetuned"})):
        rows = rows_of(project, f"eval_{plot}")
        assert {row["model"] for row in rows if row["protocol"] == "segment_sink"} == models


def test_rivals_that_are_named_add_scores_and_change_none(project):
    before = metrics_of(project, "eval_sliding")
    write_params(project, SMALL | LINEAR | {"eval.rivals": list(RIVALS)})
    for stage in ("baseline_eval", "control_eval", "eval_sliding"):
        run_stage(stage)
    after = metrics_of(project, "eval_sliding")
    assert all(after[model].items() >= before[model].items() for model in MODELS)
    new = {model: after[model].keys() - before[model].keys() for model in MODELS}
    scores = {name: {f"segment_{name}_test_ppl", f"key_token_nll_{name}"} for name in RIVALS}
    assert new["control"] == set().union(*scores.values()) | {"dynamic_lr"}
    costs = {f"{n}_{what}" for n in ("kv", *RIVALS) for what in ("state_bytes", "operations")}
    assert new["base"] == new["control"] | costs
    gains = {f"gain_over_{name}" for name in RIVALS}
    assert new["distilled"] == gains
    assert new["finetuned"] == scores["pointer"] | gains | {"gain_beside_pointer"}
    own = after["finetuned"]["segment_test_ppl"]
    for name in RIVALS:
        won = math.log(after["control"][f"segment_{name}_test_ppl"] / own)
        assert after["finetuned"][f"gain_over_{name}"] == pytest.approx(won)
    both = [after[model]["segment_pointer_test_ppl"] for model in ("control", "finetuned")]
    beside = after["finetuned"]["gain_beside_pointer"]
    assert beside == pytest.approx(math.log(both[0] / both[1]))
