"""One model under every protocol.

The same code scores the base, retrofitted models and the control. Knows no files.

Axes:
    B  document
    T  token of a document
    Stream  token of the stream
"""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from infini_retrofit.infini_params import InfiniParams
from infini_retrofit.labels import next_token_nlls, t2_nlls
from infini_retrofit.perplexity import (
    Run,
    Score,
    full_runs,
    memory_runs,
    score_positions,
    score_sliding,
    segment_runs,
    total,
)
from infini_retrofit.retrofit import (
    check_form,
    has_memory,
    infini_modules,
    make_rival,
    state_bytes,
)

# What becomes of a segment when its memory is another: none, what the segment before wrote, or
# another document's.
MEMORY_PROTOCOLS = ("off", "recent", "swapped")


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
class TestText:
    """What models are scored on.

    Attributes:
        stream: the test split's articles, one after another.
        documents: long documents of the test split.
        titles: of the article that each document is cut from.
    """

    stream: Int[Tensor, "Stream"]
    documents: Int[Tensor, "B T"]
    titles: list[str]


@dataclass(frozen=True)
class Evaluation:
    """What one model scores.

    Attributes:
        metrics: `<protocol>_test_ppl` for every protocol, `full_test_nll` and `segment_test_nll`
            in nats a token, `state_bytes` that the model carries across a segment border,
            `num_documents`, `num_articles` that these are cut from.
        nlls: of every scored token of the documents in nats, by protocol.
    """

    metrics: dict[str, float | int]
    nlls: dict[str, Float[Tensor, "B _"]]

    def of_documents(self, protocol: str) -> np.ndarray:
        """Return the mean of each document in nats a token."""
        return self.nlls[protocol].double().mean(dim=1).numpy()


def evaluate(
    model: PreTrainedModel, infini: InfiniParams, params: EvalParams, text: TestText
) -> Evaluation:
    """Score a model under every protocol.

    The model is changed at the end: it becomes its own equal-bytes rival.

    Args:
        model: a base or retrofitted model.
        infini: the form of the retrofit that is compared, whose bytes the rival may spend.
        params: section `eval`.
        text: the test split.
    """
    num_bytes = sum(m.border_bytes for m in infini_modules(model).values())
    scores = {"sliding": score_sliding(model, text.stream, params.window, params.stride)}
    nlls = _document_nlls(model, infini, text.documents)
    scores |= {name: total(map(Score.of, rows)) for name, rows in nlls.items()}
    metrics: dict[str, float | int] = {f"{k}_test_ppl": s.ppl for k, s in scores.items()}
    for name in ("full", "segment"):
        metrics[f"{name}_test_nll"] = scores[name].nll
    metrics |= {"state_bytes": num_bytes, "num_documents": len(text.documents)}
    return Evaluation(metrics | {"num_articles": len(set(text.titles))}, nlls)


def _document_nlls(
    model: PreTrainedModel, infini: InfiniParams, documents: Int[Tensor, "B T"]
) -> dict[str, Tensor]:
    """Run the model once for each protocol that can differ from another."""
    length = infini.segment_length

    def scored(runs: Iterable[Run]) -> Tensor:
        return torch.stack([next_token_nlls(model, *run).cpu() for run in runs])

    reads = ("own", *MEMORY_PROTOCOLS) if has_memory(model) else ("own",)
    rows: dict[str, list[Tensor]] = {"t2": [], **{read: [] for read in reads}}
    for runs in memory_runs(model, documents, length, reads):
        rows["t2"].append(t2_nlls(model, *runs["own"], length).cpu())
        for read, run in runs.items():
            rows[read].append(next_token_nlls(model, *run).cpu())
    found = {name: torch.stack(row) for name, row in rows.items()}
    nlls = {"full": scored(full_runs(model, documents)), "t2": found["t2"]}
    nlls["segment"] = found["own"]
    # Where nothing crosses a border there is nothing to switch off, to cut, to swap or to spend.
    for name in MEMORY_PROTOCOLS:
        nlls[f"segment_{name}"] = found.get(name, found["own"])
    nlls["segment_kv"] = found["own"]
    if state_bytes(model, infini):
        make_rival(model, infini)
        nlls["segment_kv"] = scored(segment_runs(model, documents, length))
    return nlls


def check_fit(model: PreTrainedModel, infini: InfiniParams, text: TestText) -> None:
    """Refuse a form that does not fit the base, and warn of documents beyond its positions.

    Raises:
        ValueError: if there are layers that the base does not have, or sizes beyond its own.
    """
    check_form(infini, model.config)
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
        for protocol in evaluation.nlls
        for document, nll in enumerate(evaluation.of_documents(protocol))
    ]


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
