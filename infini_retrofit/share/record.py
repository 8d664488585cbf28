"""What the pipeline recorded of a model: results and settings, if they are of this very folder.

Knows dvc.lock and how DVC hashes a folder, not what is in a model.
"""

import hashlib
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

# Stages of dvc.lock whose parameters say how a model came about, by the name of its folder.
_TEXTS = ("prepare_wikitext", "prepare_longdocs")
TRAINING = {
    "distilled": (*_TEXTS, "distill"),
    "finetuned": (*_TEXTS, "distill", "finetune"),
    "control": (*_TEXTS, "prepare_comparison"),
}


@dataclass(frozen=True)
class Record:
    """What is known of a model besides its files.

    Attributes:
        metrics: results by the name of their file; a nested one has a column for each model.
        training: parameters by stage.
        doubts: why something is left out or unproved, a sentence each.
    """

    metrics: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    doubts: tuple[str, ...] = ()


def read_record(folder: Path, metrics: Path, lock: Path) -> Record:
    """Read what is of this model, and say of the rest why it is left out.

    Args:
        folder: the model's folder, as the pipeline named it.
        metrics: folder of JSON files.
        lock: the file dvc.lock of the pipeline; without it results go by the folder's name.

    Raises:
        ValueError: if a file is not what it should be.
    """
    name, files = folder.name, sorted(metrics.glob("*.json"))
    if not lock.exists():
        doubt = f"without {lock} nothing proves that the card's results are of this very model"
        record = _add_results(Record(), name, files)
        return replace(record, doubts=(doubt,)) if record.metrics else record
    stages = _read_stages(lock)
    entries = [e for s in stages.values() for kind in ("deps", "outs") for e in s.get(kind, [])]
    if {e.get("md5") for e in entries if e["path"] == f"models/{name}"} != {dvc_md5(folder)}:
        doubt = f"{folder} is not the models/{name} of {lock}: the card has no results or settings"
        return Record(doubts=(doubt,))
    known = {e.get("md5") for e in entries}
    strange = [file for file in files if _md5(file.read_bytes()) not in known]
    doubts = tuple(f"{file} is not the one of {lock}: the card leaves it out" for file in strange)
    record = Record(training=_training(stages, name), doubts=doubts)
    return _add_results(record, name, [file for file in files if file not in strange])


def dvc_md5(folder: Path) -> str:
    """Return the hash by which dvc.lock knows a folder: that of the list of its files' hashes."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    names = {path.relative_to(folder).as_posix(): path for path in files}
    listed = [{"md5": _md5(names[n].read_bytes()), "relpath": n} for n in sorted(names)]
    return _md5(json.dumps(listed).encode()) + ".dir"


def _md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def _add_results(record: Record, name: str, files: list[Path]) -> Record:
    """Add the results, if one of their files has a column of this model."""
    found = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in files}
    if any(isinstance(r, dict) and isinstance(r.get(name), dict) for r in found.values()):
        return replace(record, metrics=found)
    doubt = f"there are no results of a model named {name}: the card has none"
    return replace(record, doubts=(*record.doubts, doubt))


def _read_stages(lock: Path) -> dict[str, Any]:
    stages = (yaml.safe_load(lock.read_text(encoding="utf-8")) or {}).get("stages")
    if not isinstance(stages, dict):
        raise ValueError(f"--lock must name a dvc.lock, got {lock}, which has no stages")
    return stages


def _training(stages: dict[str, Any], model: str) -> dict[str, Any]:
    """Return what a model's stages ran with, nothing where that was not recorded."""
    found = {name: stages.get(name, {}).get("params", {}) for name in TRAINING.get(model, ())}
    given = {name: next(iter(params.values())) for name, params in found.items() if params}
    given = {n: {k: v for k, v in p.items() if k != "infini"} for n, p in given.items()}
    return _without_folders(given)


def _without_folders(value: Any) -> Any:
    """Shorten absolute paths to their last names: a card is for others to read."""
    if isinstance(value, dict):
        return {key: _without_folders(item) for key, item in value.items()}
    is_path = isinstance(value, str) and Path(value).is_absolute()
    return Path(value).name if is_path else value
