"""How much a finished model's neural cache wins with fewer slots.

The model was trained with all of them. Prints a table.

Reads:  data/longdocs, models/base, models/finetuned
Writes: results/slots.tsv
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from analysis.programs import (
    DOCUMENTS,
    make_parser,
    open_documents,
    open_model,
    print_growing,
)
from infini_retrofit.evaluation.bootstrap import paired_bootstrap
from infini_retrofit.layer.attention import InfiniAttention
from infini_retrofit.layer.probe import Probe
from infini_retrofit.model.retrofit import infini_modules
from infini_retrofit.model.running import run_folded
from infini_retrofit.pipeline.files import verify_manifest, write_text
from infini_retrofit.pipeline.tokens import read_sources
from infini_retrofit.scoring.score import next_token_nlls

FINETUNED = Path("models/finetuned")
BYTES = (50_000, 100_000, 200_000)  # at most; then all that the model has
ROWS = Path("results/slots.tsv")


def main(arguments: Sequence[str] | None = None) -> None:
    """Score the model with each size, and print a row of the table as soon as it is there."""
    about = "Score models/finetuned, whose memory is a neural cache, with fewer slots."
    options = make_parser("slots", about, least_documents=2).parse_args(arguments)
    documents = open_documents(options.documents)
    sources = read_sources(DOCUMENTS, options.documents)
    verify_manifest(FINETUNED, made_by="dvc repro finetune")
    model, segment_length = open_model(FINETUNED)
    caches = [m for m in infini_modules(model).values() if m.memory and m.memory.num_slots]
    if len(caches) != 1:
        raise ValueError(f"models/finetuned must have one neural cache, got {len(caches)}")
    documents, found = documents.to(model.device), []
    without = score(model, documents, segment_length, "off")

    def rows() -> Iterator[list[str]]:
        for num_slots in slots_of(caches[0]):
            caches[0].memory.num_slots = num_slots
            gains = (without - score(model, documents, segment_length, "own")).tolist()
            size = caches[0].state_bytes
            found.extend(
                {"slots": num_slots, "bytes": size, "source": source, "gain": gain}
                for source, gain in zip(sources, gains, strict=True)
            )
            gain, low, high = paired_bootstrap(gains, sources)
            yield [f"{num_slots:,}", f"{size:,}", f"{gain:.4f}", f"{low:.4f} to {high:.4f}"]

    print_growing(["tokens kept", "bytes", "nats a token won", "95% interval"], rows())
    write_text(ROWS, pd.DataFrame(found).to_csv(sep="\t", index=False, float_format="%.6f"))


def slots_of(cache: InfiniAttention) -> list[int]:
    """Return how many slots fit each of `BYTES`, and all that the memory has."""
    most = cache.memory.num_slots
    per_slot = cache.state_bytes // most
    return [*(size // per_slot for size in BYTES if size < cache.state_bytes), most]


@torch.inference_mode()
def score(
    model: PreTrainedModel, documents: Int[Tensor, "B T"], segment_length: int, read: str
) -> Float[Tensor, "B"]:
    """Return the mean NLL of each document that reads its own memory, or none."""
    nlls = []
    for ids in tqdm(documents, desc=f"memory {read}", leave=False):
        hidden = run_folded(model, ids[None], segment_length, Probe(read=read))[0]
        nlls.append(next_token_nlls(model, ids, hidden).double().mean())
    return torch.stack(nlls)
