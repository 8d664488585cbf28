"""Results kept in the repository: the small files of experiments, read where these were not run.

Knows which files tables, pictures and comparisons are made from; not how experiments are run.
"""

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from infini_retrofit.pipeline.params import PARAMS_PATH
from recipes.experiments import changed_files, is_in_history, read_file
from recipes.finished import Finished, Metrics

FOLDER = Path("results")  # a folder for each experiment
CODE = "commit"  # a file: the commit whose code it ran; a folder without it holds no experiment
LOCK = "dvc.lock"
PIPELINE = "dvc.yaml"  # the commands of the stages
SCORES = "plots/eval_documents.tsv"
PLOTTED = (SCORES, "plots/eval_positions.tsv")


def keep(name: str, experiment: Finished) -> Path:
    """Write the small files of a finished experiment, its folder whole or not at all.

    Args:
        name: of the folder.
        experiment: one that was run here.

    Returns:
        The folder.

    Raises:
        ValueError: if it was run by halves, lacks a file, or ran code that no one else has.
    """
    try:
        stages = YAML(typ="safe").load(read_file(experiment.source, LOCK))["stages"]
        _check_code(experiment, [PIPELINE, *code_of(stages)])
        paths = (PARAMS_PATH.name, *PLOTTED, *experiment.metrics)
        texts = {path: read_file(experiment.source, path) for path in paths}
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"{name} cannot be kept: {error}") from error
    partial = FOLDER / f".{name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    for path, text in (texts | {CODE: f"{experiment.code}\n"}).items():
        (partial / path).parent.mkdir(parents=True, exist_ok=True)
        (partial / path).write_text(text, encoding="utf-8")
    shutil.rmtree(FOLDER / name, ignore_errors=True)
    return partial.rename(FOLDER / name)


def read_kept() -> dict[str, Finished]:
    """Read every experiment whose files are kept, by name.

    Raises:
        ValueError: if metrics cannot be read.
    """
    folders = [path.parent for path in sorted(FOLDER.glob(f"[!.]*/{CODE}"))]
    return {
        folder.name: Finished(
            folder, _read_metrics(folder), (folder / CODE).read_text(encoding="utf-8").strip()
        )
        for folder in folders
    }


def code_of(stages: Mapping[str, Any]) -> list[str]:
    """Return what the stages of a dvc.lock read that no stage made.

    Raises:
        ValueError: if a stage read something else than what the stage before it made last.
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


def _check_code(experiment: Finished, code_files: Iterable[str]) -> None:
    """Refuse what ran code that no one else can find."""
    if changed := changed_files(experiment.code, str(experiment.source), code_files):
        raise ValueError(
            f"it ran with changes of {', '.join(changed)} that were not committed; commit them and "
            "run it again"
        )
    if not is_in_history(experiment.code):
        raise ValueError(
            f"it ran the code of commit {experiment.code[:7]}, which the history of this branch "
            "lacks; merge that, or run it again"
        )


def _read_metrics(folder: Path) -> Metrics:
    """Read the metrics in a kept folder, in the form in which DVC shows them."""
    metrics = {}
    for path in sorted((folder / "metrics").glob("*.json")):
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} must hold JSON, try git checkout {path}: {error}") from error
        metrics[path.relative_to(folder).as_posix()] = {"data": values}
    return metrics
