"""The gains of a model over its rivals, with their intervals, and the gap that it closes.

Knows scores only: no models and no files.
"""

from collections.abc import Sequence

import numpy as np

from infini_retrofit.evaluation.bootstrap import MIN_GROUPS_FOR_INTERVAL, paired_bootstrap
from infini_retrofit.evaluation.evaluation import DocumentNlls
from infini_retrofit.evaluation.protocols import PROTOCOLS


def gains(model: DocumentNlls, control: DocumentNlls, sources: Sequence[str]) -> dict[str, float]:
    """Compare a model with its rivals, document by document.

    A gain is left out if a score that it needs is missing.

    Args:
        model: scores of a model with a memory.
        control: scores of a model that was trained alike without one.
        sources: of each document; documents of one source are not independent.

    Returns:
        `gain_over_<other>`, the nats a token by which the model is better, and, given enough
        articles, the ends of its 95% paired bootstrap interval, `_low` and `_high`. Also
        `gain_beside_pointer`, where both models have the pointer too.
    """
    pairs, metrics, scores = {}, {}, {"model": model, "control": control}
    for name, protocol in PROTOCOLS.items():
        others = [scores[which].get(name) for which in protocol.gain_models]
        if protocol.gain is None or any(other is None for other in others):
            continue
        pairs[f"gain_over_{protocol.gain}"] = min(others, key=np.mean), model["segment"]
    if "segment_pointer" in model:
        pairs["gain_beside_pointer"] = control["segment_pointer"], model["segment_pointer"]
    for key, (best, own) in pairs.items():
        metrics[key], low, high = paired_bootstrap(best - own, sources)
        if len(set(sources)) >= MIN_GROUPS_FOR_INTERVAL:
            metrics |= {f"{key}_low": low, f"{key}_high": high}
    return metrics


def gap_test_nats(control: dict[str, float]) -> float:
    """Return the control's loss to segmentation in nats a token."""
    return control["segment_test_nll"] - control["full_test_nll"]


def gap_recovered(model: dict[str, float], control: dict[str, float]) -> float:
    """Return the share of the control's loss to segmentation that a model wins back."""
    return (control["segment_test_nll"] - model["segment_test_nll"]) / gap_test_nats(control)
