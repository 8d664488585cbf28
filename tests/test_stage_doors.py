"""Stages refuse bad parameters and missing inputs by name, and keep earlier results."""

import os
import shutil
import subprocess
import sys
from importlib import import_module

import pytest
import yaml

from tests.tiny_project import LINEAR, ROOT, SMALL, STAGES, contents, run_stage, write_params

PIPELINE = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]


def changed_files(before: dict[str, str], after: dict[str, str]) -> set[str]:
    """Return which files differ, except below checkpoints/."""
    changed = {name for name, _ in before.items() ^ after.items()}
    return {name for name in changed if not name.startswith("checkpoints/")}


@pytest.mark.parametrize("stage", ["prepare_comparison", "distill"])
def test_a_layer_that_the_base_does_not_have_is_refused_before_anything_slow(
    stage, project, monkeypatch
):
    write_params(project, SMALL | LINEAR | {"infini.layers": [0, 3]})
    before = contents(project)
    module = import_module(f"stages.{stage}")
    for slow in {"evaluate", "train"} & set(vars(module)):
        monkeypatch.setattr(module, slow, lambda *_: pytest.fail("too late"))
    message = r"infini\.layers must be in -3\.\.2 for a base of 3 layers, got 3"
    with pytest.raises(ValueError, match=message):
        run_stage(stage)
    assert changed_files(before, contents(project)) == set()


INPUTS = [
    (stage, dep)
    for stage in STAGES
    for dep in PIPELINE[stage]["deps"]
    if not dep.startswith(("stages/", "infini_retrofit", "analysis")) and dep != "data/params_ok"
]


@pytest.mark.parametrize(("stage", "missing"), INPUTS)
def test_a_missing_input_is_named_with_the_command_that_makes_it(stage, missing, project):
    path = project / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    before = contents(project)
    with pytest.raises(FileNotFoundError, match=rf"^{missing}.* is missing: run `dvc repro"):
        run_stage(stage)
    assert changed_files(before, contents(project)) == set()


def test_on_the_command_line_a_mistake_is_one_sentence_and_earlier_results_stay(project):
    write_params(project, SMALL | LINEAR | {"distill.epochs": -1})
    before = contents(project)
    process = subprocess.run(
        [sys.executable, "-m", "stages.distill"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 1
    assert process.stderr == "error: distill.epochs must be greater than or equal to 0, got -1\n"
    assert contents(project) == before
