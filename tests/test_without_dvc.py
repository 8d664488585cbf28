"""`scale.sh` at toy size: data, training, evaluation without DVC; numbers alone come back."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from recipes.without_dvc import commands, run_without_dvc, with_overrides
from tests.tiny_project import LINEAR, ROOT, SMALL, STAGES, contents, make_project


def test_every_stage_runs_and_no_model_comes_back(tmp_path):
    make_project(tmp_path, **LINEAR)
    settings = {key: value for key, value in (SMALL | LINEAR).items() if value is not None}
    settings |= {
        "models.my-model.path": str(tmp_path / "own-model"),
        "corpora.my-texts.path": str(tmp_path / "own-texts"),
        "distill.epochs": 0,
    }
    words = [f"{key}={value}".replace("'", "") for key, value in settings.items()]
    own = {"OUT": str(tmp_path / "out"), "PYTHON": sys.executable, "TEXT": "4"}
    command = ["bash", "scale.sh", "control", *words]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | own, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = {name.partition("/")[0] for name in contents(tmp_path / "out")}
    assert found == {"metrics", "plots", "report", "params.yaml", "device.txt"}
    assert (tmp_path / "out/metrics/eval_sliding.json").is_file()
    assert all(f"\n{stage}: " in f"\n{done.stdout}" for stage in STAGES)


def test_a_stage_that_fails_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    params = YAML(typ="safe").load(Path("params.yaml")) | {"model": "nobody"}
    with pytest.raises(ValueError, match="stage check_params failed"):
        run_without_dvc(params, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_stages_are_those_of_dvc_and_the_launcher_starts_those_that_train(monkeypatch):
    monkeypatch.chdir(ROOT)
    params = {"launcher": "torchrun --standalone"}
    found = commands(params)
    assert list(found) == STAGES
    assert found["finetune"] == ["torchrun", "--standalone", "-m", "stages.finetune"]
    assert found["report"][0] == sys.executable


def test_overrides_are_read_as_yaml_and_leave_the_rest():
    params = {"a": {"b": 1, "c": [1]}, "d": "x"}
    changed = with_overrides(params, ["a.c=[-1,2]", "d=3e-4"])
    assert changed == {"a": {"b": 1, "c": [-1, 2]}, "d": 3e-4}
    assert params == {"a": {"b": 1, "c": [1]}, "d": "x"}
