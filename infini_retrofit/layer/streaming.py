"""Streaming: append tokens to a segment that has not ended, in O(1) a token.

Knows nothing of how queries attend, and of no module.
"""

from infini_retrofit.layer.cut import Cut, Keys, Layout, at_border
from infini_retrofit.layer.local_context import context_at
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
    if before.context is not None:
        keys = before.context.as_keys().followed_by(keys)
        keys = _padding_first(keys) if by_distance else keys
    last = Layout(tokens.key[:, -1:], Cut(num_segments=1), 1)
    return Segments(
        place=last.place_by(tokens.tables and (tokens.cos[:, -1:], tokens.sin[:, -1:])),
        keys=keys,
        is_key=keys.is_key,
        memories=before.memory.map(lambda x: x[:, None]) if reads else None,
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
    border = tokens.is_token.sum(dim=1) // segment_length
    memory, context = segments.memory, before.context
    if memory is not None:
        before_each = segments.memories.map(lambda x, last: at_border(x, last, border), memory)
        memory = before_each.to(memory.matrix.dtype)
    if segments.context is not None:
        context = context_at(segments.keys, segments.context, border, num_carried)
    return LayerState(memory, context, tokens.after(border * segment_length))
