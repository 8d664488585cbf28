"""One model under every protocol.

The same code scores the base, retrofitted models and the control. Knows no files.

Axes:
    B  document
    T  token of a document
"""

import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from infini_retrofit.evaluation.protocols import full_runs, score_positions, score_sliding
from infini_retrofit.evaluation.rival import Rival, make_rival
from infini_retrofit.model.retrofit import has_memory, state_bytes
from infini_retrofit.pipeline.tokens import TestText
from infini_retrofit.scoring.labels import next_token_nlls, t2_nlls
from infini_retrofit.scoring.score import Run, Score, memory_runs, segment_runs, total

# What becomes of a segment when its memory is another: none, what the segment before wrote, or
# another document's.
MEMORY_PROTOCOLS = ("off", "recent", "swapped")
PROTOCOLS = (
    "full",
    "t2",
    "segment",
    *(f"segment_{name}" for name in MEMORY_PROTOCOLS),
    "segment_kv",
)

# Of each document its mean in nats a token, by protocol.
DocumentNlls = Mapping[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class EvalParams:
    """Section `eval` of params.yaml."""

    window: int  # tokens
    stride: int  # tokens
    sliding_tokens: int  # at most, of the test split's stream
    documents: int  # at most, of the test split

    def __post_init__(self) -> None:
        """Refuse values under which a token would be scored twice or never."""
        if not 1 <= self.stride < self.window:
            raise ValueError(
                f"eval.stride must be in 1..{self.window - 1} tokens (less than eval.window, "
                f"or a window's first token has no context), got {self.stride}"
            )
        for name, least in (("sliding_tokens", 2), ("documents", 2)):
            if getattr(self, name) < least:
                value = getattr(self, name)
                raise ValueError(f"eval.{name} must be at least {least}, got {value}")


@dataclass(frozen=True)
class Evaluation:
    """What one model scores.

    Attributes:
        metrics: `<protocol>_test_ppl` for every protocol asked for and `sliding`,
            `full_test_nll` and `segment_test_nll` in nats a token, `state_bytes` that the model
            carries across a segment border, `num_documents`, `num_articles` that these are cut
            from.
        nlls: of every scored token of the documents in nats, by protocol.
    """

    metrics: dict[str, float | int]
    nlls: dict[str, Float[Tensor, "B _"]]

    def of_documents(self) -> DocumentNlls:
        """Return the mean of each document."""
        return {name: nlls.double().mean(dim=1).numpy() for name, nlls in self.nlls.items()}


def evaluate(
    model: PreTrainedModel,
    rival: Rival,
    params: EvalParams,
    text: TestText,
    protocols: Collection[str] = PROTOCOLS,
) -> Evaluation:
    """Score a model under `sliding` and other protocols.

    Asked for `segment_kv` the model is changed at the end: it becomes its own rival.

    Args:
        model: a base or retrofitted model.
        rival: what the model is confined to, and may carry as its own rival.
        params: section `eval`.
        text: the test split.
        protocols: of the documents, `full` and `segment` among them.
    """
    assert {"full", "segment"} <= set(protocols) <= set(PROTOCOLS), protocols
    num_bytes = state_bytes(model)
    scores = {"sliding": score_sliding(model, text.stream, params.window, params.stride)}
    nlls = _document_nlls(model, rival, text.documents, protocols)
    scores |= {name: total(map(Score.of, rows)) for name, rows in nlls.items()}
    metrics: dict[str, float | int] = {f"{k}_test_ppl": s.ppl for k, s in scores.items()}
    for name in ("full", "segment"):
        metrics[f"{name}_test_nll"] = scores[name].nll
    metrics |= {"state_bytes": num_bytes, "num_documents": len(text.documents)}
    return Evaluation(metrics | {"num_articles": len(set(text.titles))}, nlls)


def _document_nlls(
    model: PreTrainedModel,
    rival: Rival,
    documents: Int[Tensor, "B T"],
    protocols: Collection[str],
) -> dict[str, Tensor]:
    """Run the model once for each protocol asked for that can differ from another."""
    length = rival.segment_length

    def scored(runs: Iterable[Run]) -> Tensor:
        return torch.stack([next_token_nlls(model, *run).cpu() for run in runs])

    cut = [name for name in MEMORY_PROTOCOLS if f"segment_{name}" in protocols]
    reads = ("own", *cut) if has_memory(model) else ("own",)
    rows: dict[str, list[Tensor]] = {"t2": [], **{read: [] for read in reads}}
    for runs in memory_runs(model, documents, length, reads):
        rows["t2"].append(t2_nlls(model, *runs["own"], length).cpu())
        for read, run in runs.items():
            rows[read].append(next_token_nlls(model, *run).cpu())
    found = {name: torch.stack(row) for name, row in rows.items()}
    nlls = {"full": scored(full_runs(model, documents)), "t2": found["t2"]}
    nlls["segment"] = found["own"]
    # Where nothing crosses a border there is nothing to switch off, to cut, to swap or to spend.
    for name in cut:
        nlls[f"segment_{name}"] = found.get(name, found["own"])
    if "segment_kv" in protocols:
        nlls["segment_kv"] = found["own"]
        if rival.num_tokens:
            make_rival(model, rival.num_tokens, length)
            nlls["segment_kv"] = scored(segment_runs(model, documents, length))
    return {name: nlls[name] for name in nlls if name in protocols}


def warn_of_length(model: PreTrainedModel, text: TestText) -> None:
    """Warn of documents beyond the positions that a base was trained on."""
    num_positions, num_tokens = model.config.max_position_embeddings, text.documents.shape[1]
    if num_tokens > num_positions:
        print(
            f"warning: documents of {num_tokens} tokens exceed the {num_positions} positions that "
            "the base was trained on: full_test_ppl and gap_recovered extrapolate",
            file=sys.stderr,
        )


def rows_of_documents(
    name: str, evaluation: Evaluation, titles: Sequence[str]
) -> list[dict[str, float | str]]:
    """Turn one model's scores of documents into rows: model, protocol, document, article, nll.

    An article is named by its number in the order of its first document.
    """
    articles = list(dict.fromkeys(titles))
    return [
        {
            "model": name,
            "protocol": protocol,
            "document": document,
            "article": articles.index(titles[document]),
            "nll": float(nll),
        }
        for protocol, nlls in evaluation.of_documents().items()
        for document, nll in enumerate(nlls)
    ]


def read_document_rows(rows: Sequence[Mapping[str, str]]) -> DocumentNlls:
    """Take one model's scores from the rows that `rows_of_documents` made, in their order."""
    protocols = dict.fromkeys(row["protocol"] for row in rows)
    return {
        name: np.array([float(row["nll"]) for row in rows if row["protocol"] == name])
        for name in protocols
    }


def rows_of_positions(
    name: str, evaluation: Evaluation, segment_length: int, protocols: Sequence[str] = ("segment",)
) -> list[dict[str, float | str]]:
    """Turn one model's scores into rows of a plot: model, protocol, position, nll, num_scored.

    A position counts tokens of a segment and stands for a range, see `score_positions`.
    """
    return [
        {
            "model": name,
            "protocol": protocol,
            "position": begin,
            "nll": score.nll,
            "num_scored": score.num_scored,
        }
        for protocol in protocols
        for begin, score in score_positions(evaluation.nlls[protocol], segment_length).items()
    ]
