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

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from infini_retrofit.layer.probe import MemoryReading
from infini_retrofit.model.running import run_in_layer
from infini_retrofit.scoring.labels import next_token_nlls
from infini_retrofit.scoring.score import Run, Score, total

# Windows that go through the model at once; memory, not speed, bounds it.
WINDOWS_PER_BATCH = 8


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


def full_runs(model: PreTrainedModel, documents: Int[Tensor, "B T"]) -> Iterator[Run]:
    """Run documents under full attention; an Infini layer sees one segment, memory empty."""
    for ids in tqdm(documents.to(model.device), desc="full attention", leave=False):
        with torch.inference_mode():
            hidden_states = run_in_layer(model, ids[None], segment_length=len(ids))[0]
        yield ids, hidden_states


def score_full(model: PreTrainedModel, documents: Int[Tensor, "B T"]) -> list[Score]:
    """Score documents under full attention; see `full_runs`."""
    return [Score.of(next_token_nlls(model, *run)) for run in full_runs(model, documents)]


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


def share_histogram(
    readings: dict[int, MemoryReading], num_bins: int = 20
) -> list[dict[str, int | float]]:
    """Count how large a share of the memory each layer's queries and heads take.

    Returns:
        Rows of a plot: layer, memory_share (where the bin begins; the last one holds 1 as
        well), share_of_pairs (of the layer's pairs of a query and a head).
    """
    rows = []
    for layer, reading in readings.items():
        counts, _ = np.histogram(reading.share.numpy(), bins=num_bins, range=(0, 1))
        rows += [
            {
                "layer": layer,
                "memory_share": index / num_bins,
                "share_of_pairs": float(count / reading.share.numel()),
            }
            for index, count in enumerate(counts)
        ]
    return rows
