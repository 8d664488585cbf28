"""DVC and git as recipes need them: run experiments, list, read and compare them.

Knows no recipe and no key of params.yaml.
"""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from infini_retrofit.pipeline.params import PARAMS_PATH, read_params

# What an experiment left: a commit, or a folder that holds its small files.
Source = str | Path


def committed_params() -> dict[str, Any]:
    """Read params.yaml of the last commit, from which experiments start.

    Raises:
        FileNotFoundError: if it is not committed.
    """
    try:
        return read_params_of("HEAD")
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{PARAMS_PATH} is missing from the last commit, which an experiment starts from: "
            f"commit it ({error})"
        ) from error


def read_params_of(source: Source) -> dict[str, Any]:
    """Read the parameters that an experiment ran with; raises as `read_file` or `read_params`."""
    if isinstance(source, Path):
        return read_params(source / PARAMS_PATH)
    return YAML(typ="safe").load(read_file(source, PARAMS_PATH))


def read_file(source: Source, path: str | Path) -> str:
    """Read a file that an experiment left.

    Args:
        source: where from.
        path: of the file in the project.

    Raises:
        FileNotFoundError: if it is not there.
    """
    if isinstance(source, Path):
        return (source / path).read_text(encoding="utf-8")
    return _git("show", f"{source}:./{path}")


def changed_files(before: str, after: str, paths: Iterable[str]) -> list[str]:
    """Return which of some files differ between two commits."""
    found = _git("diff", "-z", "--name-only", "--relative", before, after, "--", *paths)
    return [name for name in found.split("\0") if name]


def is_in_history(commit: str) -> bool:
    """Tell whether a commit is HEAD or came before it."""
    command = ["git", "merge-base", "--is-ancestor", commit, "HEAD"]
    return subprocess.run(command, capture_output=True).returncode == 0


def run_command(name: str, overrides: Sequence[str], flags: Sequence[str]) -> list[str]:
    """Return the command that runs an experiment."""
    settings = [word for override in overrides for word in ("-S", override)]
    return ["dvc", "exp", "run", "-n", name, *flags, *settings]


def diff_commands(before: str, after: str) -> list[list[str]]:
    """Return the commands that compare two experiments, results first."""
    return [["dvc", kind, "diff", before, after, "--md"] for kind in ("metrics", "params")]


def printable(command: Sequence[str]) -> str:
    """Write a command as one would type it."""
    return shlex.join(command)


def run(command: Sequence[str]) -> int:
    """Run a command to its end and return its exit code.

    Ctrl-C reaches it as well; it is waited for, so that it can save and clean up.
    """
    process = subprocess.Popen(command, env=_environment())
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            continue


def existing_experiments() -> set[str]:
    """Return the names of the experiments that start from the last commit."""
    return set(_output("dvc", "exp", "list", "--name-only").split())


def all_experiments() -> list[dict[str, Any]]:
    """Return what DVC knows of all commits and their experiments."""
    hidden = ("--hide-workspace", "--hide-queued", "--hide-failed")
    return json.loads(_output("dvc", "exp", "show", "--json", "--all-commits", *hidden))


def _git(*words: str) -> str:
    """Return what git prints.

    Raises:
        FileNotFoundError: if what is asked for is not there.
    """
    shown = subprocess.run(["git", *words], capture_output=True, encoding="utf-8")
    if shown.returncode:
        raise FileNotFoundError(shown.stderr.strip().removeprefix("fatal: "))
    return shown.stdout


def _output(*command: str) -> str:
    """Return what a command prints; its errors go to the terminal.

    Raises:
        OSError: if it fails.
    """
    process = subprocess.run(command, env=_environment(), stdout=subprocess.PIPE, text=True)
    if process.returncode:
        raise OSError(f"`{printable(command)}` failed with exit code {process.returncode}")
    return process.stdout


def _environment() -> dict[str, str]:
    """Put this Python's folder first, where its DVC stands, activated or not."""
    folder = str(Path(sys.executable).parent)
    return os.environ | {"PATH": os.pathsep.join([folder, os.environ.get("PATH", "")])}
