"""What one run measured, read from its metrics, its plots' rows and its params.yaml."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from io import StringIO
from typing import Any

import pandas as pd
from ruamel.yaml import YAML

# The model that each training stage makes, and the text on which it is validated.
TRAININGS = {
    "distill": ("distilled", "samples"),
    "finetune": ("finetuned", "documents"),
    "finetune_control": ("control", "documents"),
}
EVALUATION = "metrics/eval_sliding.json"
RECALL = "metrics/eval_longcontext.json"
DOCUMENTS, POSITIONS = "plots/eval_documents.tsv", "plots/eval_positions.tsv"
CURVES = "plots/training.tsv"
GRID, RECALLED = "plots/longcontext_passkey.tsv", "plots/longcontext_recall.tsv"
LONG_POSITIONS = "plots/longcontext_positions.tsv"
# What each stage of the pipeline leaves for the report.
INPUTS = {
    "eval_sliding": (EVALUATION, DOCUMENTS, POSITIONS),
    "eval_longcontext": (RECALL, GRID, RECALLED, LONG_POSITIONS),
    **{stage: (f"metrics/{stage}.json", f"plots/{stage}.tsv") for stage in TRAININGS},
}
PARAMS = "params.yaml"


@dataclass(frozen=True)
class Results:
    """The results of one run.

    Attributes:
        scores: the metrics of each model, as stage `eval_sliding` wrote them.
        training: the metrics of each training stage that ran.
        documents: rows of mean nats a token by model, protocol and document.
        positions: rows of nats a token by model, protocol and position in the segment.
        curves: rows of validation perplexity by model, text and epoch. The base's are a level
            line. Kept experiments may have none.
        params: the whole params.yaml.
        recall: the metrics of each model in long texts. Kept experiments may have none.
        grid: rows of right answers by model, haystack, length and depth of a pass key.
        recalled: rows of right answers by model, task and number.
        long_positions: rows of nats a token by model and position in long documents.
    """

    scores: Mapping[str, Mapping[str, float]]
    training: Mapping[str, Mapping[str, float]]
    documents: pd.DataFrame
    positions: pd.DataFrame
    curves: pd.DataFrame
    params: Mapping[str, Any]
    recall: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    grid: pd.DataFrame = field(default_factory=pd.DataFrame)
    recalled: pd.DataFrame = field(default_factory=pd.DataFrame)
    long_positions: pd.DataFrame = field(default_factory=pd.DataFrame)

    def ppl(self, protocol: str, model: str = "finetuned") -> float | None:
        """Return the test perplexity of a model; None: it was not scored in this way."""
        return self.scores.get(model, {}).get(f"{protocol}_test_ppl")

    @property
    def segment_length(self) -> int:
        """Tokens of a segment."""
        return self.params["infini"]["segment_length"]

    @property
    def has_memory(self) -> bool:
        """Whether the score can differ with the memory off."""
        return self.ppl("segment_off") != self.ppl("segment")

    @property
    def trained_memory_alone(self) -> bool:
        """Whether the base's own weights are as they were."""
        infini, distill, finetune = (self.params[k] for k in ("infini", "distill", "finetune"))
        distilled_alone = not distill["epochs"] or distill["trainable"] == "memory"
        is_kept = infini["init"] == "base" or infini["local"] == "none"  # a branch beside it
        return is_kept and distilled_alone and finetune["trainable"] == "memory"

    @property
    def is_base_when_off(self) -> bool:
        """Whether the model without its memory is the base confined to segments."""
        if not self.trained_memory_alone:
            return False
        infini = self.params["infini"]
        if infini["local"] == "none":  # the base's attention stands beside, in the window it has
            return True
        as_base = (infini["local"], infini["positions"]) == ("softmax", "rope")
        return as_base and not infini["local_context"]

    @property
    def groups(self) -> str:
        """What intervals resample, in a word."""
        corpus = self.params.get("longdocs", {}).get("corpus")
        source = self.params.get("corpora", {}).get(corpus, {}).get("source")
        return "packages" if source == "packages" else "articles"

    @property
    def sight(self) -> str:
        """How far attention sees, in words."""
        length, context = self.segment_length, self.params["infini"]["local_context"]
        if not context:
            return f"in segments of {length} tokens"
        return f"in a window of {context} to {context + length} tokens"


def read_results(read: Callable[[str], str]) -> Results:
    """Read the results of a run.

    Args:
        read: returns the text of a file by its path in the project, or raises FileNotFoundError.
            The metrics of stage `eval_sliding` and params.yaml must be there.
    """
    training = {stage: _read(read, f"metrics/{stage}.json") for stage in TRAININGS}
    curves = _curves({stage: _rows(read, f"plots/{stage}.tsv") for stage in TRAININGS})
    return Results(
        scores=json.loads(read(EVALUATION)),
        training={stage: json.loads(text) for stage, text in training.items() if text},
        documents=_rows(read, DOCUMENTS),
        positions=_rows(read, POSITIONS),
        curves=_rows(read, CURVES) if curves.empty else curves,
        params=YAML(typ="safe").load(read(PARAMS)),
        recall=json.loads(_read(read, RECALL) or "{}"),
        grid=_rows(read, GRID),
        recalled=_rows(read, RECALLED),
        long_positions=_rows(read, LONG_POSITIONS),
    )


def _curves(histories: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Return the validation perplexities of all training stages; before training: the base's."""
    parts = []
    for stage, rows in histories.items():
        if not rows.empty:
            model, text = TRAININGS[stage]
            val = rows[(rows.split == "val") & rows.ppl.notna()]
            parts.append(val[["epoch", "ppl"]].assign(model=model, text=text))
    if not parts:
        return pd.DataFrame()
    curves = pd.concat(parts)[["model", "text", "epoch", "ppl"]]
    start = curves[(curves.model == "control") & (curves.epoch == 0)].assign(model="base")
    return pd.concat([curves, start, start.assign(epoch=curves.epoch.max())], ignore_index=True)


def _read(read: Callable[[str], str], path: str) -> str:
    """Return the text of a file, or nothing if it is missing."""
    try:
        return read(path)
    except FileNotFoundError:
        return ""


def _rows(read: Callable[[str], str], path: str) -> pd.DataFrame:
    """Return the rows of a plot; without the file, none."""
    text = _read(read, path)
    return pd.read_csv(StringIO(text), sep="\t") if text else pd.DataFrame()
