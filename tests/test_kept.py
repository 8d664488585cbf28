"""Results kept in the repository: what is written, and that it reads as the experiment did."""

import json
from pathlib import Path

import pytest

from analysis.loading import ABSENT
from infini_retrofit.pipeline.params import read_params
from infini_retrofit.pipeline.schema import leaves
from recipes.__main__ import main
from recipes.experiments import Experiment, is_in_history, list_files, read_file, read_params_of
from recipes.kept import IF_THERE, PLOTTED, keep, kept_experiments
from recipes.overlays import FOLDER, read_overlay, recipe_names
from tests.tiny_checkout import commit, git, make_checkout, store, write
from tests.tiny_project import ROOT

STAGES = {
    "finetune": {
        "deps": [{"path": "stages", "md5": "c"}],
        "outs": [{"path": "models/finetuned", "md5": "new"}],
    },
    "eval_sliding": {
        "deps": [{"path": "stages", "md5": "c"}, {"path": "models/finetuned", "md5": "new"}]
    },
}
LEFT = {"metrics/eval.json": "{}", "metrics/train.json": "{}", **dict.fromkeys(PLOTTED, "a\tb\n")}


def run_experiment(name: str = "x", stages: dict = STAGES, **edits: str) -> Experiment:
    code = git("rev-parse", "HEAD").strip()
    lock = json.dumps({"stages": stages})
    return Experiment(
        store(name, **{**LEFT, "params.yaml": "a: 2\n", "dvc.lock": lock, **edits}), code
    )


def refusal(run: Experiment) -> str:
    with pytest.raises(ValueError, match=r"^x cannot be kept: ") as error:
        keep("x", run)
    assert not Path("results").exists()
    return str(error.value)


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> None:
    """Make a project in a folder of a repository, with code of one file."""
    make_checkout(tmp_path, monkeypatch)
    Path("project").mkdir()
    monkeypatch.chdir("project")
    write(**{"stages/code.py": "pass\n", "dvc.yaml": "stages: {}\n", "params.yaml": "a: 1\n"})
    commit()


def test_what_is_kept_reads_as_the_experiment_does(checkout, capsys):
    write(**{"results/mine/stale": "", "results/other/stale": "", "results/half/params.yaml": ""})
    more = dict.fromkeys(IF_THERE[:2], "of an experiment that has them")
    run = run_experiment("mine", **{"README.md": "no code", "plots/memory_share.tsv": ""}, **more)
    main(["--keep", "mine"])
    assert capsys.readouterr().out == "results/mine\n"
    folder = Path("results/mine")
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert found == {"commit", "params.yaml", *LEFT, *more}
    assert kept_experiments() == {"mine": Experiment(folder, run.code)}
    for path in found - {"commit"}:
        assert read_file(folder, path) == read_file(run.source, path)
    assert list_files(folder, "metrics") == list_files(run.source, "metrics") == sorted(LEFT)[:2]
    assert (read_params_of(folder), read_params_of("HEAD")) == ({"a": 2}, {"a": 1})


@pytest.mark.parametrize("path", ["stages/code.py", "dvc.yaml"])
def test_an_experiment_that_ran_uncommitted_code_is_refused(checkout, path):
    assert f"it ran with changes of {path} that" in refusal(run_experiment(**{path: "changed\n"}))


def test_an_experiment_of_another_history_is_refused(checkout):
    before = git("rev-parse", "HEAD").strip()
    write(**{"stages/code.py": "elsewhere\n"})
    commit()
    elsewhere = run_experiment()
    git("reset", "--quiet", "--hard", before)
    assert f"the code of commit {elsewhere.code[:7]}, which the history" in refusal(elsewhere)


def test_an_experiment_of_some_stages_or_files_alone_is_refused(checkout):
    stages = json.loads(json.dumps(STAGES).replace('"md5": "new"', '"md5": "old"', 1))
    message = refusal(run_experiment(stages=stages))
    assert "its eval_sliding read another models/finetuned than" in message
    write(**{"dvc.lock": json.dumps({"stages": {}})})
    assert f"path 'project/{PLOTTED[0]}' does not exist" in refusal(Experiment(commit(), "HEAD"))


def test_names_that_were_not_run_here_are_refused(checkout):
    for names, got in (([], "none"), (["control"], "some that have not been run: control")):
        with pytest.raises(SystemExit, match=f"--keep needs names of finished .*, got {got}$"):
            main(["--keep", *names])


def test_the_project_s_own_results_are_of_its_recipes_and_its_code(monkeypatch):
    monkeypatch.chdir(ROOT)
    experiments = kept_experiments()
    assert {"infini-all", "v1"} <= experiments.keys()
    for name in experiments.keys() & set(recipe_names()):
        values = ABSENT | dict(leaves(read_params_of(experiments[name].source)))
        overlay = read_overlay(name)
        if overlay.get("infini.memory") == "off" or overlay.get("infini.layers") == []:
            # The form of a memory that is not there is the budget's, and makes no difference.
            own = dict(leaves(read_params(FOLDER / f"{name}.yaml")))
            overlay = {k: v for k, v in overlay.items() if k in own or "infini." not in k}
        wanted = {key: str(value) for key, value in overlay.items()}
        assert {key: str(values[key]) for key in overlay} == wanted, name
    if git("rev-parse", "--is-shallow-repository") == "false\n":
        assert all(is_in_history(experiment.code) for experiment in experiments.values())
