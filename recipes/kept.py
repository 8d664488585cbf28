"""Results kept in the repository: the small files of experiments, read where these were not run.

Knows which files tables, pictures and comparisons are made from; not how experiments are run.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from infini_retrofit.params import PARAMS_PATH
from recipes.against import SCORES
from recipes.experiments import commit_of_code, read_file
from recipes.finished import Finished, Metrics

FOLDER = Path("results")  # a folder for each experiment
COMMIT = "commit"  # a file: the commit whose code it ran
METRICS = "metrics"
PLOTTED = (SCORES, "plots/eval_positions.tsv")


def keep(experiments: Mapping[str, Finished], names: Sequence[str]) -> list[Path]:
    """Write the small files of finished experiments, each folder whole or not at all.

    Args:
        experiments: by name, as DVC knows them.
        names: which of them.

    Returns:
        The folder of each.

    Raises:
        ValueError: if one ran code that the history before this commit does not have.
        FileNotFoundError: if one lacks a file.
    """
    return [_keep(name, str(experiments[name].source), experiments[name].metrics) for name in names]


def kept() -> dict[str, Finished]:
    """Return every experiment whose files are kept, by name."""
    return {
        folder.name: Finished(folder, _read_metrics(folder))
        for folder in sorted(FOLDER.glob("[!.]*/"))
    }


def _keep(name: str, revision: str, metrics: Metrics) -> Path:
    """Write the files of one experiment."""
    try:
        texts = {COMMIT: commit_of_code(revision) + "\n"}
    except ValueError as error:
        raise ValueError(f"{name} cannot be kept: its {error}") from error
    texts |= {path: read_file(revision, path) for path in (PARAMS_PATH.name, *PLOTTED, *metrics)}
    partial = FOLDER / f".{name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    for path, text in texts.items():
        (partial / path).parent.mkdir(parents=True, exist_ok=True)
        (partial / path).write_text(text, encoding="utf-8")
    shutil.rmtree(FOLDER / name, ignore_errors=True)
    return partial.rename(FOLDER / name)


def _read_metrics(folder: Path) -> Metrics:
    """Read the metrics in a kept folder, in the form in which DVC shows them."""
    return {
        path.relative_to(folder).as_posix(): {"data": json.loads(path.read_text(encoding="utf-8"))}
        for path in sorted((folder / METRICS).glob("*.json"))
    }
