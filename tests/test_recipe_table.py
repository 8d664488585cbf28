"""The table of finished experiments, made up and real."""

import re
from typing import Any

import pytest

from analysis import __main__ as command_line
from analysis import reading
from analysis.table import COLUMNS, LABELS, MEMORY, markdown
from recipes.finished import finished
from tests.tiny_checkout import make_pipeline, python_m

pytestmark = pytest.mark.usefixtures("nothing_kept")

MODEL = {
    "sliding_test_ppl": 23.456,
    "full_test_ppl": 23.6,
    "segment_test_ppl": 29.1,
    "segment_off_test_ppl": 30.2,
    "segment_recent_test_ppl": 30.1,
    "segment_swapped_test_ppl": 29.9,
    "segment_kv_test_ppl": 28.8,
    "t2_test_ppl": 20118.6,
    "gap_recovered": 0.0864,
    "gain_over_control": 0.0189,
    "gain_over_off": 0.029,
    "gain_over_recent": -0.0007,
    "gain_over_swapped": 0.056,
    "gain_over_kv": -0.1269,
    "state_bytes": 1497600,
}
CONTROL = {"segment_test_ppl": 29.8, "segment_kv_test_ppl": 28.2}
METRICS = {
    "eval_sliding": {"finetuned": MODEL, "control": CONTROL},
    "distill": {"num_trained_tokens": 262144},
    "finetune": {"num_trained_tokens": 327680, "num_trainable_parameters": 26542350},
}
ROW = [
    *("infini-all", "23.46", "23.60", "29.10", "29.80", "30.20", "30.10", "29.90", "28.80"),
    *("28.20", "20,119", "8.6%", "+0.0189", "+0.0290", "-0.0007", "+0.0560", "-0.1269"),
    *("1,497,600", "26,542,350", "589,824"),
]


def cells(line: str) -> list[str]:
    """Return what a line of a table holds."""
    return [cell.strip() for cell in line.strip("|").split("|")]


def experiment(
    name: str, metrics: dict[str, Any], day: int = 1, state: str | None = None
) -> dict[str, Any]:
    """Make an experiment as DVC shows it; a state is that of one which is queued or running."""
    files = {f"metrics/{file}.json": {"data": values} for file, values in metrics.items()}
    data = {"timestamp": f"2026-01-{day:02}T00:00:00", "metrics": files, "params": {}}
    executor = state and {"state": state, "name": "dvc-task", "local": {}}
    return {"name": name, "revs": [{"rev": "ab12", "data": data}], "executor": executor}


def commit(*experiments: dict[str, Any]) -> dict[str, Any]:
    """Make a commit as DVC shows it."""
    return {"rev": "cd34", "name": "main", "data": {}, "experiments": list(experiments) or None}


def test_a_finished_experiment_is_a_row():
    experiments = finished([commit(), commit(experiment("infini-all", METRICS))])
    header, _, row = map(cells, markdown(experiments, ["infini-all"]).splitlines())
    assert row == ROW
    assert header == ["recipe", *(column.title for column in MEMORY)]
    assert header[:6] == ["recipe", "sliding", "full", "segment", "its control", "memory off"]


@pytest.mark.parametrize("file", METRICS)
def test_what_is_missing_is_a_dash_and_the_rest_stays(file):
    rest = {name: values for name, values in METRICS.items() if name != file}
    experiments = finished([commit(experiment("infini-all", rest))])
    found = cells(markdown(experiments, ["infini-all"]).splitlines()[2])
    pairs = zip(found, ROW, strict=True)
    changed = {i for i, (cell, before) in enumerate(pairs) if cell != before}
    expected = {"eval_sliding": set(range(1, 18)), "distill": {19}, "finetune": {18, 19}}
    assert changed == expected[file]
    tokens = {"distill": "327,680", "finetune": "262,144"}
    assert found[-1] == tokens.get(file, "589,824")


def test_a_metric_that_dvc_could_not_read_is_a_dash():
    shown = experiment("infini-all", METRICS)
    shown["revs"][0]["data"]["metrics"]["metrics/eval_sliding.json"] = {"error": {"msg": "bad"}}
    row = cells(markdown(finished([commit(shown)]), ["infini-all"]).splitlines()[2])
    assert row == ["infini-all", *["-"] * 17, "26,542,350", "589,824"]


@pytest.mark.parametrize("state", ["queued", "running", "failed"])
def test_an_experiment_that_has_not_finished_is_none(state):
    assert finished([commit(experiment("infini-all", METRICS, state=state))]) == {}
    assert finished([commit(experiment("infini-all", METRICS, state="success"))])


@pytest.mark.parametrize("newer_first", [True, False])
def test_the_newest_experiment_of_a_name_counts(newer_first):
    old = experiment("parallel", {"finetune": {"num_trained_tokens": 1}}, day=2)
    new = experiment("parallel", {"finetune": {"num_trained_tokens": 2}}, day=10)
    commits = [commit(new), commit(old)] if newer_first else [commit(old), commit(new)]
    (newest,) = finished(commits).values()
    assert newest.metrics["metrics/finetune.json"]["data"]["num_trained_tokens"] == 2


def test_without_names_the_recipes_that_have_run_are_shown(capsys, monkeypatch):
    shown = [experiment(name, METRICS) for name in ("parallel", "my-own-name", "infini-all")]
    monkeypatch.setattr(reading, "all_experiments", lambda: [commit(*shown)])
    command_line.main(["--table"])
    rows = list(map(cells, capsys.readouterr().out.splitlines()[2:]))
    assert rows == [ROW, ["parallel", *ROW[1:]]]
    command_line.main(["--table", "my-own-name", "control"])
    rows = list(map(cells, capsys.readouterr().out.splitlines()[2:]))
    assert rows == [["my-own-name", *ROW[1:]], ["control", *["-"] * len(MEMORY)]]


def test_other_columns_show_what_labels_do(capsys, monkeypatch):
    models = {
        "distilled": {"sliding_test_ppl": 25.63, "t2_test_ppl": 18739.4},
        "finetuned": {"sliding_test_ppl": 94.32, "segment_test_ppl": 127.5, "t2_test_ppl": 5701.2},
        "control": {"sliding_test_ppl": 30.61, "t2_test_ppl": 999.25},
    }
    epochs = {"best_epoch": 4, "epochs_run": 5}
    metrics = {"eval_sliding": models, "distill": {"val_loss": 0.17833}, "finetune": epochs}
    shown = [commit(experiment("v1", metrics))]
    monkeypatch.setattr(reading, "all_experiments", lambda: shown)
    command_line.main(["--table", "--columns", "labels"])
    header, _, row = map(cells, capsys.readouterr().out.splitlines())
    assert header == ["recipe", *(column.title for column in LABELS)]
    finetuned, control = ["94.32", "127.50", "5,701"], ["30.61", "999.25"]
    assert row == ["v1", "0.1783", "25.63", "18,739", *finetuned, *control, "4", "5"]


def test_a_half_of_the_columns_is_shown_alone(capsys, monkeypatch):
    monkeypatch.setattr(reading, "all_experiments", lambda: [commit(experiment("v1", METRICS))])
    halves = []
    for half in ("protocols", "gains"):
        command_line.main(["--table", "--columns", half])
        header, _, row = map(cells, capsys.readouterr().out.splitlines())
        assert header[1:] == [column.title for column in COLUMNS[half]]
        halves += row[1:]
    assert halves == ROW[1:]


@pytest.mark.parametrize("line", ["v1 --columns labels --against", "--columns memory --repeats"])
def test_columns_without_a_table_are_refused(line, capsys):
    with pytest.raises(SystemExit, match="2"):
        command_line.main(line.split())
    assert re.search(r"error: --columns \w+ must come with --table: .*\n$", capsys.readouterr().err)


def test_with_nothing_to_show_it_says_so(monkeypatch):
    monkeypatch.setattr(reading, "all_experiments", lambda: [commit()])
    with pytest.raises(SystemExit, match="no recipe has been run yet"):
        command_line.main(["--table"])


def test_a_name_that_stands_for_nothing_is_refused(monkeypatch):
    monkeypatch.setattr(reading, "all_experiments", lambda: [commit()])
    with pytest.raises(SystemExit, match=r"recipes or experiments, got infini-al$"):
        command_line.main(["--table", "control", "infini-al"])


def test_recipes_run_as_real_experiments_one_after_another(tmp_path, monkeypatch):
    make_pipeline(tmp_path, monkeypatch, first="# sets a\na: 2\n", second="# sets b\nb: 3\n")
    code, output = python_m("recipes", "first", "second")
    assert code == 0, output
    assert "\ndvc exp run -n second -S a=1 -S b=3\n" in output
    code, output = python_m("recipes", "second", "first", "-S", "a=7")
    assert code == 1
    assert "error: experiments that exist already: first, second." in output
    code, output = python_m("recipes", "first", "second", "-S", "b=nothing", "--force")
    assert code != 0
    assert "error: first failed; left to run: second" in output
    code, output = python_m("recipes", "second", "--name", "third", "--temp", "-S", "a=4")
    assert code == 0, output
    code, output = python_m("analysis", "--table", "first", "second", "third")
    assert code == 0, output
    rows = list(map(cells, output.splitlines()[2:]))
    assert [(row[0], row[3]) for row in rows] == [
        *(("first", "21.00"), ("second", "13.00"), ("third", "43.00")),
    ]
