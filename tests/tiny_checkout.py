"""A git repository of a test's own, in which DVC can run experiments."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from recipes import overlays
from tests.tiny_project import ROOT


def keep_settings_apart(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give git an author; DVC keeps its settings in a folder, and sees none of this machine."""
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    for role in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{role}_NAME", "a test")
        monkeypatch.setenv(f"GIT_{role}_EMAIL", "test@example.org")
    for kind in ("SITE_CACHE", "GLOBAL_CONFIG", "SYSTEM_CONFIG"):
        monkeypatch.setenv(f"DVC_{kind}_DIR", str(folder / kind))


def make_checkout(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the working folder, in an empty one, a git repository with the project's params.yaml."""
    keep_settings_apart(folder, monkeypatch)
    (folder / "checkout").mkdir()
    monkeypatch.chdir(folder / "checkout")
    shutil.copyfile(ROOT / "params.yaml", "params.yaml")
    git("init", "--quiet")
    commit()


def git(*words: str) -> str:
    return subprocess.run(["git", *words], check=True, capture_output=True, text=True).stdout


def python(*words: str) -> subprocess.CompletedProcess[str]:
    """Run Python in the working folder, with this project's code at hand."""
    about = {"env": {**os.environ, "PYTHONPATH": str(ROOT)}, "capture_output": True, "text": True}
    return subprocess.run([sys.executable, *words], **about)


def dvc(*words: str) -> str:
    """Run DVC in the working folder and return what it prints."""
    done = python("-m", "dvc", *words)
    assert done.returncode == 0, done.stderr
    return done.stdout


def commit() -> str:
    git("add", "--all")
    git("commit", "--quiet", "--allow-empty", "--message", "a state")
    return git("rev-parse", "HEAD").strip()


def store(name: str, **files: str) -> str:
    """Store files as DVC stores an experiment that started from the last commit, and return it."""
    head = git("rev-parse", "HEAD").strip()
    write(**files)
    revision = commit()
    git("reset", "--quiet", "--hard", head)
    git("update-ref", f"refs/exps/{head[:2]}/{head[2:]}/{name}", revision)
    return revision


def write(**files: str) -> None:
    for name, text in files.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(text, encoding="utf-8")


def own_recipes(monkeypatch: pytest.MonkeyPatch, **texts: str) -> None:
    """Replace the project's recipes by overlays of these texts, without a common budget."""
    write(**{f"recipes/{name}.yaml": text for name, text in {"budget": "{}", **texts}.items()})
    monkeypatch.setattr(overlays, "FOLDER", Path("recipes").absolute())
