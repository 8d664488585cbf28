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

from infini_retrofit.carrier import Carrier, Read
from infini_retrofit.labels import next_token_nlls
from infini_retrofit.segments import run_folded, run_in_layer, run_swapped

# Windows that go through the model at once; memory, not speed, bounds it.
WINDOWS_PER_BATCH = 8
DOCUMENTS_PER_BATCH = 2

# A document's or row's ids, (T), and its last hidden states, (T D).
Run = tuple[Tensor, Tensor]
# Whose memory a document reads: as a `Carrier` says, or another document's.
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


@dataclass(frozen=True)
class Span:
    """One window of a sliding evaluation, tokens [begin, end) of the stream."""

    begin: int
    end: int
    num_scored: int  # the last tokens of the window, not scored by a window before


def sliding_spans(num_tokens: int, window: int, stride: int) -> Iterator[Span]:
    """Cut a token stream into overlapping windows that score each token but the first once.

    Args:
        num_tokens: of the stream, at least 2.
        window: most tokens the model sees at once.
        stride: tokens between the starts of two windows, fewer than `window`, so that every
            scored token has context.
    """
    assert 1 <= stride < window
    assert num_tokens >= 2
    scored_to = 1
    for begin in range(0, num_tokens, stride):
        end = min(begin + window, num_tokens)
        yield Span(begin, end, num_scored=end - scored_to)
        scored_to = end
        if end == num_tokens:
            return


@torch.inference_mode()
def score_sliding(
    model: PreTrainedModel, tokens: Int[Tensor, "T"], window: int, stride: int
) -> Score:
    """Score a stream in overlapping windows; memory starts empty in each (in-layer)."""
    spans = list(sliding_spans(len(tokens), window, stride))
    batches = [*_batches(spans[:-1], WINDOWS_PER_BATCH), spans[-1:]]
    scores = []
    for batch in tqdm(batches, desc="sliding", leave=False):
        rows = torch.stack([tokens[span.begin : span.end] for span in batch]).to(model.device)
        for span, row, hidden in zip(batch, rows, run_in_layer(model, rows), strict=True):
            context = len(row) - span.num_scored - 1
            scores.append(Score.of(next_token_nlls(model, row[context:], hidden[context:])))
    return total(scores)


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
    found, carrier = {}, Carrier(found={} if "swapped" in reads else None)
    if "own" in reads or "swapped" in reads:
        found["own"] = run_folded(model, ids, segment_length, carrier=carrier)
    for read in reads:
        if read == "swapped":
            found[read] = run_swapped(model, ids, segment_length, carrier.found)
        elif read != "own":
            found[read] = run_folded(model, ids, segment_length, read)
    return found


def full_runs(model: PreTrainedModel, documents: Int[Tensor, "B T"]) -> Iterator[Run]:
    """Run documents under full attention; an Infini layer sees one segment, memory empty."""
    for ids in tqdm(documents.to(model.device), desc="full attention", leave=False):
        with torch.inference_mode():
            hidden_states = run_in_layer(model, ids[None], segment_length=len(ids))[0]
        yield ids, hidden_states


def score_segments(
    model: PreTrainedModel,
    documents: Int[Tensor, "B T"],
    segment_length: int,
    read: Whose = "own",
) -> list[Score]:
    """Score documents of which every layer sees one segment at a time; see `segment_runs`."""
    runs = segment_runs(model, documents, segment_length, read)
    return [Score.of(next_token_nlls(model, *run)) for run in runs]


def score_full(model: PreTrainedModel, documents: Int[Tensor, "B T"]) -> list[Score]:
    """Score documents under full attention; see `full_runs`."""
    return [Score.of(next_token_nlls(model, *run)) for run in full_runs(model, documents)]


@torch.inference_mode()
def score_rows(model: PreTrainedModel, rows: Int[Tensor, "B T"]) -> list[Score]:
    """Score rows that the base's layers see whole, memory empty at each start (in-layer)."""
    rows = rows.to(model.device)
    hidden_states = (run_in_layer(model, ids[None])[0] for ids in rows)
    return [
        Score.of(next_token_nlls(model, ids, hidden))
        for ids, hidden in zip(rows, hidden_states, strict=True)
    ]


def score_positions(nlls: Float[Tensor, "B Scored"], segment_length: int) -> dict[int, Score]:
    """Score documents by how far into its segment the token stands that predicts.

    Position 0 has seen no other token of its segment: here a segment's cold start shows.

    Args:
        nlls: of every token but each document's first.
        segment_length: tokens.

    Returns:
        A score for each range of positions, by its first one: 0, 1, 2 to 3, 4 to 7, and so on.
    """
    positions = (column % segment_length for column in range(nlls.shape[1]))
    begins = torch.tensor([1 << (p.bit_length() - 1) if p else 0 for p in positions])
    return {begin: Score.of(nlls[:, begins == begin]) for begin in begins.unique().tolist()}


def score_unigram(train: Int[Tensor, "Train"], test: Int[Tensor, "Test"], vocab_size: int) -> Score:
    """Score a stream by how often each word stands in another, counts plus one."""
    counts = torch.bincount(train, minlength=vocab_size).double() + 1
    nlls = -(counts / counts.sum()).log()[test[1:]]
    return Score(nlls.sum().item(), len(nlls))


def _batches(items: Sequence, size: int) -> list[Sequence]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def _document_batches(documents: Int[Tensor, "B T"]) -> list[Tensor]:
    """Batch documents so that none is alone: each needs another whose memory it can read."""
    sizes = [DOCUMENTS_PER_BATCH] * (len(documents) // DOCUMENTS_PER_BATCH)
    if not sizes:
        return [documents]
    sizes[-1] += len(documents) % DOCUMENTS_PER_BATCH
    return list(documents.split(sizes))
