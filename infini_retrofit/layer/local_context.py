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
from jaxtyping import Bool, Float, Int
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

    def carried(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return what keys are put behind."""
        return self.key, self.value, self.is_token

    def detach(self) -> "LocalContext":
        """Cut the gradient here, so that back-propagation stops at this segment."""
        return LocalContext(
            self.key.detach(), self.value.detach(), self.is_token, self.sink_key.detach()
        )


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
    bptt_segments: int | None = None,
) -> tuple[Keys, LocalContext | None]:
    """Put before each segment's keys and values what the segment before carries over.

    Args:
        own: each segment's own keys and values.
        first_key: key of the first token here, without position encoding.
        place: applies positions.
        num_carried: C, at least 1 and at most a segment.
        before: what comes from before the first segment; None: nothing, the document begins.
        bptt_segments: gradients do not cross every so many-th border, nor come from `before`;
            None: they cross all.

    Returns:
        All that each segment attends to, and what the segment after the last will need; None
        after a segment shorter than C, which must be the document's last.
    """
    first = _nothing(own, num_carried) if before is None else before
    first = first if bptt_segments is None else first.detach()
    sink_key, sink_value = _sink(own, first_key, first)
    firsts = [x[:, None] for x in first.carried()]
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
    if bptt_segments is not None:
        found = _cut_gradients(found, bptt_segments)
    return _put_before(own, found), LocalContext(*(x[:, -1] for x in left), sink_key)


def _sink(own: Keys, first_key: Tensor, before: LocalContext) -> tuple[Tensor, Tensor]:
    """Return the key, unplaced, and the value of each document's first token."""
    # Documents that start late in a batch have nothing before them yet.
    has_begun = before.is_token.any(dim=1)[:, None, None, None]
    sink_key = torch.where(has_begun, before.sink_key, first_key)
    return sink_key, torch.where(has_begun, before.value[:, :, :1], own.value[:, 0, :, :1])


def put_before(own: Keys, context: LocalContext) -> Keys:
    """Put before the keys of a document's only segment what is carried over to it."""
    return _put_before(own, [x[:, None] for x in context.carried()])


def context_at(
    keys: Keys, last: LocalContext, border: Int[Tensor, "B"], num_carried: int
) -> LocalContext:
    """Return what each document carries over one of its borders.

    Args:
        keys: what each segment attends to.
        last: what is carried over the last border.
        border: 0 before the first segment.
        num_carried: C.
    """
    num_segments = keys.key.shape[1]
    rows = torch.arange(len(border), device=border.device)
    index, is_last = border.clamp(max=num_segments - 1), border == num_segments
    found = (x[rows, index].narrow(axis, 0, num_carried) for x, axis in keys)
    pairs = zip(last.carried(), found, strict=True)
    chosen = (torch.where(is_last.view(-1, *(1,) * (x.dim() - 1)), x, f) for x, f in pairs)
    return LocalContext(*chosen, last.sink_key)


def _cut_gradients(found: list[Tensor], bptt_segments: int) -> list[Tensor]:
    """Cut the gradients of the keys and values that each segment finds, at every so many-th border.

    The document's first token has crossed every border before a segment, the others the last.
    """
    key, value, is_token = found
    num_segments, num_carried = is_token.shape[1:]
    segment = torch.arange(num_segments, device=key.device)[:, None]
    is_sink = torch.arange(num_carried, device=key.device) == 0
    is_cut = (segment % bptt_segments == 0) | (is_sink & (segment >= bptt_segments))
    is_cut = is_cut[:, None, :, None]
    return [torch.where(is_cut, x.detach(), x) for x in (key, value)] + [is_token]


def _put_before(own: Keys, found: list[Tensor]) -> Keys:
    pairs = zip(found, own, strict=True)
    return Keys(*(torch.cat([f.to(x.dtype), x], dim=axis) for f, (x, axis) in pairs))


def _nothing(own: Keys, num_carried: int) -> LocalContext:
    """Return what stands before a document: masked zeros."""
    batch, _, num_heads, _, key_dim = own.key.shape
    key = own.key.new_zeros(batch, num_heads, num_carried, key_dim)
    value = own.value.new_zeros(batch, num_heads, num_carried, own.value.shape[-1])
    return LocalContext(key, value, own.is_key.new_zeros(batch, num_carried), key[:, :, :1])
