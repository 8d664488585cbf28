"""How much of its memory a model uses: shares, norms, and perplexity with and without it.

Knows nothing of files, training or which models are compared.

Axes:
    B  document
    S  segment of a document, but the first
    T  token of a document
    H  query head
    L  token of a segment
"""

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from infini_retrofit.layer.probe import MemoryReading, Probe
from infini_retrofit.model.retrofit import has_memory
from infini_retrofit.model.running import run_folded
from infini_retrofit.scoring.score import Run, Score, document_batches, score_segments, total


def run_and_read(
    model: PreTrainedModel, documents: Int[Tensor, "B T"], segment_length: int
) -> tuple[list[Run], dict[int, MemoryReading]]:
    """Run documents as `segment_runs` does, and note the memory's use in the same pass.

    Returns:
        The runs, and by layer what every query reads, (B, S, H, L) each. A document's first
        segment is left out: its memory is empty. No layer without memory is in it, and none
        if documents have one segment.
    """
    runs, batches = [], []
    for ids in document_batches(model, documents):
        probe = Probe(readings={})
        with torch.inference_mode():
            runs += zip(ids, run_folded(model, ids, segment_length, probe), strict=True)
        batches.append(probe.readings)
    layers = sorted(batches[0]) if documents.shape[1] > segment_length else []
    return runs, {layer: _join([readings[layer] for readings in batches]) for layer in layers}


def read_memory(
    model: PreTrainedModel, documents: Int[Tensor, "B T"], segment_length: int
) -> dict[int, MemoryReading]:
    """Return the readings of `run_and_read`; a model without memory does not run."""
    return run_and_read(model, documents, segment_length)[1] if has_memory(model) else {}


def _join(readings: list[MemoryReading]) -> MemoryReading:
    """Join batches of one layer and leave out the first segment of each document."""
    return MemoryReading(
        share=torch.cat([r.share[:, 1:] for r in readings]).cpu(),
        recalled_norm=torch.cat([r.recalled_norm[:, 1:] for r in readings]).cpu(),
        local_norm=torch.cat([r.local_norm[:, 1:] for r in readings]).cpu(),
    )


def memory_use(
    model: PreTrainedModel,
    documents: Int[Tensor, "B T"],
    segment_length: int,
    own: Score,
    readings: dict[int, MemoryReading],
) -> dict[str, float]:
    """Sum up the readings of all layers, and score the documents without the memory.

    `own` is the score of the runs of `run_and_read`, which noted the readings.

    Returns:
        `memory_share_mean`, `_p05`, `_p50` and `_p95` over pairs of a query and a head,
        `recalled_over_local`, the mean norm of what is recalled over that of local attention,
        `segment_val_ppl`, and `segment_off_val_ppl` without the memory. Nothing if there are
        no readings.
    """
    if not readings:
        return {}
    off = total(score_segments(model, documents, segment_length, "off"))
    share, recalled, local = (
        np.concatenate([getattr(r, name).flatten().numpy() for r in readings.values()])
        for name in ("share", "recalled_norm", "local_norm")
    )
    p05, p50, p95 = np.percentile(share, (5, 50, 95))
    return {
        "memory_share_mean": float(share.mean(dtype=np.float64)),
        "memory_share_p05": float(p05),
        "memory_share_p50": float(p50),
        "memory_share_p95": float(p95),
        "recalled_over_local": float(
            recalled.mean(dtype=np.float64) / local.mean(dtype=np.float64)
        ),
        "segment_val_ppl": own.ppl,
        "segment_off_val_ppl": off.ppl,
    }
