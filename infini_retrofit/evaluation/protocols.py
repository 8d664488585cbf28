"""The protocols under which models are scored: one table, `PROTOCOLS`.

Every token but the first of a stream or document is scored exactly once, except under `t2`.
Knows nothing of training and files.

Axes:
    B  document
    T  token
    Train  token of the train split
    Test  token of the test split
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Annotated

import torch
from jaxtyping import Int
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel

from infini_retrofit.evaluation.rival import Rival, make_rival
from infini_retrofit.model.retrofit import has_memory
from infini_retrofit.model.running import run_in_layer
from infini_retrofit.pipeline.fields import Count
from infini_retrofit.pipeline.progress import progress
from infini_retrofit.pipeline.tokens import TestText
from infini_retrofit.scoring.score import (
    MemoryRead,
    Run,
    Score,
    memory_runs,
    next_token_nlls,
    score_runs,
    segment_runs,
    t2_nlls,
    total,
)

# Windows that go through the model at once. More would need more memory, and not less time.
WINDOWS_PER_BATCH = 8
MODELS = ("base", "control", "distilled", "finetuned")
# The distilled model shows what insertion costs. Its memory has not yet learned on documents.
NOT_DISTILLED = ("base", "control", "finetuned")


@dataclass(frozen=True, kw_only=True)
class EvalParams:
    """Section `eval` of params.yaml."""

    window: int  # tokens
    stride: Count  # tokens
    sliding_tokens: Annotated[int, Field(ge=2)]  # at most, of the test split's stream
    documents: Annotated[int, Field(ge=2)]  # at most, of the test split

    def __post_init__(self) -> None:
        """Refuse windows under which a token would be scored without context."""
        if self.stride >= self.window:
            raise ValueError(
                f"eval.stride must be in 1..{self.window - 1} tokens (less than eval.window, "
                f"or a window's first token has no context), got {self.stride}"
            )


@dataclass(frozen=True)
class Setting:
    """The texts on which a model is scored, and the size of its rival."""

    params: EvalParams
    text: TestText
    rival: Rival


# Runs the stream or the documents of a setting in one way.
Runs = Callable[[PreTrainedModel, Setting], Iterator[Run]]


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How a model is scored, and what its score is compared with.

    Attributes:
        run: the memory that each segment of a document reads, or a function that runs the text
            in another way. Protocols with the same `run` share its result.
        shifts_twice: whether each position is scored on the token after the next.
        of_stream: whether `run` takes the stream; False: the documents.
        applies: whether the score can differ from that under `segment`. If it cannot, the
            score under `segment` stands for it.
        models: the models to score, of `MODELS`.
        by_position: the models whose score is plotted by position in the segment.
        gain: `segment` is compared with this score as `gain_over_<gain>`; None: it is not.
        gain_models: the score of "model" or "control"; the better one if both.
    """

    run: MemoryRead | Runs = "own"
    shifts_twice: bool = False
    of_stream: bool = False
    applies: Callable[[PreTrainedModel, Rival], bool] = lambda model, rival: True
    models: tuple[str, ...] = MODELS
    by_position: tuple[str, ...] = ()
    gain: str | None = None
    gain_models: tuple[str, ...] = ("model",)


_OtherMemory = partial(
    Protocol,
    applies=lambda model, _: has_memory(model),
    models=NOT_DISTILLED,
    by_position=("finetuned",),
)
PROTOCOLS: dict[str, Protocol] = {
    "sliding": Protocol(
        run=lambda model, setting: sliding_runs(
            model, setting.text.stream, setting.params.window, setting.params.stride
        ),
        of_stream=True,
    ),
    "full": Protocol(
        run=lambda model, setting: full_runs(model, setting.text.documents),
        by_position=("control",),
    ),
    "t2": Protocol(shifts_twice=True),
    "segment": Protocol(by_position=NOT_DISTILLED, gain="control", gain_models=("control",)),
    "segment_off": _OtherMemory(run="off", gain="off", models=MODELS),
    "segment_recent": _OtherMemory(run="recent", gain="recent"),
    "segment_swapped": _OtherMemory(run="swapped", gain="swapped"),
    "segment_kv": Protocol(
        run=lambda model, setting: segment_runs(
            make_rival(model, setting.rival), setting.text.documents, setting.rival.segment_length
        ),
        applies=lambda _, rival: rival.num_tokens > 0,
        models=NOT_DISTILLED,
        by_position=("control", "finetuned"),
        gain="kv",
        gain_models=("model", "control"),
    ),
}


def score_protocols(
    model: PreTrainedModel, setting: Setting, names: Collection[str]
) -> dict[str, list[Tensor]]:
    """Score a model under several protocols; no run is repeated.

    Returns:
        The NLLs of each document or window in nats, by protocol.
    """
    used = {name: PROTOCOLS[name] for name in names}
    for name, protocol in used.items():
        if not protocol.applies(model, setting.rival):
            used[name] = PROTOCOLS["segment"]
    nlls: dict[Protocol, list[Tensor]] = {protocol: [] for protocol in used.values()}
    ways, length = dict.fromkeys(p.run for p in nlls), setting.rival.segment_length
    reads = [way for way in ways if not callable(way)]
    others = ({way: run} for way in ways if callable(way) for run in way(model, setting))
    for runs in chain(memory_runs(model, setting.text.documents, length, reads), others):
        for protocol, found in nlls.items():
            if run := runs.get(protocol.run):
                t2 = protocol.shifts_twice
                nll = t2_nlls(model, *run, length) if t2 else next_token_nlls(model, *run)
                found.append(nll.cpu())
    return {name: nlls[protocol] for name, protocol in used.items()}


def full_runs(model: PreTrainedModel, documents: Int[Tensor, "B T"]) -> Iterator[Run]:
    """Run documents under full attention; an Infini layer sees one segment, memory empty."""
    for ids in progress(documents.to(model.device), "full attention", "documents"):
        with torch.inference_mode():
            hidden_states = run_in_layer(model, ids[None], segment_length=len(ids))[0]
        yield ids, hidden_states


def score_full(model: PreTrainedModel, documents: Int[Tensor, "B T"]) -> list[Score]:
    """Score documents under full attention; see `full_runs`."""
    return score_runs(model, full_runs(model, documents))


def sliding_windows(num_tokens: int, window: int, stride: int) -> list[tuple[int, int, int]]:
    """Cut a stream into overlapping windows that score each token but the first once.

    Windows of `window` tokens begin every `stride` tokens.

    Returns:
        Each window's first token, the first token that it scores, and the token after its last.
    """
    begins = range(0, max(num_tokens - window, 0) + stride, stride)
    scored = (begin + window - stride if begin else 1 for begin in begins)
    ends = (min(begin + window, num_tokens) for begin in begins)
    return list(zip(begins, scored, ends, strict=True))


def sliding_runs(
    model: PreTrainedModel, tokens: Int[Tensor, "T"], window: int, stride: int
) -> Iterator[Run]:
    """Run a stream in overlapping windows, the memory empty at the start of each (in-layer).

    A run holds the tokens that its window scores, and the one before them.
    """
    *windows, last = sliding_windows(len(tokens), window, stride)
    starts = range(0, len(windows), WINDOWS_PER_BATCH)
    batches = [*(windows[start : start + WINDOWS_PER_BATCH] for start in starts), [last]]
    for batch in progress(batches, "sliding", "batches"):
        rows = torch.stack([tokens[begin:end] for begin, _, end in batch]).to(model.device)
        with torch.inference_mode():
            hidden_states = run_in_layer(model, rows)
        for (begin, scored, _), row, hidden in zip(batch, rows, hidden_states, strict=True):
            before = scored - begin - 1
            yield row[before:], hidden[before:]


def score_sliding(
    model: PreTrainedModel, tokens: Int[Tensor, "T"], window: int, stride: int
) -> Score:
    """Score a stream in overlapping windows; see `sliding_runs`."""
    return total(score_runs(model, sliding_runs(model, tokens, window, stride)))


def score_unigram(train: Int[Tensor, "Train"], test: Int[Tensor, "Test"], vocab_size: int) -> Score:
    """Score a stream by how often each token stands in another, counts plus one."""
    counts = torch.bincount(train, minlength=vocab_size).double() + 1
    nlls = -(counts / counts.sum()).log()[test[1:]]
    return Score(nlls.sum().item(), len(nlls))
