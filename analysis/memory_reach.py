"""How far back a memory helps: perplexity by how many segments before the scored ones it has read.

The last segments of each test document are scored as if the document had begun 0, 1, 2, ...
segments before them, the same tokens each time. This also cuts off what the hidden states of
lower layers hold of older text, which the protocol `segment_recent` does not. What crosses a
border beside the memory, carried keys and values, counts as read. Beside it stands what the same
model wins from the same text as one segment: full attention, if its local attention is softmax.
Prints a table and writes nothing.

Reads: params.yaml (infini.segment_length, for the base), models, data/longdocs

Axes:
    B  document
    R  row: a beginning of a document, up to the end of a scored segment
    T  token
    D  model width
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from analysis.against import write_lead
from analysis.programs import (
    DOCUMENTS,
    at_least,
    make_parser,
    open_documents,
    open_model,
    print_growing,
)
from infini_retrofit.model.running import run_folded, run_in_layer
from infini_retrofit.pipeline.tokens import read_sources
from infini_retrofit.scoring.score import next_token_nlls

BEGINNINGS_PER_BATCH = 2  # they go through the model at once
WON, INTERVAL = "nats a token over the row above", "95% interval"
HEADER = ["segments read before", "PPL", WON, INTERVAL]
FULL_HEADER = ["PPL, as one segment", f"{WON}, as one segment", f"{INTERVAL}, as one segment"]

# Rows of text in, the last hidden states of each out.
RunModel = Callable[[Int[Tensor, "R T"]], Float[Tensor, "R T D"]]


def main(arguments: Sequence[str] | None = None) -> None:
    """Score one model from ever earlier beginnings and print the table."""
    options = _options(arguments)
    documents = open_documents(options.documents)
    sources = read_sources(DOCUMENTS, options.documents)
    model, length = open_model(options.model)
    num_segments = documents.shape[1] // length
    if max(options.segments) + options.scored > num_segments:
        raise ValueError(
            f"--segments and --scored together must be at most the {num_segments} segments of a "
            f"document, got {max(options.segments)} and {options.scored}"
        )

    def rows() -> Iterator[list[str]]:
        before = None
        for reach in sorted(set(options.segments)):
            scored = score_reach(model, documents, length, reach, options.scored)
            yield [str(reach), *cells(scored, before, sources)]
            before = scored

    print_growing([*HEADER, *FULL_HEADER], rows())


def score_reach(
    model: PreTrainedModel,
    documents: Int[Tensor, "B T"],
    length: int,
    reach: int,
    num_scored: int,
) -> list[Float[Tensor, "B"]]:
    """Score the last segments of documents that begin a few segments before each.

    Args:
        model: a base or retrofitted model.
        documents: of equal length.
        length: of a segment, in tokens.
        reach: how many segments before each scored one are read.
        num_scored: how many segments of a document are scored.

    Returns:
        Nats a token of each document: cut into segments, and as one segment.
    """
    num_segments = documents.shape[1] // length
    ends = range(num_segments - num_scored + 1, num_segments + 1)
    begins = [documents[:, (end - 1 - reach) * length : end * length] for end in ends]
    rows = torch.stack(begins, dim=1).flatten(0, 1)
    runs: list[RunModel] = [
        lambda ids: run_folded(model, ids, length),
        lambda ids: run_in_layer(model, ids, segment_length=ids.shape[1]),
    ]
    return [
        _score_last(model, rows, length, run).unflatten(0, (len(documents), -1)).mean(dim=1)
        for run in runs
    ]


@torch.inference_mode()
def _score_last(
    model: PreTrainedModel, rows: Int[Tensor, "R T"], length: int, run: RunModel
) -> Float[Tensor, "R"]:
    """Return the mean score of each row's last segment, its first token apart."""
    found = []
    batches = rows.to(model.device).split(BEGINNINGS_PER_BATCH)
    for ids in tqdm(batches, desc=f"{rows.shape[1]} tokens", leave=False):
        for row, hidden in zip(ids, run(ids), strict=True):
            found.append(next_token_nlls(model, row[-length:], hidden[-length:]).double().mean())
    return torch.stack(found).cpu()


def cells(
    scored: Sequence[Float[Tensor, "B"]],
    before: Sequence[Float[Tensor, "B"]] | None,
    sources: Sequence[str],
) -> list[str]:
    """Write a row: perplexity and what it wins over a shorter reach, for each way of reading.

    Args:
        scored: nats a token of each document, one tensor for each way of reading.
        before: the same of the row above; None: there is none.
        sources: of each document; documents of one source are not independent.
    """
    found = []
    for way, nlls in enumerate(scored):
        won, interval = "", ""
        if before is not None:
            articles = pd.Index(sources, name="article")
            won, interval = write_lead(pd.Series(before[way] - nlls, articles))
        found += [f"{nlls.mean().exp().item():.3f}", won, interval]
    return found


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    about = "Score a model's last segments from ever earlier beginnings of the document."
    parser = make_parser("memory_reach", about)
    add, default = parser.add_argument, Path("models/finetuned")
    add("model", nargs="?", type=Path, default=default, help="a retrofit, or the base")
    number, segments = at_least(0, "segment"), [0, 1, 2, 4, 8]
    about = "how many segments are read before each scored one, a row of the table for each"
    add("--segments", type=number, nargs="+", default=segments, help=about)
    about = "last segments of each document that are scored"
    add("--scored", type=at_least(1, "segment"), default=4, help=about)
    return parser.parse_args(arguments)
