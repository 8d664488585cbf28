"""The protocols under which models are scored: one table, `PROTOCOLS`.

Every token but the first of a stream or document is scored exactly once, except under `t2`.
Knows nothing of training and files.

Axes:
    B  document
    T  token
    Train  token of the train split
    Test  token of the test split
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Annotated, Literal

import torch
from jaxtyping import Int
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel

from infini_retrofit.evaluation import pointer
from infini_retrofit.evaluation.costs import pointer_tokens
from infini_retrofit.evaluation.dynamic import dynamic_runs
from infini_retrofit.evaluation.key_tokens import KeyTokens
from infini_retrofit.evaluation.rival import Rival, make_rival, make_selected, make_windowed
from infini_retrofit.model.retrofit import has_memory
from infini_retrofit.model.running import run_in_layer
from infini_retrofit.pipeline.fields import Count
from infini_retrofit.pipeline.progress import progress
from infini_retrofit.pipeline.tokens import TestText, read_documents
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
# Rivals that take time, and are scored where `eval.rivals` names them.
OtherRival = Literal["selected", "pointer", "dynamic"]


@dataclass(frozen=True, kw_only=True)
class EvalParams:
    """Section `eval` of params.yaml."""

    window: int  # tokens
    stride: Count  # tokens
    sliding_tokens: Annotated[int, Field(ge=2)]  # at most, of the test split's stream
    documents: Annotated[int, Field(ge=2)]  # at most, of the test split
    rivals: list[OtherRival] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Refuse windows under which a token would be scored without context."""
        if self.stride >= self.window:
            raise ValueError(
                f"eval.stride must be in 1..{self.window - 1} tokens (less than eval.window, "
                f"or a window's first token has no context), got {self.stride}"
            )


@dataclass(frozen=True)
class Setting:
    """The texts on which a model is scored, and the size of its rival.

    Attributes:
        val_documents: those that fit what rivals need; None where `eval.rivals` is empty.
        key_tokens: chosen by the base; None: this is the base.
        dynamic_lr: of the rival `dynamic`.
    """

    params: EvalParams
    text: TestText
    rival: Rival
    val_documents: Int[Tensor, "B T"] | None = None
    key_tokens: KeyTokens | None = None
    dynamic_lr: float = 0.0


def read_val_documents(
    path: Path, vocab_size: int, params: EvalParams
) -> Int[Tensor, "B T"] | None:
    """Read the documents that fit the rivals, as many as are scored; without rivals none."""
    return read_documents(path, vocab_size, params.documents) if params.rivals else None


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
        rival: scored only where `eval.rivals` names it; None: always.
        gain: `segment` is compared with this score as `gain_over_<gain>`; None: it is not.
        gain_models: the score of "model" or "control"; the better one if both.
    """

    run: MemoryRead | Runs = "own"
    shifts_twice: bool = False
    of_stream: bool = False
    applies: Callable[[PreTrainedModel, Rival], bool] = lambda model, rival: True
    models: tuple[str, ...] = MODELS
    by_position: tuple[str, ...] = ()
    rival: OtherRival | None = None
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
        run=lambda model, setting: carrying_runs(model, setting.rival, setting.text.documents),
        applies=lambda _, rival: rival.num_tokens > 0,
        models=NOT_DISTILLED,
        by_position=("control", "finetuned"),
        gain="kv",
        gain_models=("model", "control"),
    ),
    "segment_selected": Protocol(
        run=lambda model, setting: segment_runs(
            make_selected(model, setting.rival),
            setting.text.documents,
            setting.rival.segment_length,
        ),
        applies=lambda _, rival: rival.num_selected > 0,
        models=("base", "control"),
        rival="selected",
        gain="selected",
        gain_models=("control",),
    ),
    "segment_dynamic": Protocol(
        run=lambda model, setting: dynamic_runs(
            make_windowed(model, setting.rival),
            setting.text.documents,
            setting.rival.segment_length,
            setting.dynamic_lr,
        ),
        models=("base", "control"),
        rival="dynamic",
        gain="dynamic",
        gain_models=("control",),
    ),
    # Its score is that under `segment`, into which `pointer.mix` mixes the proposals.
    "segment_pointer": Protocol(
        models=NOT_DISTILLED, rival="pointer", gain="pointer", gain_models=("control",)
    ),
}


def protocols_of(name: str, params: EvalParams) -> list[str]:
    """List the protocols under which a model of `MODELS` is scored."""
    return [
        key
        for key, protocol in PROTOCOLS.items()
        if name in protocol.models and (protocol.rival is None or protocol.rival in params.rivals)
    ]


def score_protocols(
    model: PreTrainedModel, setting: Setting, names: Collection[str]
) -> dict[str, list[Tensor]]:
    """Score a model under several protocols; no run is repeated.

    Returns:
        The NLLs of each document or window in nats, by protocol.
    """
    used = {name: PROTOCOLS[name] for name in names if name != "segment_pointer"}
    for name, protocol in used.items():
        if not protocol.applies(model, setting.rival):
            used[name] = PROTOCOLS["segment"]
    nlls: dict[Protocol, list[Tensor]] = {protocol: [] for protocol in used.values()}
    ways, length = dict.fromkeys(p.run for p in nlls), setting.rival.segment_length
    reads = [way for way in ways if not callable(way)]
    others = ({way: run} for way in ways if callable(way) for run in way(model, setting))
    windowed = make_windowed(model, setting.rival)
    for runs in chain(memory_runs(windowed, setting.text.documents, length, reads), others):
        for protocol, found in nlls.items():
            if run := runs.get(protocol.run):
                t2 = protocol.shifts_twice
                nll = t2_nlls(model, *run, length) if t2 else next_token_nlls(model, *run)
                found.append(nll.cpu())
    found = {name: nlls[protocol] for name, protocol in used.items()}
    if "segment_pointer" in names:
        found["segment_pointer"] = add_pointer(windowed, setting, found["segment"])
    return found


def add_pointer(model: PreTrainedModel, setting: Setting, nlls: Sequence[Tensor]) -> list[Tensor]:
    """Mix a pointer into scores under `segment`; its weights fit the validation documents."""
    documents, rival = setting.val_documents, setting.rival
    runs = segment_runs(model, documents, rival.segment_length)
    val_nlls = torch.stack([next_token_nlls(model, *run).cpu() for run in runs])
    stored = pointer.Stored(
        segment_length=rival.segment_length,
        window=rival.local_context,
        num_stored=pointer_tokens(model, rival),
    )
    weights = pointer.fit_weights(val_nlls, *stored.matches(documents))
    found = stored.matches(setting.text.documents)
    return list(pointer.mix(torch.stack(list(nlls)), *found, weights))


def carrying_runs(
    model: PreTrainedModel, rival: Rival, documents: Int[Tensor, "B T"]
) -> Iterator[Run]:
    """Run documents of which every layer carries keys and values, at most a whole document's."""
    num_tokens = min(rival.num_tokens, documents.shape[1])
    made = make_rival(model, replace(rival, num_tokens=num_tokens))
    return segment_runs(made, documents, rival.segment_length)


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
