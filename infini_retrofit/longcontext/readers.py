"""A reader: a model, the cache through which it reads a long text, and how it is asked.

A text is read once. Each question starts from a copy of the cache, and so does each answer.

Axes:
    T  token
    Scored  token that is scored: all but the first
"""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from infini_retrofit.generation.cache import InfiniCache
from infini_retrofit.generation.generation import (
    enable_generation,
    segment_length,
    writing_only,
)
from infini_retrofit.generation.versions import CACHE
from infini_retrofit.layer.attention import InfiniAttention
from infini_retrofit.layer.form import InfiniParams
from infini_retrofit.layer.probe import Probe
from infini_retrofit.longcontext.scaling import Scaling, fit_length, scale_rope
from infini_retrofit.longcontext.windows import window_cache
from infini_retrofit.model.retrofit import (
    attention_shapes,
    branch_token_bytes,
    insert_infini,
    state_bytes,
)
from infini_retrofit.model.running import scaled
from infini_retrofit.scoring.losses import token_nlls
from infini_retrofit.texts.prompts import Question

TOKENS_PER_PIECE = 512  # of a text that is read at once
NUM_SINKS = 4  # as in StreamingLLM
_COPIED_BYTES = 1 << 30  # of caches of answers that are in memory at once


@dataclass(frozen=True, kw_only=True)
class Reader:
    """A model that reads through a cache of its own kind.

    Attributes:
        new_cache: makes an empty one for a document of so many tokens.
        num_bytes: of what is kept after so many tokens, keys and values in 16 bits.
        most_tokens: that it may read; None: any number.
        segment_length: of the model's memory; None: it has none.
        local_context: tokens that attention sees beside the segment.
    """

    name: str
    model: PreTrainedModel
    new_cache: Callable[[int], Cache]
    num_bytes: Callable[[int], int]
    most_tokens: int | None = None
    segment_length: int | None = None
    local_context: int = 0

    @torch.inference_mode()
    def read(self, input_ids: Int[Tensor, "T"], num_tokens: int | None = None) -> Cache:
        """Read a text; `num_tokens` counts what will be asked too."""
        cache = self.new_cache(num_tokens or len(input_ids))
        about = {"probe": writing_only(self.model)} if isinstance(cache, InfiniCache) else {}
        for piece in input_ids.split(TOKENS_PER_PIECE):
            self._run(piece[None], cache, **about)
        return cache

    @torch.inference_mode()
    def nlls(self, input_ids: Int[Tensor, "T"]) -> Float[Tensor, "Scored"]:
        """Score every token but the first in nats."""
        cache, found = self.new_cache(len(input_ids)), []
        head = self.model.get_output_embeddings()
        for piece in range(0, len(input_ids) - 1, TOKENS_PER_PIECE):
            ids = input_ids[piece : piece + TOKENS_PER_PIECE + 1].to(self.model.device)
            hidden_states = self._run(input_ids[None, piece : piece + TOKENS_PER_PIECE], cache)
            hidden_states = hidden_states[0, : len(ids) - 1]
            found.append(token_nlls(hidden_states, head.weight, ids[1:], head.bias).cpu())
        return torch.cat(found)

    @torch.inference_mode()
    def answer(self, cache: Cache, question: Question) -> tuple[bool, bool]:
        """Ask a question.

        Returns:
            Whether the right answer is the likeliest of the candidates, and whether the
            likeliest token at each step gives it too.
        """
        cache = copy.deepcopy(cache)
        first = self._log_probs(self._run(torch.tensor([question.input_ids]), cache)[:, -1:])
        rest = torch.tensor(question.candidates)
        copied = self.num_bytes(len(question.input_ids) + cache.get_seq_length())
        num_rows = max(1, min(len(rest), _COPIED_BYTES // copied))
        found = []
        for rows in rest.split(num_rows):
            log_probs = first.expand(len(rows), -1, -1)
            if rows.shape[1] > 1:
                own = copy.deepcopy(cache)
                own.batch_repeat_interleave(len(rows))
                later = self._log_probs(self._run(rows[:, :-1], own))
                log_probs = torch.cat([log_probs, later], dim=1)
            found.append(log_probs)
        log_probs = torch.cat(found)
        scores = log_probs.gather(-1, rest[..., None])[..., 0].sum(dim=1)
        is_greedy = torch.equal(log_probs[0].argmax(-1), rest[0])
        return bool(scores[0] > scores[1:].max()), is_greedy

    def _run(
        self, input_ids: Int[Tensor, "_ T"], cache: Cache, **about: Probe
    ) -> Float[Tensor, "_ T _"]:
        """Return the last hidden states of a piece of text."""
        ids = input_ids.to(self.model.device)
        body = self.model.base_model
        out = body(input_ids=ids, use_cache=True, **{CACHE: cache}, **about)
        return scaled(self.model, out.last_hidden_state)

    def _log_probs(self, hidden_states: Float[Tensor, "_ T _"]) -> Float[Tensor, "_ T _"]:
        return self.model.get_output_embeddings()(hidden_states).float().log_softmax(-1).cpu()


def full_reader(name: str, model: PreTrainedModel) -> Reader:
    """Read with full attention, inside the length that the base trained on."""
    token_bytes, longest = _token_bytes(model), model.config.max_position_embeddings
    return Reader(
        name=name,
        model=model,
        new_cache=lambda _: DynamicCache(),
        num_bytes=lambda num_tokens: num_tokens * token_bytes,
        most_tokens=longest,
    )


def scaled_reader(model: PreTrainedModel, kind: Scaling, longest: int) -> Reader:
    """Read with full attention and rotations that are scaled to the longest document."""
    # `dynamic` takes each document's own length.
    trained = model.config.max_position_embeddings
    factor = 1 if kind == "dynamic" else max(1, math.ceil(longest / trained))
    model, token_bytes = scale_rope(model, kind, float(factor)), _token_bytes(model)

    def new_cache(num_tokens: int) -> Cache:
        fit_length(model, num_tokens)
        return DynamicCache()

    return Reader(
        name=kind,
        model=model,
        new_cache=new_cache,
        num_bytes=lambda num_tokens: num_tokens * token_bytes,
    )


def window_reader(name: str, model: PreTrainedModel, num_sinks: int, window: int) -> Reader:
    """Read with full attention to a window, and to the first tokens if there are sinks."""
    token_bytes = _token_bytes(model)
    return Reader(
        name=name,
        model=model,
        new_cache=lambda _: window_cache(model, num_sinks, window),
        num_bytes=lambda num_tokens: min(num_tokens, num_sinks + window) * token_bytes,
    )


def infini_reader(name: str, model: PreTrainedModel, form: InfiniParams) -> Reader:
    """Read segment by segment, with the memory if there is one; changes the model in place."""
    carried = state_bytes(model)
    token_bytes = _token_bytes(model) + branch_token_bytes(model)
    enable_generation(model, form, "segment")
    return Reader(
        name=name,
        model=model,
        new_cache=lambda _: InfiniCache(model),
        num_bytes=lambda _: carried + segment_length(model) * token_bytes,
        segment_length=form.segment_length if form.has_memory else None,
        local_context=form.local_context,
    )


def carrying_reader(
    name: str, model: PreTrainedModel, segment_length: int, num_tokens: int
) -> Reader:
    """Read segment by segment, the keys and values of the last tokens carried over."""
    form = InfiniParams(memory="off", segment_length=segment_length, local_context=num_tokens)
    made = copy.deepcopy(model, {id(x): x for x in (*model.parameters(), *model.buffers())})
    insert_infini(made, form)
    return infini_reader(name, made, form)


@contextmanager
def cut_after(model: PreTrainedModel, segment_length: int) -> Iterator[None]:
    """Let a model's memory be written after segments of another length."""
    modules = [m for m in model.modules() if isinstance(m, InfiniAttention)]
    before = [m.segment_length for m in modules]
    try:
        for module in modules:
            module.segment_length = segment_length
        yield
    finally:
        for module, length in zip(modules, before, strict=True):
            module.segment_length = length


def _token_bytes(model: PreTrainedModel) -> int:
    """Count the bytes of one token's keys and values in all layers."""
    return sum(shape.context_token_bytes() for shape in attention_shapes(model))
