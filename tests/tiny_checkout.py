"""A git repository of a test's own, in which DVC can run experiments."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from recipes import overlays
from tests.tiny_project import ROOT


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


def commit() -> None:
    """Commit everything in the working folder."""
    subprocess.run(["git", "add", "--all"], check=True)
    subprocess.run(["git", "commit", "--quiet", "--message", "a state"], check=True)


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
