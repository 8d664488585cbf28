"""Streaming: append tokens to a segment that has not ended, in O(1) a token.

Knows nothing of how queries attend, and of no module.

Axes:
    B  document
    S  segment of a call
    N  key/value head
"""

import torch
from jaxtyping import Int
from torch import Tensor

from infini_retrofit.layer.cut import Cut, Keys, Layout
from infini_retrofit.layer.local_context import context_at
from infini_retrofit.layer.memory import MemoryState
from infini_retrofit.layer.state import LayerState, Segments, Tokens


def running_segment(
    tokens: Tokens, before: LayerState, num_kv_heads: int, reads: bool, by_distance: bool
) -> Segments:
    """Return what the last token of an unfinished segment can find.

    `reads` means that the memory is read, `by_distance` that scores depend on the distance
    between keys (ALiBi).
    """
    layout = Layout(tokens.key, Cut(num_segments=1, is_token=tokens.is_token), 1)
    key, value = (layout.split(x, num_kv_heads) for x in (tokens.key, tokens.value))
    keys = Keys(layout.place_by(tokens.tables)(key), value, layout.is_token)
    memories = None
    if before.context is not None:
        keys = before.context.as_keys().followed_by(keys)
        keys = _padding_first(keys) if by_distance else keys
    if reads:
        memories = MemoryState(before.memory.matrix[:, None], before.memory.normalizer[:, None])
    last = Layout(tokens.key[:, -1:], Cut(num_segments=1), 1)
    return Segments(
        place=last.place_by(tokens.tables and (tokens.cos[:, -1:], tokens.sin[:, -1:])),
        keys=keys,
        is_key=keys.is_key,
        memories=memories,
        num_before=tokens.is_token.sum(dim=1) - 1,
    )


def _padding_first(keys: Keys) -> Keys:
    """Move padding to the front, so that distances between keys are those of tokens."""
    order = keys.is_key.int().argsort(dim=-1, stable=True)
    by_head = order[:, :, None, :, None]
    key, value = (x.take_along_dim(by_head, dim=3) for x in (keys.key, keys.value))
    return Keys(key, value, keys.is_key.gather(-1, order))


def state_after(
    segments: Segments, tokens: Tokens, before: LayerState, segment_length: int, num_carried: int
) -> LayerState:
    """Return what each row carries over its last border, and the tokens behind that.

    `tokens` are those of the call, and those that were unfinished before it.
    """
    border = tokens.num_whole(segment_length)
    memory, context = None, before.context
    if segments.memories is not None:
        memory = _memory_at(segments.memories, segments.memory, border)
    if segments.context is not None:
        context = context_at(segments.keys, segments.context, border, num_carried)
    return LayerState(memory, context, tokens.after(border * segment_length))


def _memory_at(memories: MemoryState, last: MemoryState, border: Int[Tensor, "B"]) -> MemoryState:
    """Return each row's memory at a border: 0 before the first segment."""
    num_segments = memories.normalizer.shape[1]
    rows = torch.arange(len(border), device=border.device)
    is_last = border == num_segments
    index = border.clamp(max=num_segments - 1)
    matrix, normalizer = memories.matrix[rows, index], memories.normalizer[rows, index]
    matrix = torch.where(is_last[:, None, None, None], last.matrix, matrix)
    normalizer = torch.where(is_last[:, None, None], last.normalizer, normalizer)
    return MemoryState(matrix, normalizer).to(last.matrix.dtype)
