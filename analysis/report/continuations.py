"""How base, control and retrofit continue one test document: the likeliest token each time.

Knows no path.

Axes:
    T  token
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from infini_retrofit.generation.cache import InfiniCache
from infini_retrofit.generation.generation import enable_generation, read, segment_length
from infini_retrofit.generation.versions import CACHE
from infini_retrofit.layer.form import InfiniParams
from infini_retrofit.layer.state import LayerState

MAX_SEGMENTS, MAX_NEW_TOKENS = 4, 40


@dataclass(frozen=True)
class Prefix:
    """What a model reads before it goes on: whole segments, then a little of one.

    What is generated ends inside that segment, so that nothing of it is written to a memory.
    """

    segments: Int[Tensor, "2 _"]  # of the document, and of another one whose memory is swapped in
    rest: Int[Tensor, "1 _"]  # of the document
    truth: Int[Tensor, "1 _"]  # how the document goes on

    @classmethod
    def of(cls, documents: Int[Tensor, "B T"], other: int, length: int) -> "Prefix":
        """Cut the first document; `other` is a document of another article."""
        num_segments = min(MAX_SEGMENTS, documents.shape[1] // length - 1)
        border, few = num_segments * length, max(1, length // 8)
        end = border + few
        new = min(MAX_NEW_TOKENS, length - few)
        first = documents[:1]
        return cls(
            documents[[0, other], :border], first[:, border:end], first[:, end : end + new]
        )

    @property
    def whole(self) -> Int[Tensor, "1 _"]:
        """All tokens of the prefix."""
        return torch.cat([self.segments[:1], self.rest], dim=1)


def continue_base(model: PreTrainedModel, prefix: Prefix) -> Int[Tensor, "T"]:
    """Return what the untouched base goes on with; it sees the whole prefix."""
    return _generate(model, prefix.whole, prefix)


def continue_control(
    model: PreTrainedModel, form: InfiniParams, prefix: Prefix
) -> Int[Tensor, "T"]:
    """Return what the control goes on with, confined to the last segment; changes the model."""
    enable_generation(model, form, "segment")
    cache = _read(model, prefix)
    return _generate(model, prefix.rest, prefix, _first_row(cache, cache.layer_states))


def continue_retrofit(
    model: PreTrainedModel, form: InfiniParams, prefix: Prefix
) -> dict[str, Int[Tensor, "T"]]:
    """Return what a retrofit goes on with, its memory on, off and swapped; changes the model."""
    enable_generation(model, form, "segment")
    cache = _read(model, prefix)
    own = cache.layer_states
    off = {i: replace(state, memory=None) for i, state in own.items()}
    swapped = {
        i: replace(state, memory=state.memory and state.memory.roll_batch())
        for i, state in own.items()
    }
    return {
        name: _generate(model, prefix.rest, prefix, _first_row(cache, states))
        for name, states in (("on", own), ("off", off), ("swapped", swapped))
    }


def decode(tokenizer: PreTrainedTokenizerBase, ids: Int[Tensor, "T"]) -> str:
    """Return tokens as text on one line."""
    return " ".join(tokenizer.decode(ids, skip_special_tokens=True).split())


def _read(model: PreTrainedModel, prefix: Prefix) -> InfiniCache:
    """Read the whole segments of both documents."""
    assert prefix.segments.shape[1] % segment_length(model) == 0
    cache = InfiniCache(model)
    for _ in read(model, prefix.segments, cache):
        pass
    return cache


def _first_row(cache: InfiniCache, states: Mapping[int, LayerState]) -> InfiniCache:
    """Return a copy of a cache with other states and the first document alone."""
    own = copy.deepcopy(cache)
    own.layer_states = dict(states)
    own.batch_select_indices(torch.tensor([0]))
    return own


def _generate(
    model: PreTrainedModel,
    ids: Int[Tensor, "1 _"],
    prefix: Prefix,
    cache: InfiniCache | None = None,
) -> Int[Tensor, "T"]:
    """Return the likeliest tokens after `ids`, as many as the document itself goes on with."""
    ids = ids.to(model.device)
    mask = torch.ones_like(ids) if cache is None else cache.mask_for(ids)
    found = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=prefix.truth.shape[1],
        do_sample=False,
        pad_token_id=0,
        **({} if cache is None else {CACHE: cache}),
    )
    return found[0, ids.shape[1] :].cpu()
