"""Keys and values that a segment carries over to the next: a window with a sink.

One of the carried tokens is the document's first. Models of this kind give it much of their
attention whatever it says; segments that carry only their last tokens have no such token in
reach and are worse than segments that carry nothing (measured: LOG.md). Knows nothing of the
memory.

Source: Xiao et al. 2024, arXiv:2309.17453 (sinks, and their position next to the window).

Axes:
    B  document
    N  key/value head
    C  carried token: the document's first, then the last C - 1 of a segment
    K  key channel
    V  value channel
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from infini_retrofit.layer.cut import Keys, Place, at_border


@dataclass(frozen=True)
class LocalContext:
    """What the segment after the last one attends to, besides itself."""

    key: Float[Tensor, "B N C K"]  # with position encoding
    value: Float[Tensor, "B N C V"]
    is_token: Bool[Tensor, "B C"]
    sink_key: Float[Tensor, "B N 1 K"]  # the document's first key, without position encoding

    def as_keys(self) -> Keys:
        """Return the keys of one segment (S = 1)."""
        return Keys(self.key[:, None], self.value[:, None], self.is_token[:, None])

    def detach(self) -> "LocalContext":
        """Stop the gradient here."""
        return LocalContext(*(x.detach() for x in vars(self).values()))


def carry_context(
    own: Keys,
    first_key: Float[Tensor, "B N 1 K"],
    place: Place,
    num_carried: int,
    before: LocalContext | None,
    stop_gradient_every: int | None = None,
) -> tuple[Keys, LocalContext | None]:
    """Put the context of the segment before ahead of each segment's own keys.

    `first_key` is that of the first token here, without position encoding. The border to `before`
    stops gradients too, if any border does.

    Returns:
        All that each segment attends to, and the context of the segment after the last; None
        after a segment shorter than C, which must be the document's last.
    """
    first = before
    if first is None:
        shape = (len(own.key), own.key.shape[2], num_carried)
        key, value = (x.new_zeros(*shape, x.shape[-1]) for x in (own.key, own.value))
        first = LocalContext(key, value, own.is_key.new_zeros(shape[::2]), key[:, :, :1])
    if stop_gradient_every is not None:
        first = first.detach()
    # Documents that start late in a batch have nothing before them yet.
    has_begun = first.is_token.any(dim=1)[:, None, None, None]
    sink_key = torch.where(has_begun, first.sink_key, first_key)
    sink_value = torch.where(has_begun, first.value[:, :, :1], own.value[:, 0, :, :1])
    num_documents, num_segments, _, length = own.key.shape[:4]
    if length < num_carried:
        return first.as_keys().followed_by(own), None
    each = (num_documents, num_segments, -1, -1, -1)
    # The sink takes the place of the token before the last C - 1, next to them.
    sinks = Keys(
        place(sink_key[:, None].expand(each), length - num_carried),
        sink_value[:, None].expand(each),
        own.is_key.new_ones(num_documents, num_segments, 1),
    )
    begin = length - num_carried + 1
    last = Keys(own.key[..., begin:, :], own.value[..., begin:, :], own.is_key[..., begin:])
    left = sinks.followed_by(last)
    pairs = zip(vars(first.as_keys()).values(), vars(left).values(), strict=True)
    context = Keys(*(torch.cat([x, y[:, :-1]], dim=1) for x, y in pairs))
    if stop_gradient_every is not None:
        context = _stop_gradients(context, stop_gradient_every)
    after = LocalContext(left.key[:, -1], left.value[:, -1], left.is_key[:, -1], sink_key)
    return context.followed_by(own), after


def context_at(
    keys: Keys, last: LocalContext, border: Int[Tensor, "B"], num_carried: int
) -> LocalContext:
    """Return the context that each document carries over one of its borders.

    `keys` and `last` are the results of `carry_context`. Border 0 is before the first segment.
    """
    return LocalContext(
        at_border(keys.key[..., :num_carried, :], last.key, border),
        at_border(keys.value[..., :num_carried, :], last.value, border),
        at_border(keys.is_key[..., :num_carried], last.is_token, border),
        last.sink_key,
    )


def _stop_gradients(context: Keys, every: int) -> Keys:
    # The document's first token has crossed every border before a segment, the others the last.
    num_segments, num_carried = context.is_key.shape[1:]
    segment = torch.arange(num_segments, device=context.key.device)[:, None]
    is_sink = torch.arange(num_carried, device=context.key.device) == 0
    is_cut = (segment % every == 0) | (is_sink & (segment >= every))
    is_cut = is_cut[:, None, :, None]
    key, value = (torch.where(is_cut, x.detach(), x) for x in (context.key, context.value))
    return Keys(key, value, context.is_key)
