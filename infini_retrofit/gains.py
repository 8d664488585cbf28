"""What a model gains over what it must beat, and how sure that is.

Knows scores only: no models and no files.
"""

import sys
from collections.abc import Sequence

import numpy as np

from infini_retrofit.bootstrap import MIN_GROUPS_FOR_INTERVAL, paired_bootstrap
from infini_retrofit.evaluation import MEMORY_PROTOCOLS, Evaluation


def gains(model: Evaluation, control: Evaluation, titles: Sequence[str]) -> dict[str, float]:
    """Compare a model with what it must beat, document by document.

    Its rival at equal bytes is its own or the control's, whichever is better over all documents.

    Args:
        model: what its memory gains is asked for.
        control: what was trained alike without a memory.
        titles: of each document's article; documents of one article are not independent.

    Returns:
        `gain_over_<other>`, the nats a token by which the model is better, and, given enough
        articles, the ends of its 95% paired bootstrap interval, `_low` and `_high`.
    """
    rivals = [evaluation.of_documents("segment_kv") for evaluation in (model, control)]
    others = {
        **{name: model.of_documents(f"segment_{name}") for name in MEMORY_PROTOCOLS},
        "control": control.of_documents("segment"),
        "kv": min(rivals, key=np.mean),
    }
    metrics = {}
    for name, other in others.items():
        gain = paired_bootstrap(other - model.of_documents("segment"), titles)
        metrics[f"gain_over_{name}"] = gain.mean
        if len(set(titles)) >= MIN_GROUPS_FOR_INTERVAL:
            metrics |= {f"gain_over_{name}_low": gain.low, f"gain_over_{name}_high": gain.high}
    return metrics


def gap_test_nats(control: dict[str, float]) -> float:
    """Return what the control loses to segmentation; where it loses nothing, warn of it."""
    segment, full = control["segment_test_nll"], control["full_test_nll"]
    if not segment > full:
        print(
            f"warning: gap_recovered is left out: the control scores {segment:.4f} nats a token "
            f"in segments and {full:.4f} under full attention, so there is no gap; documents are "
            "probably longer than what the model was trained on",
            file=sys.stderr,
        )
    return segment - full


def gap_recovered(model: dict[str, float], control: dict[str, float]) -> float:
    """Return the share of the control's loss to segmentation that a model wins back."""
    gap = control["gap_test_nats"]
    assert gap > 0, gap
    return (control["segment_test_nll"] - model["segment_test_nll"]) / gap
