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
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from analysis.against import write_interval
from infini_retrofit.evaluation.gains import MIN_GROUPS_FOR_INTERVAL, paired_bootstrap
from infini_retrofit.model.base import load_base
from infini_retrofit.model.checkpoints import load_retrofit
from infini_retrofit.model.running import run_folded, run_in_layer
from infini_retrofit.pipeline.device import start_run
from infini_retrofit.pipeline.files import render, verify_manifest
from infini_retrofit.pipeline.guard import run_stage
from infini_retrofit.pipeline.params import load_section
from infini_retrofit.pipeline.tokens import read_documents, read_titles
from infini_retrofit.scoring.labels import next_token_nlls

BASE, DOCUMENTS = Path("models/base"), Path("data/longdocs/test.parquet")
BEGINNINGS_PER_BATCH = 2  # they go through the model at once
HEADER = ["segments read before", "PPL", "nats a token over the row above", "95% interval"]
FULL = ["PPL, as one segment", "nats over the row above", "95% interval"]

# Rows of text in, the last hidden states of each out.
RunModel = Callable[[Int[Tensor, "R T"]], Float[Tensor, "R T D"]]


def main(arguments: Sequence[str] | None = None) -> None:
    """Score one model from ever earlier beginnings and print the table."""
    options = _options(arguments)
    verify_manifest(BASE, made_by="dvc repro prepare_base")
    documents = read_documents(DOCUMENTS, options.documents)
    titles = read_titles(DOCUMENTS, options.documents)
    device, dtype = start_run()
    if options.model == BASE:
        model, length = load_base(BASE, dtype), load_section(int, "infini.segment_length")
    else:
        model, form = load_retrofit(BASE, options.model, dtype)
        length = form.segment_length
    num_segments = documents.shape[1] // length
    if max(options.segments) + options.scored > num_segments:
        raise ValueError(
            f"--segments and --scored together must be at most the {num_segments} segments of a "
            f"document, got {max(options.segments)} and {options.scored}"
        )
    model, rows, before = model.to(device), [], None
    for reach in sorted(set(options.segments)):
        scored = score_reach(model, documents, length, reach, options.scored)
        rows.append([str(reach), *cells(scored, before, titles)])
        before = scored
        print(render([*HEADER, *FULL], rows), file=sys.stderr)
    print(render([*HEADER, *FULL], rows))


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
    titles: Sequence[str],
) -> list[str]:
    """Lay out a row: perplexity, and what it wins over a shorter reach, each way of reading.

    Args:
        scored: nats a token of each document, one tensor for each way of reading.
        before: the same of the row above; None: there is none.
        titles: of each document's article; documents of one article are not independent.
    """
    found = []
    for way, nlls in enumerate(scored):
        found += [f"{nlls.mean().exp().item():.3f}", "", ""]
        if before is not None:
            gain = paired_bootstrap((before[way] - nlls).numpy(), titles)
            found[-2] = f"{gain.mean:+.4f}"
            if len(set(titles)) >= MIN_GROUPS_FOR_INTERVAL:
                found[-1] = write_interval(gain.low, gain.high)
    return found


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    about = "Score a model's last segments from ever earlier beginnings of the document."
    parser = argparse.ArgumentParser(
        prog="python -m analysis.memory_reach",
        description=about,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add, default = parser.add_argument, Path("models/finetuned")
    add("model", nargs="?", type=Path, default=default, help="a retrofit, or the base")
    reaches = "how many segments are read before each scored one, a row of the table for each"
    add("--segments", type=int, nargs="+", default=[0, 1, 2, 4, 8], help=reaches)
    add("--scored", type=int, default=4, help="last segments of each document that are scored")
    add("--documents", type=int, default=2, help="test documents to score")
    options = parser.parse_args(arguments)
    for name, unit, least in (("scored", "segment", 1), ("documents", "document", 1)):
        if (got := getattr(options, name)) < least:
            parser.error(f"--{name} must be at least {least} {unit}, got {got}")
    if min(options.segments) < 0:
        parser.error(f"--segments must be at least 0 segments, got {min(options.segments)}")
    return options


if __name__ == "__main__":
    run_stage(main)
