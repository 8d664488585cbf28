"""What a model takes out of its memory: shares, norms, and its perplexity with and without.

Knows nothing of files, training or which models are compared.

Axes:
    B  document
    S  segment of a document, but the first
    T  token of a document
    D  model width
    H  query head
    L  token of a segment
"""

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from infini_retrofit.layer.probe import MemoryReading, Probe
from infini_retrofit.model.retrofit import has_memory
from infini_retrofit.model.running import run_folded
from infini_retrofit.scoring.labels import next_token_nlls
from infini_retrofit.scoring.score import DOCUMENTS_PER_BATCH, Score, score_segments, total


def read_memory(
    model: PreTrainedModel, input_ids: Int[Tensor, "B T"], segment_length: int
) -> dict[int, MemoryReading]:
    """Note what every query of every segment but the first reads, by layer (folded).

    A document's first segment finds a memory that nothing was written to.

    Returns:
        Readings (B, S, H, L); none of a model without memory, nor of documents of one segment.
    """
    return _join([readings for readings, _, _ in _runs(model, input_ids, segment_length)])


def _runs(
    model: PreTrainedModel, input_ids: Int[Tensor, "B T"], segment_length: int
) -> Iterator[tuple[dict[int, MemoryReading], Int[Tensor, "_ T"], Float[Tensor, "_ T D"]]]:
    """Run batches of documents: what each layer reads, the ids, the last hidden states."""
    if not has_memory(model) or input_ids.shape[1] <= segment_length:
        return
    for ids in input_ids.to(model.device).split(DOCUMENTS_PER_BATCH):
        probe = Probe(readings={})
        with torch.no_grad():
            hidden_states = run_folded(model, ids, segment_length, probe)
        yield probe.readings, ids, hidden_states


def _join(batches: list[dict[int, MemoryReading]]) -> dict[int, MemoryReading]:
    """Put batches together, by layer."""
    layers = sorted(batches[0]) if batches else []
    return {layer: _join_documents([batch[layer] for batch in batches]) for layer in layers}


def _join_documents(readings: list[MemoryReading]) -> MemoryReading:
    """Put documents together and leave out the first segment of each."""
    return MemoryReading(
        share=torch.cat([r.share[:, 1:] for r in readings]).cpu(),
        recalled_norm=torch.cat([r.recalled_norm[:, 1:] for r in readings]).cpu(),
        local_norm=torch.cat([r.local_norm[:, 1:] for r in readings]).cpu(),
    )


def memory_use(
    model: PreTrainedModel, input_ids: Int[Tensor, "B T"], segment_length: int
) -> dict[str, float]:
    """Say in a few numbers how much of its memory a model uses, over all layers together.

    Returns:
        `memory_share_mean`, `_p05`, `_p50` and `_p95` over pairs of a query and a head,
        `recalled_over_local`, the mean norm of what is recalled over that of local attention,
        `segment_val_ppl`, and `segment_off_val_ppl` without the memory. Nothing for a model
        without memory, nor for documents of one segment.
    """
    batches, scores = [], []
    for batch, ids, hidden_states in _runs(model, input_ids, segment_length):
        batches.append(batch)
        rows = zip(ids, hidden_states, strict=True)
        scores += [Score.of(next_token_nlls(model, *row)) for row in rows]
    if not batches:
        return {}
    off = total(score_segments(model, input_ids, segment_length, "off"))
    return _use(_join(batches)) | {
        "segment_val_ppl": total(scores).ppl,
        "segment_off_val_ppl": off.ppl,
    }


def _use(readings: dict[int, MemoryReading]) -> dict[str, float]:
    """Pool shares and norms over layers."""
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
    }
