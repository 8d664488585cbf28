"""One model under every protocol: the numbers that models are compared by.

The same code scores the base, retrofitted models and the control. Knows no files.
"""

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
from infini_retrofit.retrofit import infini_modules, make_rival, state_bytes


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

    stream: Int[Tensor, "T"]
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
        a token, and `state_bytes` that this model carries across a segment border.
    """
    has_memory = any(m.gate_logit is not None for m in infini_modules(model).values())
    num_bytes = sum(m.border_bytes for m in infini_modules(model).values())
    scores = dict(_scores(model, infini, params, text, has_memory))
    metrics: dict[str, float | int] = {f"{k}_test_ppl": s.ppl for k, s in scores.items()}
    for name in ("full", "segment"):
        metrics[f"{name}_test_nll"] = scores[name].nll
    return metrics | {"state_bytes": num_bytes}


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
    segment, t2 = (total(s) for s in score_segments(model, documents, length))
    yield "segment", segment
    yield "t2", t2
    for read in ("off", "swapped"):
        # Where nothing crosses a border there is nothing to switch off or to swap.
        scores = score_segments(model, documents, length, read)[0] if has_memory else [segment]
        yield f"segment_{read}", total(scores)
    make_rival(model, infini)
    yield "segment_kv", total(score_segments(model, documents, length)[0])


def gap_recovered(model: dict[str, float], control: dict[str, float]) -> float:
    """Return the share of the control's loss to segmentation that a model wins back."""
    won = control["segment_test_nll"] - model["segment_test_nll"]
    return won / (control["segment_test_nll"] - control["full_test_nll"])


def check_layers(model: PreTrainedModel, infini: InfiniParams) -> None:
    """Refuse layers that the base does not have, before anything slow starts."""
    state_bytes(model, infini)


def rows_of_metrics(name: str, metrics: dict[str, float | int]) -> list[dict[str, float | str]]:
    """Turn one model's metrics into rows of a plot: model, protocol, ppl."""
    suffix = "_test_ppl"
    return [
        {"model": name, "protocol": key.removesuffix(suffix), "ppl": value}
        for key, value in metrics.items()
        if key.endswith(suffix)
    ]
