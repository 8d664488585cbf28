"""Run documents as training and evaluation score them, label their tokens and sum the scores.

A score is a sum of negative log-likelihoods in nats, float64, and the number of tokens in it.
Every token but the first of a row is scored exactly once. Knows nothing of training, files or
which models are compared.

Axes:
    *B  any leading axes: documents, or none
    B  document or row
    T  token
    D  model width
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from infini_retrofit.layer.probe import Probe, Read
from infini_retrofit.model.running import run_folded, run_in_layer, run_swapped
from infini_retrofit.pipeline.progress import progress
from infini_retrofit.scoring.losses import token_nlls

DOCUMENTS_PER_BATCH = 2
# The ids of a document or row, (T), and its last hidden states, (T D).
Run = tuple[Tensor, Tensor]
# Hidden states that predict, (N D), and the label of each, (N).
StatesAndLabels = tuple[Tensor, Tensor]
# The memory that a document reads: see `Read`, or another document's.
MemoryRead = Literal[Read, "swapped"]


@dataclass(frozen=True)
class Score:
    """A sum over scored tokens."""

    nll_sum: float  # negative log-likelihood in nats
    num_scored: int

    @classmethod
    def of(cls, nlls: Float[Tensor, "*T"]) -> "Score":
        """Sum the scores of tokens."""
        return cls(nlls.double().sum().item(), nlls.numel())

    @property
    def nll(self) -> float:
        """Mean nats per scored token."""
        return self.nll_sum / self.num_scored

    @property
    def ppl(self) -> float:
        """Perplexity, see `perplexity`."""
        return perplexity(self.nll)


def perplexity(nll: float) -> float:
    """Return exp(nll) for nats a token; exp(700) above 700 nats, for a metric must be finite."""
    return math.exp(min(nll, 700))


def total(scores: Iterable[Score]) -> Score:
    """Add scores; the sum is divided once, at the end, by all tokens."""
    scores = list(scores)
    return Score(sum(s.nll_sum for s in scores), sum(s.num_scored for s in scores))


def next_tokens(
    ids: Int[Tensor, "*B T"], hidden_states: Float[Tensor, "*B T D"]
) -> StatesAndLabels:
    """Label every position of a row but the last with the next token."""
    return hidden_states[..., :-1, :].flatten(0, -2), ids[..., 1:].flatten()


def tokens_after_next(
    ids: Int[Tensor, "*B T"], hidden_states: Float[Tensor, "*B T D"], segment_length: int
) -> StatesAndLabels:
    """Label as the seeds did, shifting twice: in a segment, position t with token t + 2.

    The seeds left a segment's last token out of the input. Here it is part of it, so that a
    memory or context carried over holds it as well.
    """
    segments = (-1, segment_length)
    hidden_states = hidden_states.unflatten(-2, segments)[..., :-2, :].flatten(0, -2)
    return hidden_states, ids.unflatten(-1, segments)[..., 2:].flatten()


@torch.inference_mode()
def next_token_nlls(
    model: PreTrainedModel, ids: Int[Tensor, "T"], hidden_states: Float[Tensor, "T D"]
) -> Float[Tensor, "T-1"]:
    """Score every token of a row but the first, in nats."""
    predicting, labels = next_tokens(ids, hidden_states)
    head = model.get_output_embeddings()
    return token_nlls(predicting, head.weight, labels, head.bias)


@torch.inference_mode()
def t2_nlls(
    model: PreTrainedModel,
    ids: Int[Tensor, "T"],
    hidden_states: Float[Tensor, "T D"],
    segment_length: int,
) -> Float[Tensor, "_"]:
    """Score a document as the seeds did, in nats; see `tokens_after_next`."""
    predicting, labels = tokens_after_next(ids, hidden_states, segment_length)
    head = model.get_output_embeddings()
    return token_nlls(predicting, head.weight, labels, head.bias)


def score_runs(model: PreTrainedModel, runs: Iterable[Run]) -> list[Score]:
    """Score the next token everywhere in each run of a model."""
    return [Score.of(next_token_nlls(model, *run)) for run in runs]


@torch.inference_mode()
def score_rows(model: PreTrainedModel, rows: Int[Tensor, "B T"]) -> list[Score]:
    """Score rows that the base's layers see whole, each with an empty memory (in-layer)."""
    rows = progress(rows.to(model.device), "whole samples", "samples")
    return score_runs(model, ((ids, run_in_layer(model, ids[None])[0]) for ids in rows))


def score_segments(
    model: PreTrainedModel,
    documents: Int[Tensor, "B T"],
    segment_length: int,
    read: MemoryRead = "own",
) -> list[Score]:
    """Score documents of which every layer sees one segment at a time; see `segment_runs`."""
    return score_runs(model, segment_runs(model, documents, segment_length, read))


def segment_runs(
    model: PreTrainedModel,
    documents: Int[Tensor, "B T"],
    segment_length: int,
    read: MemoryRead = "own",
) -> Iterator[Run]:
    """Run documents of which every layer sees one segment at a time (folded)."""
    for runs in memory_runs(model, documents, segment_length, (read,)):
        yield runs[read]


def memory_runs(
    model: PreTrainedModel,
    documents: Int[Tensor, "B T"],
    segment_length: int,
    reads: Sequence[MemoryRead],
) -> Iterator[dict[MemoryRead, Run]]:
    """Run documents as `segment_runs` does, once for each memory to read.

    The memories to swap, of at least 2 documents, come from the run that reads its own.
    """
    if "swapped" in reads and len(documents) < 2:
        raise ValueError("swapped memories need at least 2 documents, got 1")
    name = f"segments, memory {', '.join(reads)}"
    for ids in progress(document_batches(model, documents), name, "batches"):
        found, probe = {}, Probe(memories={} if "swapped" in reads else None)
        with torch.inference_mode():
            if "own" in reads or "swapped" in reads:
                found["own"] = run_folded(model, ids, segment_length, probe)
            for read in reads:
                if read == "swapped":
                    found[read] = run_swapped(model, ids, segment_length, probe.memories)
                elif read != "own":
                    found[read] = run_folded(model, ids, segment_length, Probe(read=read))
        for row, document in enumerate(ids):
            yield {read: (document, found[read][row]) for read in reads}


def document_batches(
    model: PreTrainedModel, documents: Int[Tensor, "B T"]
) -> list[Int[Tensor, "_ T"]]:
    """Batch documents on the model's device; none is alone, so that memories can be swapped."""
    begins = range(DOCUMENTS_PER_BATCH, len(documents) - 1, DOCUMENTS_PER_BATCH)
    return list(documents.to(model.device).tensor_split(list(begins)))
