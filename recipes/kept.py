"""The small files of finished experiments, kept in results/ for readers who did not run them.

Knows which files those are and what makes an experiment fit to be kept; no metric by name.
"""

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from ruamel.yaml import YAML

from infini_retrofit.pipeline.params import PARAMS_PATH
from recipes.experiments import (
    Experiment,
    Source,
    changed_files,
    is_in_history,
    list_files,
    read_file,
)

FOLDER = Path("results")  # one folder for each experiment
CODE = "commit"  # a file with the commit whose code ran; a folder without it is no experiment
LOCK = "dvc.lock"
PIPELINE = "dvc.yaml"
METRICS = "metrics"
SCORES = "plots/eval_documents.tsv"
PLOTTED = (SCORES, "plots/eval_positions.tsv")
REPORT = "report/report.md"
IF_THERE = (  # which not every experiment has
    "plots/training.tsv",
    REPORT,
    "plots/longcontext_passkey.tsv",
    "plots/longcontext_recall.tsv",
    "plots/longcontext_positions.tsv",
)


def keep(name: str, experiment: Experiment) -> Path:
    """Write the small files of an experiment to a folder, all of them or none.

    Args:
        name: of the folder.
        experiment: one that DVC stored here.

    Returns:
        The folder.

    Raises:
        ValueError: if not all stages ran, a file is missing, or the code is not in the history.
    """
    source = experiment.source
    try:
        stages = YAML(typ="safe").load(read_file(source, LOCK))["stages"]
        _check_code(experiment, [PIPELINE, *code_of(stages)])
        texts = read_kept(source)
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"{name} cannot be kept: {error}") from error
    partial = FOLDER / f".{name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    for path, text in (texts | {CODE: f"{experiment.code}\n"}).items():
        (partial / path).parent.mkdir(parents=True, exist_ok=True)
        (partial / path).write_text(text, encoding="utf-8")
    shutil.rmtree(FOLDER / name, ignore_errors=True)
    return partial.rename(FOLDER / name)


def read_kept(source: Source) -> dict[str, str]:
    """Read the files of an experiment that are kept, by path.

    Raises:
        FileNotFoundError: if one is missing that every experiment has.
    """
    paths = [PARAMS_PATH.name, *PLOTTED, *list_files(source, METRICS)]
    folders = {str(PurePosixPath(path).parent) for path in IF_THERE}
    there = {path for folder in folders for path in list_files(source, folder)}
    paths += [path for path in IF_THERE if path in there]
    return {path: read_file(source, path) for path in paths}


def kept_experiments() -> dict[str, Experiment]:
    """Return the experiments in results/ by name."""
    paths = sorted(FOLDER.glob(f"[!.]*/{CODE}"))
    return {
        path.parent.name: Experiment(path.parent, path.read_text(encoding="utf-8").strip())
        for path in paths
    }


def code_of(stages: Mapping[str, Any]) -> list[str]:
    """Return the dependencies in a dvc.lock that are no stage's output.

    Raises:
        ValueError: if a stage read another version of a file than the lock ends with.
    """
    made = {out["path"]: out["md5"] for stage in stages.values() for out in stage.get("outs", [])}
    read = [(name, dep) for name, stage in stages.items() for dep in stage.get("deps", [])]
    for name, dep in read:
        if made.get(dep["path"], dep["md5"]) != dep["md5"]:
            raise ValueError(
                f"its {name} read another {dep['path']} than the one it ends with; run it again, "
                "to its end"
            )
    return sorted({dep["path"] for _, dep in read} - made.keys())


def _check_code(experiment: Experiment, paths: Iterable[str]) -> None:
    """Refuse an experiment whose code nobody else can check out."""
    if changed := changed_files(experiment.code, str(experiment.source), paths):
        raise ValueError(
            f"it ran with changes of {', '.join(changed)} that were not committed; commit them and "
            "run it again"
        )
    if not is_in_history(experiment.code):
        raise ValueError(
            f"it ran the code of commit {experiment.code[:7]}, which the history of this branch "
            "lacks; merge that, or run it again"
        )
