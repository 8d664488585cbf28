"""Run documents as training and evaluation score them, and sum the scores.

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
from tqdm import tqdm
from transformers import PreTrainedModel

from infini_retrofit.layer.probe import Probe, Read
from infini_retrofit.model.running import run_folded, run_in_layer, run_swapped
from infini_retrofit.scoring.labels import next_token_nlls

DOCUMENTS_PER_BATCH = 2
# The ids of a document or row, (T), and its last hidden states, (T D).
Run = tuple[Tensor, Tensor]
# The memory that a document reads: see `Read`, or another document's.
Whose = Literal[Read, "swapped"]


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


def score_runs(model: PreTrainedModel, runs: Iterable[Run]) -> Score:
    """Score the next token everywhere in some runs of a model."""
    return total(Score.of(next_token_nlls(model, *run)) for run in runs)


@torch.inference_mode()
def score_rows(model: PreTrainedModel, rows: Int[Tensor, "B T"]) -> list[Score]:
    """Score rows that the base's layers see whole, each with an empty memory (in-layer)."""
    runs = ((ids, run_in_layer(model, ids[None])[0]) for ids in rows.to(model.device))
    return [Score.of(next_token_nlls(model, *run)) for run in runs]


def score_segments(
    model: PreTrainedModel,
    documents: Int[Tensor, "B T"],
    segment_length: int,
    read: Whose = "own",
) -> list[Score]:
    """Score documents of which every layer sees one segment at a time; see `segment_runs`."""
    runs = segment_runs(model, documents, segment_length, read)
    return [Score.of(next_token_nlls(model, *run)) for run in runs]


def segment_runs(
    model: PreTrainedModel,
    documents: Int[Tensor, "B T"],
    segment_length: int,
    read: Whose = "own",
) -> Iterator[Run]:
    """Run documents of which every layer sees one segment at a time (folded)."""
    for runs in memory_runs(model, documents, segment_length, (read,)):
        yield runs[read]


def memory_runs(
    model: PreTrainedModel,
    documents: Int[Tensor, "B T"],
    segment_length: int,
    reads: Sequence[Whose],
) -> Iterator[dict[Whose, Run]]:
    """Run documents as `segment_runs` does, once for each memory to read.

    Raises:
        ValueError: if memories are to be swapped and there is only one document.
    """
    if "swapped" in reads and len(documents) < 2:
        raise ValueError("swapped memories need at least 2 documents, got 1")
    name = f"segments, memory {', '.join(reads)}"
    for ids in tqdm(document_batches(model, documents), desc=name, leave=False):
        with torch.inference_mode():
            hidden_states = _hidden_states(model, ids, segment_length, reads)
        for row, document in enumerate(ids):
            yield {read: (document, hidden_states[read][row]) for read in reads}


def _hidden_states(
    model: PreTrainedModel, ids: Int[Tensor, "B T"], segment_length: int, reads: Sequence[Whose]
) -> dict[Whose, Float[Tensor, "B T D"]]:
    """Run one batch; the memories to swap come from the run that reads its own."""
    results, probe = {}, Probe(memories={} if "swapped" in reads else None)
    if "own" in reads or "swapped" in reads:
        results["own"] = run_folded(model, ids, segment_length, probe)
    for read in reads:
        if read == "swapped":
            results[read] = run_swapped(model, ids, segment_length, probe.memories)
        elif read != "own":
            results[read] = run_folded(model, ids, segment_length, Probe(read=read))
    return results


def document_batches(
    model: PreTrainedModel, documents: Int[Tensor, "B T"]
) -> list[Int[Tensor, "_ T"]]:
    """Batch documents on the model's device; none is alone, so that memories can be swapped."""
    documents = documents.to(model.device)
    sizes = [DOCUMENTS_PER_BATCH] * (len(documents) // DOCUMENTS_PER_BATCH)
    if not sizes:
        return [documents]
    sizes[-1] += len(documents) % DOCUMENTS_PER_BATCH
    return list(documents.split(sizes))
