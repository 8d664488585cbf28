"""`State`: what crosses calls; `Segments`: what queries find; streaming in O(1) a token.

Memory is never an attribute of a module. Knows nothing of how queries attend.

Axes:
    B  document
    S  segment of a call
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from jaxtyping import Int
from torch import Tensor

from infini_retrofit.layer.cut import Cut, Keys, Layout, Place, at_border
from infini_retrofit.layer.local_context import Line, with_sink
from infini_retrofit.layer.memory import MemoryState
from infini_retrofit.layer.tokens import Tokens


@dataclass(frozen=True)
class LayerState:
    """What crosses a segment border in one layer."""

    memory: MemoryState | None = None
    context: Tokens | None = None  # the last before the border; not written before they leave
    sink: Tokens | None = None  # the document's first, in one column; False: not begun
    unfinished: Tokens | None = None  # of the segment that an open call ended in
    # Rotated keys and values that the last unfinished token attended to; None: not made yet.
    keys: Keys | None = None


@dataclass(frozen=True)
class State:
    """What every layer starts one forward pass with, and what it ends with: keyword `state`.

    Both are by layer index. A layer that `before` lacks starts empty. The layers fill `after`. It
    continues the document only where that ended with a whole segment, or was open.
    """

    before: Mapping[int, LayerState] = field(default_factory=dict)
    after: dict[int, LayerState] = field(default_factory=dict)

    def next(self) -> "State":
        """Return the state of the call that continues this one."""
        return State(before=self.after)


@dataclass(frozen=True)
class Segments:
    """What the queries of each segment can attend to and read."""

    place: Place  # rotates queries
    keys: Keys | None  # of the local attention, carried keys first; None: there is none
    line: Line | None = None  # what was carried, and the tokens laid out
    memories: MemoryState | None = None  # before each segment; None: no memory is read
    memory: MemoryState | None = None  # after the last segment
    num_before: Int[Tensor, "B"] | None = None  # tokens of the segment before its first query


def running_keys(tokens: Tokens, before: LayerState, num_kv_heads: int) -> Keys:
    """Return what the last token of an unfinished segment attends to."""
    new = tokens.columns(len(tokens) - 1)
    if before.keys is None:
        new = tokens
        if before.context is not None:
            new = with_sink(before.context, before.sink).followed_by(tokens)
    key, value = (x.transpose(1, 2)[:, None] for x in new.heads(num_kv_heads))
    keys = Keys(key, value, new.is_token[:, None])
    return keys if before.keys is None else before.keys.followed_by(keys)


def running_segment(
    tokens: Tokens, before: LayerState, keys: Keys | None, reads: bool, by_distance: bool
) -> Segments:
    """Return what the last token of an unfinished segment can find.

    `keys` are None where no token attends. `reads` means that the memory is read, `by_distance`
    that scores depend on the distance between keys (ALiBi).
    """
    if keys is not None and before.context is not None and by_distance:
        keys = _padding_first(keys)
    last = Layout(tokens.key[:, -1:], Cut(num_segments=1), 1)
    return Segments(
        place=last.place_by(tokens.tables and (tokens.cos[:, -1:], tokens.sin[:, -1:])),
        keys=keys,
        memories=before.memory.map(lambda x: x[:, None]) if reads else None,
        num_before=tokens.is_token.sum(dim=1) - 1 if reads else None,
    )


def _padding_first(keys: Keys) -> Keys:
    """Move padding to the front, so that distances between keys are those of tokens."""
    order = keys.is_key.int().argsort(dim=-1, stable=True)
    by_head = order[:, :, None, :, None]
    key, value = (x.take_along_dim(by_head, dim=3) for x in (keys.key, keys.value))
    return Keys(key, value, keys.is_key.gather(-1, order))


def state_after(segments: Segments, tokens: Tokens, segment_length: int) -> LayerState:
    """Return what each row carries over its last border, and the tokens behind that.

    `tokens` are those of the call, and those that were unfinished before it.
    """
    border = tokens.is_token.sum(dim=1) // segment_length
    memory, context, sink = segments.memory, None, None
    if segments.memories is not None:
        before_each = segments.memories.map(lambda x, last: at_border(x, last, border), memory)
        memory = before_each.to(memory.matrix.dtype)
    if segments.line is not None:
        context, sink = segments.line.context_at(border * segment_length), segments.line.sink
    return LayerState(memory, context, sink, tokens.after(border * segment_length))
