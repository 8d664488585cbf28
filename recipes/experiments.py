"""DVC and git as recipes need them: run experiments, list, read and compare them.

Knows no recipe and no key of params.yaml.
"""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from infini_retrofit.params import PARAMS_PATH


def committed_params(revision: str = "HEAD") -> dict[str, Any]:
    """Read params.yaml as a commit has it; experiments start from that of the last.

    Raises:
        FileNotFoundError: if it is not committed.
    """
    command = ["git", "show", f"{revision}:./{PARAMS_PATH}"]
    shown = subprocess.run(command, capture_output=True, text=True)
    if shown.returncode:
        raise FileNotFoundError(
            f"{PARAMS_PATH} is missing from the last commit, which an experiment starts from: "
            f"commit it ({shown.stderr.strip()})"
        )
    return YAML(typ="safe").load(shown.stdout)


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
