"""Experiments through DVC and git: run one, find those that finished, read their files.

Knows no recipe, no metric and no key of params.yaml.
"""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ruamel.yaml import YAML

from infini_retrofit.pipeline.params import PARAMS_PATH, read_params

Source = str | Path  # what holds an experiment's files: a commit, or a folder

KEPT = "kept results: "  # begins the message of a commit that `revisions` made, and ran nothing

# DVC stores a finished experiment, and no other, under such a git reference.
_REFERENCE = re.compile(
    r"(?P<commit>\w+) refs/exps/(?P<start>\w{2}/\w{38})/(?P<name>[^/\s]+) (?P<message>.*)"
)


class Experiment(NamedTuple):
    """A finished experiment.

    Attributes:
        source: the commit or folder that holds its files.
        code: the commit that it started from.
    """

    source: Source
    code: str


def stored_experiments() -> list[tuple[str, Experiment]]:
    """Return the name of each experiment that DVC ran and stored here, oldest first.

    This reads git references, in milliseconds. `dvc exp show --all-commits` takes nearly a second
    for each commit of the history.
    """
    layout = "--format=%(objectname) %(refname) %(contents:subject)"
    lines = git("for-each-ref", "--sort=committerdate", layout, "refs/exps").splitlines()
    found = [match for line in lines if (match := _REFERENCE.fullmatch(line))]
    return [
        (match["name"], Experiment(match["commit"], match["start"].replace("/", "")))
        for match in found
        if not match["message"].startswith(KEPT)
    ]


def newest_experiments() -> dict[str, Experiment]:
    """Return the experiments that DVC stored here by name, the newest of each name."""
    return dict(stored_experiments())


def existing_experiments() -> set[str]:
    """Return the names of the experiments that started from the last commit."""
    head = last_commit()
    return {name for name, experiment in stored_experiments() if experiment.code == head}


def check_finished(command: str, names: Sequence[str], experiments: Collection[str]) -> None:
    """Refuse names of experiments that have not finished, and a call without names.

    Raises:
        ValueError: with the names.
    """
    if not names or (missing := [name for name in names if name not in experiments]):
        raise ValueError(
            f"{command} needs names of finished experiments, got "
            + (f"some that have not been run: {', '.join(missing)}" if names else "none")
        )


def last_commit() -> str:
    """Return the commit from which experiments start.

    Raises:
        FileNotFoundError: if git finds none, with its reason.
    """
    try:
        return git("rev-parse", "HEAD").strip()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"experiments start from the last commit: {error}") from error


def check_keeps_copies() -> None:
    """Refuse a shallow clone: DVC would lose, and call a success, what it runs in a copy.

    Raises:
        ValueError: with the way out.
    """
    if git("rev-parse", "--is-shallow-repository").strip() == "true":
        raise ValueError(
            "DVC cannot keep an experiment of --temp in a shallow clone: run "
            "`git fetch --unshallow` first"
        )


def committed_params() -> dict[str, Any]:
    """Read params.yaml of the last commit.

    Raises:
        FileNotFoundError: if it is not committed, or see `last_commit`.
    """
    last_commit()
    try:
        return read_params_of("HEAD")
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{PARAMS_PATH} is missing from the last commit, which an experiment starts from: "
            f"commit it ({error})"
        ) from error


def read_params_of(source: Source) -> dict[str, Any]:
    """Read the parameters of an experiment; raises as `read_file` or `read_params`."""
    if isinstance(source, Path):
        return read_params(source / PARAMS_PATH)
    return YAML(typ="safe").load(read_file(source, PARAMS_PATH))


def read_file(source: Source, path: str | Path) -> str:
    """Read a file of an experiment.

    Args:
        source: of the experiment.
        path: of the file, from the project's folder.

    Raises:
        FileNotFoundError: if the experiment has no such file.
    """
    if isinstance(source, Path):
        return (source / path).read_text(encoding="utf-8")
    return git("show", f"{source}:./{path}")


def list_files(source: Source, folder: str) -> list[str]:
    """Return the paths of an experiment's files that stand in a folder, sorted."""
    if isinstance(source, Path):
        return sorted(path.relative_to(source).as_posix() for path in (source / folder).glob("*"))
    return git("ls-tree", "-z", "--name-only", source, f"{folder}/").split("\0")[:-1]


def changed_files(before: str, after: str, paths: Iterable[str]) -> list[str]:
    """Return the files that differ between two commits, of those given."""
    found = git("diff", "-z", "--name-only", "--relative", before, after, "--", *paths)
    return found.split("\0")[:-1]


def is_in_history(commit: str) -> bool:
    """Return whether a commit is HEAD or one of its ancestors."""
    command = ["git", "merge-base", "--is-ancestor", commit, "HEAD"]
    return subprocess.run(command, capture_output=True).returncode == 0


def run_command(name: str, overrides: Sequence[str], flags: Sequence[str]) -> list[str]:
    """Return the command that runs an experiment."""
    settings = [word for override in overrides for word in ("-S", override)]
    return ["dvc", "exp", "run", "-n", name, *flags, *settings]


def diff_commands(before: str, after: str) -> list[list[str]]:
    """Return the commands that compare two experiments, metrics first."""
    return [["dvc", kind, "diff", before, after, "--md"] for kind in ("metrics", "params")]


def run(command: Sequence[str]) -> int:
    """Run a command of this environment's DVC to its end and return its exit code.

    Ctrl-C stops the command as well. This process then waits until DVC has cleaned up.
    """
    folder = str(Path(sys.executable).parent)
    path = os.pathsep.join([folder, os.environ.get("PATH", "")])
    process = subprocess.Popen(command, env=os.environ | {"PATH": path})
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            continue


def printable(command: Sequence[str]) -> str:
    """Write a command as one types it in a shell."""
    return shlex.join(command)


def git(*words: str, given: str | None = None, more: Mapping[str, str] | None = None) -> str:
    """Return the output of git, which reads a text and more of an environment.

    Raises:
        FileNotFoundError: if git fails, with its message.
    """
    environment = {**os.environ, **(more or {})}
    shown = subprocess.run(
        ["git", *words], input=given, env=environment, capture_output=True, encoding="utf-8"
    )
    if shown.returncode:
        raise FileNotFoundError(shown.stderr.strip().removeprefix("fatal: "))
    return shown.stdout
