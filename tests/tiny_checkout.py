"""A git repository of a test's own, in which DVC can run experiments."""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from infini_retrofit.pipeline.files import write_rows
from recipes import overlays
from recipes.kept import SCORES
from tests.tiny_project import ROOT

STAGE = """import json
from pathlib import Path
from ruamel.yaml import YAML
params = YAML(typ="safe").load(Path("params.yaml"))
metrics = {"finetuned": {"segment_test_ppl": params["a"] * 10 + params["b"]}}
Path("metrics").mkdir(exist_ok=True)
Path("metrics/eval_sliding.json").write_text(json.dumps(metrics))
"""
PIPELINE = """stages:
  eval_sliding:
    cmd: python stage.py
    deps: [stage.py]
    params: [a, b]
    metrics:
    - metrics/eval_sliding.json:
        cache: false
"""


def keep_settings_apart(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give git an author and let neither git nor DVC see settings of this machine.

    Args:
        folder: where DVC may keep settings of its own.
        monkeypatch: undoes it all.
    """
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    for role in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{role}_NAME", "a test")
        monkeypatch.setenv(f"GIT_{role}_EMAIL", "test@example.org")
    for kind in ("SITE_CACHE", "GLOBAL_CONFIG", "SYSTEM_CONFIG"):
        monkeypatch.setenv(f"DVC_{kind}_DIR", str(folder / kind))


def make_checkout(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the working folder a git repository that holds the project's params.yaml.

    Args:
        folder: an empty one; settings of git and DVC that are not the test's stay outside.
        monkeypatch: undoes it all.
    """
    keep_settings_apart(folder, monkeypatch)
    (folder / "checkout").mkdir()
    monkeypatch.chdir(folder / "checkout")
    shutil.copyfile(ROOT / "params.yaml", "params.yaml")
    subprocess.run(["git", "init", "--quiet"], check=True)
    commit()


def commit() -> str:
    """Commit everything in the working folder and return the commit."""
    subprocess.run(["git", "add", "--all"], check=True)
    subprocess.run(["git", "commit", "--quiet", "--message", "a state"], check=True)
    return head()


def head() -> str:
    """Return the last commit."""
    command = ["git", "rev-parse", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def write_scores(scores: Mapping[tuple[str, str], np.ndarray], articles: Sequence[int]) -> None:
    """Write the file of scores that an experiment leaves.

    Args:
        scores: nats a token of each document, by model and protocol.
        articles: which article each document is of.
    """
    rows = [
        {"model": model, "protocol": protocol, "document": i, "article": a, "nll": float(nll)}
        for (model, protocol), nlls in scores.items()
        for i, (a, nll) in enumerate(zip(articles, nlls, strict=True))
    ]
    Path(SCORES).parent.mkdir(exist_ok=True)
    write_rows(Path(SCORES), rows)


def own_recipes(monkeypatch: pytest.MonkeyPatch, **texts: str) -> None:
    """Let recipes/ of the working folder stand in for the project's recipes.

    Args:
        monkeypatch: undoes it.
        texts: the text of each overlay; there is no common budget.
    """
    folder = Path("recipes")
    folder.mkdir(exist_ok=True)
    for name, text in {"budget": "{}", **texts}.items():
        (folder / f"{name}.yaml").write_text(text)
    monkeypatch.setattr(overlays, "FOLDER", folder.absolute())


def make_pipeline(folder: Path, monkeypatch: pytest.MonkeyPatch, **texts: str) -> None:
    """Make the working folder a repository with a pipeline of one stage, which takes no time.

    Args:
        folder: an empty one.
        monkeypatch: undoes it all.
        texts: the text of each of its recipes; it has the parameters a and b, both 1.
    """
    make_checkout(folder, monkeypatch)
    shutil.copytree(ROOT / "recipes", "recipes", ignore=shutil.ignore_patterns("*.yaml", "__py*"))
    own_recipes(monkeypatch, **texts)
    files = {"params.yaml": "a: 1\nb: 1\n", "dvc.yaml": PIPELINE, "stage.py": STAGE}
    for name, text in {**files, ".gitignore": "__pycache__/\n"}.items():
        Path(name).write_text(text)
    subprocess.run([sys.executable, "-m", "dvc", "init", "--quiet"], check=True)
    commit()


def python_m(module: str, *words: str) -> tuple[int, str]:
    """Run `python -m MODULE` in the working folder; return its exit code and all it prints."""
    process = subprocess.run(
        [sys.executable, "-m", module, *words],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return process.returncode, process.stdout
