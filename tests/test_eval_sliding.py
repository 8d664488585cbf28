"""What stage `eval_sliding` leaves of the tiny projects: whose numbers, and what they count."""

import pyarrow.parquet as pq
import pytest

from tests.tiny_project import (
    LINEAR,
    SMALL,
    both_projects,
    metrics_of,
    rows_of,
    run_stage,
    write_params,
)

MODELS = ("base", "control", "distilled", "finetuned")


@both_projects
def test_memory_and_context_count_in_the_models_that_have_them(name, finished):
    metrics = metrics_of(finished[name], "eval_sliding")
    num_bytes = [metrics[model]["state_bytes"] for model in MODELS]
    without = 0 if name == "linear" else 3 * 4 * 2 * 3 * 10 * 2
    memory = 4 * 2 * (6 * 6 + 6) if name == "linear" else 3 * 4 * 3 * (10 * 10 + 10)
    assert num_bytes == [0, without, without + memory, without + memory]
    different = {"base": 2, "control": 2, "distilled": 2, "finetuned": 5}
    for model, numbers in metrics.items():
        values = {value for key, value in numbers.items() if "segment" in key and "_ppl" in key}
        assert len(values) == different[model], model
    assert len({metrics[model]["segment_test_nll"] for model in MODELS}) == len(MODELS)


def test_where_nothing_was_distilled_the_finetuned_is_scored_alone(project):
    before = metrics_of(project, "eval_sliding")
    write_params(project, SMALL | LINEAR | {"distill.epochs": 0})
    run_stage("eval_sliding")
    after = metrics_of(project, "eval_sliding")
    assert after == {model: before[model] for model in ("base", "control", "finetuned")}
    drawn = rows_of(project, "eval_sliding") + rows_of(project, "eval_documents")
    assert {row["model"] for row in drawn} == after.keys()


@both_projects
def test_the_gap_is_counted_from_the_control(name, finished):
    metrics = metrics_of(finished[name], "eval_sliding")
    control = metrics["control"]
    for model in ("distilled", "finetuned"):
        won = control["segment_test_nll"] - metrics[model]["segment_test_nll"]
        gap = control["segment_test_nll"] - control["full_test_nll"]
        assert control["gap_test_nats"] == gap > 0
        assert metrics[model]["gap_recovered"] == pytest.approx(won / gap)


@both_projects
def test_articles_are_counted_by_their_titles(name, finished):
    path, number = finished[name] / "data/longdocs/test.parquet", SMALL["eval.documents"]
    titles = pq.read_table(path, columns=["title"])["title"].to_pylist()[:number]
    for model, numbers in metrics_of(finished[name], "eval_sliding").items():
        assert numbers["num_articles"] == len(set(titles)), model


@both_projects
def test_positions_are_of_each_model_s_own_protocols(name, finished):
    drawn = {(row["model"], row["protocol"]) for row in rows_of(finished[name], "eval_positions")}
    assert drawn == {
        ("base", "segment"),
        *(("control", protocol) for protocol in ("segment", "full", "segment_kv")),
        ("finetuned", "segment"),
        *(("finetuned", f"segment_{protocol}") for protocol in ("off", "recent", "swapped", "kv")),
    }
