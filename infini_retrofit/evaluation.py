"""One model under every protocol: the numbers that models are compared by.

The same code scores the base, retrofitted models and the control. Knows no files.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass

from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from infini_retrofit.attention import InfiniParams
from infini_retrofit.perplexity import (
    Score,
    score_full,
    score_segments,
    score_sliding,
    total,
)
from infini_retrofit.retrofit import (
    decoder_layers,
    infini_modules,
    make_rival,
    resolve_layers,
)


@dataclass(frozen=True, kw_only=True)
class EvalParams:
    """Section `eval` of params.yaml."""

    window: int  # tokens
    stride: int  # tokens
    sliding_tokens: int  # at most, of the test split's stream
    documents: int  # at most, of the test split

    def __post_init__(self) -> None:
        """Refuse values under which a token would be scored twice or never."""
        if not 1 <= self.stride < self.window:
            raise ValueError(
                f"eval.stride must be in 1..{self.window - 1} tokens (less than eval.window, "
                f"or a window's first token has no context), got {self.stride}"
            )
        for name, least in (("sliding_tokens", 2), ("documents", 2)):
            if getattr(self, name) < least:
                value = getattr(self, name)
                raise ValueError(f"eval.{name} must be at least {least}, got {value}")


@dataclass(frozen=True)
class TestText:
    """What models are scored on.

    Attributes:
        stream: the test split's articles, one after another.
        documents: long documents of the test split.
    """

    stream: Int[Tensor, "Stream"]
    documents: Int[Tensor, "B T"]


def evaluate(
    model: PreTrainedModel, infini: InfiniParams, params: EvalParams, text: TestText
) -> dict[str, float | int]:
    """Score a model under every protocol, one number each.

    The model is changed at the end: it becomes its own equal-bytes rival.

    Args:
        model: a base or retrofitted model.
        infini: the form of the retrofit that is compared, whose bytes the rival may spend.
        params: section `eval`.
        text: the test split.

    Returns:
        `<protocol>_test_ppl` for every protocol, `full_test_nll` and `segment_test_nll` in nats
        a token, `state_bytes` that this model carries across a segment border, `num_documents`.
    """
    has_memory = any(m.gate_logit is not None for m in infini_modules(model).values())
    num_bytes = sum(m.border_bytes for m in infini_modules(model).values())
    scores = dict(_scores(model, infini, params, text, has_memory))
    metrics: dict[str, float | int] = {f"{k}_test_ppl": s.ppl for k, s in scores.items()}
    for name in ("full", "segment"):
        metrics[f"{name}_test_nll"] = scores[name].nll
    return metrics | {"state_bytes": num_bytes, "num_documents": len(text.documents)}


def _scores(
    model: PreTrainedModel,
    infini: InfiniParams,
    params: EvalParams,
    text: TestText,
    has_memory: bool,
) -> Iterator[tuple[str, Score]]:
    """Yield each protocol's name and score."""
    length, documents = infini.segment_length, text.documents
    yield "sliding", score_sliding(model, text.stream, params.window, params.stride)
    yield "full", total(score_full(model, documents))
    own_and_t2 = score_segments(model, documents, length, with_t2=True)
    segment, t2 = (total(scores) for scores in own_and_t2)
    yield "segment", segment
    yield "t2", t2
    for read in ("off", "swapped"):
        # Where nothing crosses a border there is nothing to switch off or to swap.
        scores = score_segments(model, documents, length, read)[0] if has_memory else [segment]
        yield f"segment_{read}", total(scores)
    make_rival(model, infini)
    yield "segment_kv", total(score_segments(model, documents, length)[0])


def gap_recovered(model: dict[str, float], control: dict[str, float]) -> float:
    """Return the share of the control's loss to segmentation that a model wins back.

    Raises:
        ValueError: if the control loses nothing to segmentation.
    """
    gap = control["segment_test_nll"] - control["full_test_nll"]
    if gap <= 0:
        raise ValueError(
            "gap_recovered needs documents that full attention predicts better than segments do, "
            f"got a gap of {gap:.4f} nats a token: are they longer than the base can attend to?"
        )
    return (control["segment_test_nll"] - model["segment_test_nll"]) / gap


def check_fit(model: PreTrainedModel, infini: InfiniParams, text: TestText) -> None:
    """Refuse layers that the base does not have, and warn of documents beyond its positions.

    Raises:
        ValueError: if a layer index is out of range or named twice.
    """
    resolve_layers(infini.layers, len(decoder_layers(model)))
    num_positions, num_tokens = model.config.max_position_embeddings, text.documents.shape[1]
    if num_tokens > num_positions:
        print(
            f"warning: documents of {num_tokens} tokens exceed the {num_positions} positions that "
            "the base was trained on: full_test_ppl and gap_recovered extrapolate",
            file=sys.stderr,
        )


def rows_of_metrics(name: str, metrics: dict[str, float | int]) -> list[dict[str, float | str]]:
    """Turn one model's metrics into rows of a plot: model, protocol, ppl."""
    suffix = "_test_ppl"
    return [
        {"model": name, "protocol": key.removesuffix(suffix), "ppl": value}
        for key, value in metrics.items()
        if key.endswith(suffix)
    ]
