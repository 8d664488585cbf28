"""Kept results as DVC experiments, which `dvc metrics diff` and others read as revisions.

Writes git objects and references alone: no working tree, no index, no branch. Knows no metric.
"""

import tempfile
from collections.abc import Mapping
from io import StringIO
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from recipes.experiments import KEPT, Experiment, git, read_file, stored_experiments
from recipes.kept import PIPELINE

RESULTS = ("metrics", "plots", "report")  # of the code's commit; they are those of another run
_NO_BLOB = "0" * 40
_MAKER = {"NAME": "recipes", "EMAIL": "recipes@localhost"}


def write_revision(
    name: str, experiment: Experiment, texts: Mapping[str, str], shown: Mapping[str, Any]
) -> str:
    """Store kept results as the DVC experiment of their name, in place of an older one.

    The commit holds the code that ran, and the results in place of those of that commit.

    Args:
        name: of the experiment.
        experiment: a kept one.
        texts: of the files to store, by path from the project's folder.
        shown: the top-level keys of dvc.yaml that declare metrics and plots among these files.

    Returns:
        The commit.

    Raises:
        ValueError: if an experiment of that name was run here, or the clone lacks the code.
    """
    if name in dict(stored_experiments()):
        raise ValueError(f"{name} was run here, and is a revision already")
    code = experiment.code
    try:
        pipeline = _declare(read_file(code, PIPELINE), shown)
    except FileNotFoundError as error:
        raise ValueError(
            f"{name} ran the code of commit {code[:7]}, which this clone lacks: "
            "run `git fetch --unshallow`"
        ) from error
    commit = _commit(code, {**texts, PIPELINE: pipeline}, f"{KEPT}{name}")
    git("update-ref", f"refs/exps/{code[:2]}/{code[2:]}/{name}", commit)
    return commit


def _declare(pipeline: str, shown: Mapping[str, Any]) -> str:
    """Return a dvc.yaml whose stages declare no metrics and plots, but the top level does."""
    yaml = YAML()
    content = yaml.load(pipeline)
    for stage in content["stages"].values():
        for kind in RESULTS:
            stage.pop(kind, None)
    content.update(shown)
    written = StringIO()
    yaml.dump(content, written)
    return written.getvalue()


def _commit(parent: str, texts: Mapping[str, str], message: str) -> str:
    """Commit the files of a commit with others in place of its results, and return the commit."""
    prefix = git("rev-parse", "--show-prefix").strip()
    old = git("ls-tree", "-r", "-z", "--name-only", parent, *(f"{f}/" for f in RESULTS))
    lines = [f"0 {_NO_BLOB}\t{prefix}{path}" for path in old.split("\0")[:-1]]
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / str(number) for number in range(len(texts))]
        for file, text in zip(files, texts.values(), strict=True):
            file.write_text(text, encoding="utf-8")
        names = "".join(f"{file}\n" for file in files)
        blobs = git("hash-object", "-w", "--no-filters", "--stdin-paths", given=names).split()
        lines += [
            f"100644 {blob}\t{prefix}{path}" for blob, path in zip(blobs, texts, strict=True)
        ]
        index = {"GIT_INDEX_FILE": str(Path(folder) / "index")}
        git("read-tree", parent, more=index)
        given = "".join(f"{line}\0" for line in lines)
        git("update-index", "-z", "--index-info", given=given, more=index)
        tree = git("write-tree", more=index).strip()
    people = {
        f"GIT_{role}_{key}": value
        for role in ("AUTHOR", "COMMITTER")
        for key, value in _MAKER.items()
    }
    return git("commit-tree", tree, "-p", parent, "-m", message, more=people).strip()
