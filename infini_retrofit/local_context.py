"""Keys and values that a segment carries over to the next one: a window with an attention sink.

One of the carried tokens is the document's first. Models of this kind give it much of their
attention whatever it says; segments that carry only their last tokens have no such token in
reach and are worse than segments that carry nothing (measured: LOG.md). Knows nothing of the
memory.

Source: Xiao et al. 2024, arXiv:2309.17453 (sinks, and their position next to the window).

Axes:
    B  document
    S  segment
    N  key/value head
    L  token of a segment
    C  carried token: the document's first, then the last C - 1 of a segment
    K  key channel
    V  value channel
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

# Applies the position of one token of every segment, given by its index in the segment.
Place = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class LocalContext:
    """What the segment after the last one attends to, besides itself."""

    key: Float[Tensor, "B N C K"]  # with position encoding
    value: Float[Tensor, "B N C V"]
    is_token: Bool[Tensor, "B C"]
    sink_key: Float[Tensor, "B N 1 K"]  # the document's first key, without position encoding


@dataclass(frozen=True)
class Keys:
    """What each segment's queries attend to."""

    key: Float[Tensor, "B S N L K"]  # with position encoding
    value: Float[Tensor, "B S N L V"]
    is_key: Bool[Tensor, "B S L"]  # False at padding and where there is no segment before

    def __iter__(self):
        """Yield each tensor and the axis of its tokens."""
        return iter(((self.key, -2), (self.value, -2), (self.is_key, -1)))


def carry_context(
    own: Keys,
    first_key: Float[Tensor, "B N 1 K"],
    place: Place,
    num_carried: int,
    before: LocalContext | None,
) -> tuple[Keys, LocalContext | None]:
    """Put before each segment's keys and values what the segment before carries over.

    Args:
        own: each segment's own keys and values.
        first_key: key of the first token here, without position encoding.
        place: applies positions.
        num_carried: C, at least 1 and at most a segment.
        before: what comes from before the first segment; None: nothing, the document begins.

    Returns:
        All that each segment attends to, and what the segment after the last will need; None
        after a segment shorter than C, which must be the document's last.
    """
    sink_key = first_key if before is None else before.sink_key
    sink_value = own.value[:, 0, :, :1] if before is None else before.value[:, :, :1]
    first = _nothing(own, num_carried) if before is None else before
    firsts = [x[:, None] for x in (first.key, first.value, first.is_token)]
    length = own.key.shape[3]
    if length < num_carried:
        return _put_before(own, firsts), None
    shape = own.key.shape[:2]
    # The sink takes the place of the token before the last C - 1, next to them.
    placed_sink = place(sink_key[:, None].expand(*shape, -1, -1, -1), length - num_carried)
    sinks = (
        placed_sink,
        sink_value[:, None].expand(*shape, -1, -1, -1),
        own.is_key.new_ones(*shape, 1),
    )
    left = [
        torch.cat([sink, x.narrow(axis, length - num_carried + 1, num_carried - 1)], dim=axis)
        for sink, (x, axis) in zip(sinks, own, strict=True)
    ]
    found = [torch.cat([f, x[:, :-1]], dim=1) for f, x in zip(firsts, left, strict=True)]
    return _put_before(own, found), LocalContext(*(x[:, -1] for x in left), sink_key)


def _put_before(own: Keys, found: list[Tensor]) -> Keys:
    pairs = zip(found, own, strict=True)
    return Keys(*(torch.cat([f.to(x.dtype), x], dim=axis) for f, (x, axis) in pairs))


def _nothing(own: Keys, num_carried: int) -> LocalContext:
    """Return what stands before a document: masked zeros."""
    batch, _, num_heads, _, key_dim = own.key.shape
    key = own.key.new_zeros(batch, num_heads, num_carried, key_dim)
    value = own.value.new_zeros(batch, num_heads, num_carried, own.value.shape[-1])
    return LocalContext(key, value, own.is_key.new_zeros(batch, num_carried), key[:, :, :1])
