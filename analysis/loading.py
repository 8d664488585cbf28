"""Finished experiments as data frames: metrics, scores of documents, parameters.

An experiment that was run here wins over one of the same name in results/. Knows no metric but one.
"""

import json
import re
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from io import StringIO
from pathlib import PurePath
from typing import Any

import pandas as pd

from analysis.report.results import Results, read_results
from infini_retrofit.pipeline.schema import leaves
from recipes.experiments import (
    Experiment,
    Source,
    check_finished,
    list_files,
    newest_experiments,
    read_file,
    read_params_of,
)
from recipes.kept import METRICS, REPORT, SCORES, kept_experiments
from recipes.overlays import literal, recipe_names

COLUMNS = ["experiment", "model", "protocol", "document", "article", "nll"]
TOKENS_SEEN = "num_trained_tokens"
MINUTES = "minutes"
TRAINED = ("distill", "finetune")

# Parameters that some params.yaml lack, and the value that does what those experiments did.
ABSENT = {
    "infini.state_dtype": "float32",
    "infini.window": "64",
    "infini.memory_layers": "all",
    "infini.memory_key": "own",
    "infini.key_layer": "own",
    "infini.memory_value": "hidden",
    "infini.num_slots": "0",
    "infini.recall_norm": "none",
    "infini.written_tokens": "all",
    "infini.initial_state": "empty",
    "infini.initial_memory_share": "0.02",
    "finetune.num_segments": "all",
    "finetune.kl_context": "segment",
    "distill.lr_scale.memory": "1",
    "distill.lr_scale.infini": "1",
    "corpora.passkey.prompts": "several",
    "eval.rivals": "[]",
    "finetune.memory_documents": "0",
    "distill.min_delta": "0",
    "finetune.min_delta": "0",
}


def find_experiments(command: str, names: Sequence[str]) -> dict[str, Experiment]:
    """Return the named experiments, or those of all recipes, and note which were run here.

    Raises:
        ValueError: if one has not finished, or no recipe has.
    """
    own = newest_experiments()
    known = kept_experiments() | own
    names = names or [name for name in recipe_names() if name in known]
    check_finished(command, names, known)
    if kept := [name for name in names if name not in own]:
        note = f"{len(kept)} of {len(names)} experiments were not run here: read from results/"
        print(f"note: {note}", file=sys.stderr)
    return {name: known[name] for name in names}


def load_results(experiment: Experiment) -> Results:
    """Return what the report of an experiment is made from."""
    return read_results(partial(read_file, experiment.source))


def load_metrics(experiments: Mapping[str, Experiment]) -> pd.DataFrame:
    """Return the metrics of each experiment, in columns such as `finetune.best_epoch`.

    The columns `TOKENS_SEEN` and `MINUTES` add those of distilling and fine-tuning.

    Raises:
        ValueError: if a file holds no JSON.
    """
    frame = _by_name({name: _read_metrics(e.source) for name, e in experiments.items()})
    stages = [f"{stage}.{TOKENS_SEEN}" for stage in TRAINED]
    tokens = frame.reindex(columns=stages).sum(axis=1, min_count=1)
    minutes = pd.Series({name: _minutes(e.source) for name, e in experiments.items()}, dtype=float)
    return frame.assign(**{TOKENS_SEEN: tokens, MINUTES: minutes})


def load_scores(experiments: Mapping[str, Experiment]) -> pd.DataFrame:
    """Return `COLUMNS`: the mean nats a token of each document under each model and protocol.

    Experiments whose scores do not tell a document's article, as of old versions, have no rows.
    """
    frames = []
    for name, experiment in experiments.items():
        try:
            text = read_file(experiment.source, SCORES)
        except FileNotFoundError:
            continue
        frame = pd.read_csv(StringIO(text), sep="\t", dtype={"article": str})
        frames.append(frame.assign(experiment=name))
    found = [frame[COLUMNS] for frame in frames if "article" in frame]
    return pd.concat(found, ignore_index=True) if found else pd.DataFrame(columns=COLUMNS)


def load_settings(experiments: Mapping[str, Experiment]) -> pd.DataFrame:
    """Return the parameters of each experiment by dotted name, as `-S` takes them.

    `ABSENT` fills in what a params.yaml lacks because the project added or dropped the parameter.
    """
    rows = {
        name: {key: _setting(value) for key, value in leaves(read_params_of(e.source))}
        for name, e in experiments.items()
    }
    return _by_name(rows).fillna(ABSENT)


def differing(settings: pd.DataFrame) -> pd.DataFrame:
    """Return the parameters in which experiments differ."""
    return settings.loc[:, settings.nunique(dropna=False) > 1]


def _by_name(rows: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    return pd.DataFrame(list(rows.values()), index=pd.Index(list(rows), name="experiment"))


def _read_metrics(source: Source) -> dict[str, Any]:
    """Read all metrics of an experiment by dotted name, the first part a file's."""
    found: dict[str, Any] = {}
    for path in list_files(source, METRICS):
        try:
            metrics = json.loads(read_file(source, path))
        except ValueError as error:
            raise ValueError(f"{source}/{path} must hold JSON: {error}") from error
        found |= leaves(metrics, f"{PurePath(path).stem}.")
    return found


def read_seconds(source: Source) -> dict[str, str]:
    """Return the seconds of each stage as an experiment's own report tells them, "-": not known.

    Experiments of older versions have no report, and so no seconds.
    """
    try:
        report = read_file(source, REPORT)
    except FileNotFoundError:
        return {}
    return dict(re.findall(r"^\| (\w+) +\| +(\d+|-) \|$", report, re.MULTILINE))


def _minutes(source: Source) -> float | None:
    """Return how long distilling and fine-tuning took; None: not known of both."""
    seconds = [read_seconds(source).get(stage, "-") for stage in TRAINED]
    return None if "-" in seconds else sum(map(int, seconds)) / 60


def _setting(value: Any) -> str:
    """Write a parameter as `-S` takes it, a number in one way alone: 25, not 25.0."""
    return literal(int(value) if isinstance(value, float) and value.is_integer() else value)
