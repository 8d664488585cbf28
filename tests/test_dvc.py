"""DVC on a tiny project in a git repository: experiments, and what an edit runs again."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from dvc.repo import Repo

from tests.tiny_checkout import keep_settings_apart
from tests.tiny_project import ROOT, STAGES, contents

CODE = ("infini_retrofit", "stages", "analysis", "recipes", ".dvc/plots", ".dvc/config", "dvc.yaml")
CODE += (".dvcignore", ".gitignore", "data/.gitignore", "models/.gitignore", "report/.gitignore")


@pytest.fixture
def repository(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished project with the code that made it, its results committed to git and DVC."""
    for name in CODE:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        copy(ROOT / name, project / name)
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    keep_settings_apart(tmp_path, monkeypatch)
    run("git", "init", "--quiet")
    run("dvc", "commit", "--force")
    run("git", "add", "--all")
    run("git", "commit", "--quiet", "--message", "A finished project")
    return project


def run(*command: str, succeeds: bool = True) -> str:
    process = subprocess.run(command, capture_output=True, text=True)
    assert (process.returncode == 0) is succeeds, process.stdout + process.stderr
    return process.stdout + (process.stderr if not succeeds else "")


def stages_run(output: str) -> list[str]:
    return re.findall(r"^Running stage '(\w+)':$", output, re.M)


AFTER_DISTILLING = ["distill", "finetune", "eval_sliding", "eval_longcontext", "report"]


def test_an_experiment_runs_what_it_must_and_shows_what_it_changed(repository):
    assert json.loads(run("dvc", "status", "--json")) == {}
    before = contents(repository / "models")
    output = run("dvc", "exp", "run", "--set-param", "distill.epochs=2", "--name", "short")
    assert stages_run(output) == ["check_params", *AFTER_DISTILLING]
    assert "| finetuned " in output.split("Running stage 'report':")[1]
    skipped = re.findall(r"^Stage '(\w+)' didn't change, skipping$", output, re.M)
    assert set(skipped) == set(STAGES) - set(stages_run(output))
    after = contents(repository / "models")
    changed = {Path(name).parts[0] for name, _ in before.items() ^ after.items()}
    assert changed == {"distilled", "finetuned"}
    metrics = json.loads(run("dvc", "metrics", "diff", "--json"))
    assert set(metrics) == {"metrics/summary.json"}
    assert {"ppl", "gain"} <= set(metrics["metrics/summary.json"])
    assert not {"base", "control", "full"} & set(metrics["metrics/summary.json"])
    rows = [line.split() for line in Path("report/report.md").read_text().splitlines()]
    assert ["|", "distill.epochs", "|", "3", "|", "2", "|"] in rows
    noted = {path.name for path in Path(".dvc/tmp/seconds").iterdir()}
    readers = [*json.loads(Path("metrics/eval_longcontext.json").read_text())]
    assert noted == {*stages_run(output), *(f"eval_longcontext.{name}" for name in readers)}
    assert {row[1]: row[3] for row in rows if len(row) == 5}["prepare_base"] == "-"
    assert "short" in run("dvc", "exp", "list", "--name-only")

    before = contents(repository)
    output = run("dvc", "exp", "run", "-S", "distill.epochs=-1", succeeds=False)
    assert stages_run(output) == ["check_params"]
    assert "error: distill.epochs must be greater than or equal to 0, got -1\n" in output
    after = contents(repository)
    for folder in ("models", "metrics", "plots", "data/wikitext", "data/longdocs"):
        kept = {name for name in before if name.startswith(folder + "/")}
        assert kept, folder
        assert all(after.get(name) == before[name] for name in kept)


TRAINING = {"distill", "finetune", "finetune_control"}
LIBRARY = sorted(path.parent.name for path in ROOT.glob("infini_retrofit/*/__init__.py"))


def stages_after_an_edit_of(file: Path) -> set[str]:
    before = file.read_text()
    file.write_text(before + "# a comment\n")
    with Repo() as repo:
        status = repo.status()
    file.write_text(before)
    return set(status)


def test_only_an_edit_of_what_a_model_is_made_of_trains_again(repository):
    rerun = {}
    others = ("analysis", "analysis/report", "recipes")
    for folder in [*(f"infini_retrofit/{room}" for room in LIBRARY), *others]:
        file = max(Path(folder).glob("*.py"), key=lambda path: path.stat().st_size)
        rerun[Path(folder).name] = stages_after_an_edit_of(file)
    for room in ("layer", "model", "scoring", "training", "pipeline"):
        assert rerun[room] >= TRAINING, room
    assert rerun["evaluation"] >= {"baseline_eval", "control_eval", "eval_sliding"}
    assert not rerun["evaluation"] & TRAINING
    for folder in ("share", "analysis", "recipes"):
        assert rerun[folder] == set(), folder
    assert rerun["longcontext"] == {"check_params", "eval_longcontext"}
    assert rerun["generation"] == {"eval_longcontext", "report"}
    assert rerun["report"] == {"report"}
