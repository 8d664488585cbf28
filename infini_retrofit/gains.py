"""What a model gains over what it must beat, and how sure that is.

Knows scores only: no models and no files.
"""

import sys
from collections.abc import Sequence

import numpy as np

from infini_retrofit.bootstrap import MIN_GROUPS_FOR_INTERVAL, paired_bootstrap
from infini_retrofit.evaluation import MEMORY_PROTOCOLS, DocumentNlls


def gains(model: DocumentNlls, control: DocumentNlls, titles: Sequence[str]) -> dict[str, float]:
    """Compare a model with what it must beat, document by document.

    Its rival at equal bytes is its own or the control's, whichever is better over all documents.
    What a protocol is needed for that the model was not scored under is left out.

    Args:
        model: what its memory gains is asked for.
        control: what was trained alike without a memory.
        titles: of each document's article; documents of one article are not independent.

    Returns:
        `gain_over_<other>`, the nats a token by which the model is better, and, given enough
        articles, the ends of its 95% paired bootstrap interval, `_low` and `_high`.
    """
    cut = {name: model.get(f"segment_{name}") for name in MEMORY_PROTOCOLS}
    others = {name: nlls for name, nlls in cut.items() if nlls is not None}
    others["control"] = control["segment"]
    if "segment_kv" in model:
        others["kv"] = min(model["segment_kv"], control["segment_kv"], key=np.mean)
    metrics = {}
    for name, other in others.items():
        gain = paired_bootstrap(other - model["segment"], titles)
        metrics[f"gain_over_{name}"] = gain.mean
        if len(set(titles)) >= MIN_GROUPS_FOR_INTERVAL:
            metrics |= {f"gain_over_{name}_low": gain.low, f"gain_over_{name}_high": gain.high}
    return metrics


def has_gap(control: dict[str, float]) -> bool:
    """Tell whether the control loses anything to segmentation; where it does not, warn of it."""
    segment, full = control["segment_test_nll"], control["full_test_nll"]
    if segment > full:
        return True
    print(
        f"warning: gap_recovered is left out: the control scores {segment:.4f} nats a token "
        f"in segments and {full:.4f} under full attention, so there is no gap; documents are "
        "probably longer than what the model was trained on",
        file=sys.stderr,
    )
    return False


def gap_test_nats(control: dict[str, float]) -> float:
    """Return what the control loses to segmentation, in nats a token."""
    return control["segment_test_nll"] - control["full_test_nll"]


def gap_recovered(model: dict[str, float], control: dict[str, float]) -> float:
    """Return the share of the control's loss to segmentation that a model wins back."""
    gap = gap_test_nats(control)
    assert gap > 0, gap
    return (control["segment_test_nll"] - model["segment_test_nll"]) / gap
