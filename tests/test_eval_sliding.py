"""Stage `eval_sliding`: models, protocols, counts and gains among its results."""

import pyarrow.parquet as pq
import pytest
import torch

from infini_retrofit.evaluation.evaluation import PROTOCOLS, Evaluation, rows_of_documents
from stages.eval_sliding import DISTILLED, PROTOCOLS_OF, Scored, add_gains
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


GAINS = {f"gain_over_{other}" for other in ("off", "recent", "swapped", "control", "kv")}
ENDS = {f"{gain}{end}" for gain in GAINS for end in ("_low", "_high")}


def with_gains(full_nll: float, titles: str) -> dict[str, dict[str, float]]:
    """Make up scores of twelve documents: in segments, every model loses 3 nats a token."""
    metrics = {"segment_test_nll": 3.0, "full_test_nll": full_nll}

    def made_up(protocols: tuple[str, ...]) -> Evaluation:
        return Evaluation(dict(metrics), dict.fromkeys(protocols, torch.full((12, 5), 3.0)))

    rows = rows_of_documents("control", made_up(PROTOCOLS), list(titles))
    control = Scored(metrics, rows, [])
    scored = {"distilled": made_up(PROTOCOLS_OF[DISTILLED]), "finetuned": made_up(PROTOCOLS)}
    return add_gains(scored, control, list(titles))


@pytest.mark.parametrize(("full_nll", "has_gap"), [(2.5, True), (3.0, False), (3.25, False)])
def test_without_a_gap_the_share_of_it_is_left_out_and_one_line_says_so(full_nll, has_gap, capsys):
    metrics = with_gains(full_nll, "abcdefghijkl")
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
    metrics = with_gains(2.5, "abcdefghiaaa")
    assert metrics["finetuned"].keys() >= GAINS
    assert not ENDS & metrics["finetuned"].keys()
