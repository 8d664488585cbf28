"""The protocols under which this project scores a model; see README.md for their names.

A score is a sum of negative log-likelihoods in nats, float64, and the number of tokens in it.
Every token but the first of a stream or document is scored exactly once (t2 apart). Nothing here
knows of training, files or which models are compared.

Axes:
    *B  any leading axes: documents, or none
    B  document or window
    T  token
    D  model width
    Scored  token of a document but the first
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


# A document's or row's ids, (T), and its last hidden states, (T D).
Run = tuple[Tensor, Tensor]


# Whose memory a document reads: as a `Probe` says, or another document's.
Whose = Literal[Read, "swapped"]


@dataclass(frozen=True)
class Score:
    """A sum over scored tokens.

    Attributes:
        nll_sum: negative log-likelihood in nats.
        num_scored: tokens.
    """

    nll_sum: float
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
        """Perplexity; infinite where it exceeds what a float holds."""
        return math.exp(self.nll) if self.nll < 700 else math.inf


def total(scores: Iterable[Score]) -> Score:
    """Add scores up: divide once, at the end, by tokens."""
    scores = list(scores)
    return Score(sum(s.nll_sum for s in scores), sum(s.num_scored for s in scores))


def segment_runs(
    model: PreTrainedModel,
    documents: Int[Tensor, "B T"],
    segment_length: int,
    read: Whose = "own",
) -> Iterator[Run]:
    """Run documents of which every layer sees one segment at a time (folded).

    Raises:
        ValueError: if memories are to be swapped and there is only one document.
    """
    for runs in memory_runs(model, documents, segment_length, (read,)):
        yield runs[read]


def memory_runs(
    model: PreTrainedModel,
    documents: Int[Tensor, "B T"],
    segment_length: int,
    reads: Sequence[Whose],
) -> Iterator[dict[Whose, Run]]:
    """Run documents as `segment_runs` does, once for each memory that they are to read.

    Raises:
        ValueError: if memories are to be swapped and there is only one document.
    """
    if "swapped" in reads and len(documents) < 2:
        raise ValueError("swapped memories need at least 2 documents, got 1")
    name = f"segments, memory {', '.join(reads)}"
    for batch in tqdm(_document_batches(documents), desc=name, leave=False):
        ids = batch.to(model.device)
        with torch.inference_mode():
            hidden_states = _hidden_states(model, ids, segment_length, reads)
        for row, document in enumerate(ids):
            yield {read: (document, hidden_states[read][row]) for read in reads}


def _hidden_states(
    model: PreTrainedModel, ids: Int[Tensor, "B T"], segment_length: int, reads: Sequence[Whose]
) -> dict[Whose, Float[Tensor, "B T D"]]:
    """Run one batch; what is swapped is found in the run of `own`, whether asked for or not."""
    found, probe = {}, Probe(memories={} if "swapped" in reads else None)
    if "own" in reads or "swapped" in reads:
        found["own"] = run_folded(model, ids, segment_length, probe)
    for read in reads:
        if read == "swapped":
            found[read] = run_swapped(model, ids, segment_length, probe.memories)
        elif read != "own":
            found[read] = run_folded(model, ids, segment_length, Probe(read=read))
    return found


def score_segments(
    model: PreTrainedModel,
    documents: Int[Tensor, "B T"],
    segment_length: int,
    read: Whose = "own",
) -> list[Score]:
    """Score documents of which every layer sees one segment at a time; see `segment_runs`."""
    runs = segment_runs(model, documents, segment_length, read)
    return [Score.of(next_token_nlls(model, *run)) for run in runs]


@torch.inference_mode()
def score_rows(model: PreTrainedModel, rows: Int[Tensor, "B T"]) -> list[Score]:
    """Score rows that the base's layers see whole, memory empty at each start (in-layer)."""
    rows = rows.to(model.device)
    hidden_states = (run_in_layer(model, ids[None])[0] for ids in rows)
    return [
        Score.of(next_token_nlls(model, ids, hidden))
        for ids, hidden in zip(rows, hidden_states, strict=True)
    ]


def _document_batches(documents: Int[Tensor, "B T"]) -> list[Tensor]:
    """Batch documents so that none is alone: each needs another whose memory it can read."""
    sizes = [DOCUMENTS_PER_BATCH] * (len(documents) // DOCUMENTS_PER_BATCH)
    if not sizes:
        return [documents]
    sizes[-1] += len(documents) % DOCUMENTS_PER_BATCH
    return list(documents.split(sizes))
