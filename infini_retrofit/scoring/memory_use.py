"""How much of its memory a model uses: shares, norms, and perplexity with and without it.

Knows nothing of files, training or which models are compared.

Axes:
    B  document
    S  segment of a document, but the first
    T  token of a document
    H  query head
    L  token of a segment
"""

from dataclasses import fields

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from infini_retrofit.layer.probe import MemoryReading, Probe
from infini_retrofit.model.running import run_folded
from infini_retrofit.pipeline.progress import progress
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
    for ids in progress(document_batches(model, documents), "segments, memory read", "batches"):
        probe = Probe(readings={})
        with torch.inference_mode():
            runs += zip(ids, run_folded(model, ids, segment_length, probe), strict=True)
        batches.append(probe.readings)

    def join(layer: int, name: str) -> Tensor:
        return torch.cat([getattr(readings[layer], name)[:, 1:] for readings in batches]).cpu()

    layers = sorted(batches[0]) if documents.shape[1] > segment_length else []
    names = [field.name for field in fields(MemoryReading)]
    return runs, {layer: MemoryReading(*(join(layer, name) for name in names)) for layer in layers}


def memory_use(
    model: PreTrainedModel,
    documents: Int[Tensor, "B T"],
    segment_length: int,
    own: Score,
    readings: dict[int, MemoryReading],
) -> dict[str, float]:
    """Sum up the readings of all layers, and score the documents without the memory.

    `own` is the score of the runs of `run_and_read`, which noted the readings. Shares are over
    pairs of a query and a head, norms are means. The result is empty without readings.
    """
    if not readings:
        return {}
    off = total(score_segments(model, documents, segment_length, "off"))
    share, recalled, local = (
        np.concatenate([getattr(r, name).flatten().numpy() for r in readings.values()])
        for name in ("share", "recalled_norm", "local_norm")
    )
    p05, p50, p95 = np.percentile(share, (5, 50, 95))
    found = {
        "memory_share_mean": float(share.mean(dtype=np.float64)),
        "memory_share_p05": float(p05),
        "memory_share_p50": float(p50),
        "memory_share_p95": float(p95),
        "segment_val_ppl": own.ppl,
        "segment_off_val_ppl": off.ppl,
    }
    if local.any():  # a branch may have no local attention
        quotient = recalled.mean(dtype=np.float64) / local.mean(dtype=np.float64)
        found["recalled_over_local"] = float(quotient)
    return found
