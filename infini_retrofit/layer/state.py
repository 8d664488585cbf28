"""`State`: what crosses calls; `Segments`: what queries find; streaming in O(1) a token.

Memory is never an attribute of a module. Knows nothing of how queries attend.

Axes:
    B  document
    S  segment of a call
    C  key that a segment's queries see: carried over, then its own
    W  column, filled from the right
    NK channel of all keys of a token, heads side by side
    NV channel of all values of a token
    P  rotated channel; none without rotations
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from infini_retrofit.layer.cut import Cut, Keys, Layout, Place, at_border, like
from infini_retrofit.layer.local_context import LocalContext, context_at
from infini_retrofit.layer.memory import MemoryState


@dataclass(frozen=True)
class Tokens:
    """Keys and values of a call, or of a segment that has not ended, with their positions.

    In a segment that has not ended, rows may stand at different places.
    """

    key: Float[Tensor, "B W NK"]  # without position encoding
    value: Float[Tensor, "B W NV"]
    cos: Float[Tensor, "B W P"]
    sin: Float[Tensor, "B W P"]
    is_token: Bool[Tensor, "B W"]

    @classmethod
    def of(
        cls,
        key: Float[Tensor, "B W NK"],
        value: Float[Tensor, "B W NV"],
        tables: tuple[Tensor, Tensor] | None,
        is_token: Bool[Tensor, "B W"] | None,
    ) -> "Tokens":
        """Put the tokens of one call together; the tables are one for all rows or one each."""
        if tables is None:
            tables = (key.new_zeros(1, key.shape[1], 0),) * 2
        cos, sin = (table.expand(len(key), -1, -1) for table in tables)
        if is_token is None:
            is_token = torch.ones(key.shape[:2], dtype=torch.bool, device=key.device)
        return cls(key, value, cos, sin, is_token)

    @property
    def tables(self) -> tuple[Tensor, Tensor] | None:
        """Cosines and sines; None: no rotations."""
        return (self.cos, self.sin) if self.cos.shape[-1] else None

    def __len__(self) -> int:
        """Return the number of columns."""
        return self.key.shape[1]

    def followed_by(self, new: "Tokens") -> "Tokens":
        """Append the columns of a later call."""
        pairs = zip(vars(self).values(), vars(new).values(), strict=True)
        return Tokens(*(torch.cat(pair, dim=1) for pair in pairs))

    def after(self, num_tokens: Int[Tensor, "B"]) -> "Tokens":
        """Drop the first tokens of each row; the longest row that is left has no padding."""
        is_left = self.is_token & (self.is_token.cumsum(dim=1) > num_tokens[:, None])
        width = int(is_left.sum(dim=1).max())
        order = is_left.int().argsort(dim=1, stable=True)[:, len(self) - width :]
        columns = (*list(vars(self).values())[:-1], is_left)
        return Tokens(*(x.take_along_dim(like(order, x), dim=1) for x in columns))


@dataclass(frozen=True)
class LayerState:
    """What crosses a segment border in one layer."""

    memory: MemoryState | None = None
    context: LocalContext | None = None
    unfinished: Tokens | None = None  # of the segment that an open call ended in


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
    keys: Keys  # of the local attention, carried keys first
    is_key: Bool[Tensor, "B S C"] | None  # None: causality hides all keys that must not be seen
    context: LocalContext | None = None  # carried over the last border
    memories: MemoryState | None = None  # before each segment; None: no memory is read
    memory: MemoryState | None = None  # after the last segment
    num_before: Int[Tensor, "B"] | None = None  # tokens of the segment before its first query


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
