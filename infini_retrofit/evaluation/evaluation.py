"""The scores of one model: its metrics, and the rows of its plots.

Knows protocols only through their table, and nothing of gains.

Axes:
    B  document
    Scored  token that is scored
"""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from infini_retrofit.evaluation.costs import rival_costs
from infini_retrofit.evaluation.dynamic import choose_lr
from infini_retrofit.evaluation.key_tokens import KeyTokens
from infini_retrofit.evaluation.protocols import (
    PROTOCOLS,
    Setting,
    protocols_of,
    score_protocols,
)
from infini_retrofit.evaluation.rival import make_windowed
from infini_retrofit.layer.probe import MemoryReading
from infini_retrofit.model.retrofit import state_bytes
from infini_retrofit.pipeline.files import (
    read_json,
    seal_results,
    verify_results,
    write_metrics,
    write_rows,
)
from infini_retrofit.scoring.score import Score, total

# The mean NLL of each document in nats a token, by protocol.
DocumentNlls = Mapping[str, np.ndarray]
Row = dict[str, Any]


@dataclass(frozen=True)
class Report:
    """The scores of one model.

    Attributes:
        metrics: `<protocol>_test_ppl` for every protocol, `full_test_nll` and `segment_test_nll`
            in nats a token, `state_bytes` that cross a segment border, `num_documents`, and
            `num_articles` (or packages) that these are cut from; see docs/protocols.md for those of
            key tokens and rivals.
        documents: rows of a plot: model, protocol, document, article, nll.
        positions: rows of a plot: model, protocol, position, nll, num_scored.
        key_tokens: those of the documents; None if the report was read.
    """

    metrics: dict[str, Any]
    documents: list[Row]
    positions: list[Row]
    key_tokens: KeyTokens | None = None

    def __str__(self) -> str:
        """Name the documents, and the perplexity with and without a border between segments."""
        full, segment = (self.metrics[f"{key}_test_ppl"] for key in ("full", "segment"))
        num = self.metrics["num_documents"]
        return f"{num} documents, perplexity {full:.2f} whole, {segment:.2f} in segments"

    def document_nlls(self) -> DocumentNlls:
        """Return the mean NLL of each document, by protocol."""
        nlls: dict[str, list[float]] = {}
        for row in self.documents:
            nlls.setdefault(row["protocol"], []).append(float(row["nll"]))
        return {name: np.array(values) for name, values in nlls.items()}

    def write(self, name: str) -> None:
        """Write the metrics and rows of the stage `<name>_eval`."""
        metrics, documents, positions = _paths(name)
        write_metrics(metrics, self.metrics)
        write_rows(documents, self.documents)
        write_rows(positions, self.positions)
        seal_results(f"{name}_eval", _paths(name))

    @classmethod
    def read(cls, name: str) -> "Report":
        """Read what the stage `<name>_eval` wrote; the cells of its rows are text."""
        verify_results(f"{name}_eval", _paths(name))
        metrics, *plots = _paths(name)
        texts = (path.read_text(encoding="utf-8") for path in plots)
        rows = (list(csv.DictReader(text.splitlines(), delimiter="\t")) for text in texts)
        return cls(read_json(metrics, dict[str, int | float], f"dvc repro {name}_eval"), *rows)


def _paths(name: str) -> list[Path]:
    plots = [Path(f"plots/{name}_{rows}.tsv") for rows in ("documents", "positions")]
    return [Path(f"metrics/{name}_eval.json"), *plots]


def evaluate(name: str, model: PreTrainedModel, setting: Setting) -> Report:
    """Score a base or retrofitted model under the protocols of its name, one of `MODELS`."""
    text, params, fitted = setting.text, setting.params, {}
    names = protocols_of(name, params)
    if "segment_dynamic" in names:
        windowed, length = make_windowed(model, setting.rival), setting.rival.segment_length
        fitted["dynamic_lr"] = choose_lr(windowed, setting.val_documents, length)
        setting = replace(setting, **fitted)
    nlls = score_protocols(model, setting, names)
    scores = {key: total(map(Score.of, rows)) for key, rows in nlls.items()}
    metrics = {
        **{f"{key}_test_ppl": score.ppl for key, score in scores.items()},
        **{f"{key}_test_nll": scores[key].nll for key in ("full", "segment")},
        "state_bytes": state_bytes(make_windowed(model, setting.rival)),
        "num_documents": len(text.documents),
        "num_articles": len(set(text.sources)),
        **fitted,
    }
    if name == "base" and params.rivals:
        num_tokens = text.documents.shape[1]
        metrics |= rival_costs(model, setting.rival, params.rivals, num_tokens)
    documents = {k: torch.stack(rows) for k, rows in nlls.items() if not PROTOCOLS[k].of_stream}
    key_tokens = setting.key_tokens or KeyTokens.of(documents["full"], documents["segment"])
    metrics |= score_key_tokens(key_tokens, documents)
    positions = position_rows(name, documents, setting.rival.segment_length)
    return Report(metrics, document_rows(name, documents, text.sources), positions, key_tokens)


def score_key_tokens(
    key_tokens: KeyTokens, nlls: Mapping[str, Float[Tensor, "B _"]]
) -> dict[str, int | float]:
    """Return `num_key_tokens` and, where there are any, `key_token_nll_<protocol>`."""
    mask = key_tokens.mask
    metrics: dict[str, int | float] = {"num_key_tokens": int(mask.sum())}
    for key, found in nlls.items():
        if mask.any() and not PROTOCOLS[key].shifts_twice:
            score = Score.of(found[mask])
            metrics[f"key_token_nll_{key.removeprefix('segment_')}"] = score.nll
    return metrics


def document_rows(
    name: str, nlls: Mapping[str, Float[Tensor, "B _"]], sources: Sequence[str]
) -> list[Row]:
    """Return a model's mean NLL of each document; sources are numbered in their order."""
    order = list(dict.fromkeys(sources))
    numbers = [order.index(source) for source in sources]
    return [
        {"model": name, "protocol": key, "document": index, "article": numbers[index], "nll": nll}
        for key, found in nlls.items()
        for index, nll in enumerate(found.double().mean(dim=1).tolist())
    ]


def position_rows(
    name: str, nlls: Mapping[str, Float[Tensor, "B _"]], segment_length: int
) -> list[Row]:
    """Return a model's NLL by position, under `segment` first; see `score_positions`."""
    shown = [key for key in nlls if name in PROTOCOLS[key].by_position]
    return [
        {"model": name, "protocol": key, "position": at, "nll": s.nll, "num_scored": s.num_scored}
        for key in sorted(shown, key=lambda key: key != "segment")
        for at, s in score_positions(nlls[key], segment_length).items()
    ]


def score_positions(nlls: Float[Tensor, "B Scored"], segment_length: int) -> dict[int, Score]:
    """Score documents by the position in its segment of the token that predicts.

    The token at position 0 has seen no other token of its segment. The result has the score of
    each range of positions, by its first: 0, 1, 2 to 3, 4 to 7, and so on.
    """
    positions = (column % segment_length for column in range(nlls.shape[1]))
    begins = torch.tensor([1 << (p.bit_length() - 1) if p else 0 for p in positions])
    return {begin: Score.of(nlls[:, begins == begin]) for begin in begins.unique().tolist()}


def share_histogram(readings: dict[int, MemoryReading], num_bins: int = 20) -> list[Row]:
    """Count the pairs of a query and a head by the memory's share in their output.

    A row has its layer, where its bin begins (the last one holds 1 too), and the share of the
    layer's pairs in it.
    """
    return [
        {
            "layer": layer,
            "memory_share": index / num_bins,
            "share_of_pairs": float(count / reading.share.numel()),
        }
        for layer, reading in readings.items()
        for index, count in enumerate(np.histogram(reading.share.numpy(), num_bins, (0, 1))[0])
    ]
