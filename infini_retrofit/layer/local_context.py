"""Keys and values that a segment carries over to the next: a window with a sink.

One of the carried tokens is the document's first. Models of this kind give it much of their
attention whatever it says; segments that carry only their last tokens have no such token in
reach and are worse than segments that carry nothing (measured: LOG.md). Knows nothing of the
memory.

Source: Xiao et al. 2024, arXiv:2309.17453 (sinks, and their position next to the window).

Axes:
    B  document
    S  segment of a document
    L  token of a segment
    C  carried token: the document's first, then the last C - 1 before a segment
    N  key/value head
    K  key channel
    V  value channel
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor

from infini_retrofit.layer.cut import Keys, like
from infini_retrofit.layer.tokens import Tokens


@dataclass(frozen=True)
class Line:
    """Documents as columns: the C tokens before this call, then those of its segments.

    The first columns are padding where a document has not so many tokens before the call.
    """

    tokens: Tokens
    sink: Tokens  # each document's first token, in one column; padding: it has not begun
    num_carried: int  # C

    @classmethod
    def of(
        cls, own: Tokens, context: Tokens | None, sink: Tokens | None, num_carried: int
    ) -> "Line":
        """Put a call's tokens, laid out in segments, behind what they were handed over."""
        # A copy: a view would keep the whole call alive, and share its rotations with other layers.
        first = own.columns(0, 1).map(Tensor.clone)
        if context is None:
            context = own.map(lambda x: x.new_zeros(len(x), num_carried, *x.shape[2:]))
        else:
            # Documents that start late in a batch have nothing before them yet.
            begun = sink.is_token
            pairs = zip(vars(sink).values(), vars(first).values(), strict=True)
            first = Tokens(*(torch.where(like(begun, x), old.to(x.dtype), x) for old, x in pairs))
        return cls(context.followed_by(own), first, num_carried)

    def keys(self, segment_length: int, num_kv_heads: int, every: int | None = None) -> Keys:
        """Return what each segment attends to: the C tokens before it, and its own.

        The sink takes the place of the first of the C. Gradients stop at each border after
        `every` segments; None: at no border.
        """
        key, value = self.tokens.heads(num_kv_heads)
        size = (self.num_carried + segment_length, segment_length)
        key, value = (x.unfold(1, *size).transpose(-1, -2) for x in (key, value))
        end = len(self.tokens) - self.num_carried
        first = self.tokens.map(lambda x: x[:, :end:segment_length])
        sinks = self.sink.key.expand_as(first.key), self.sink.value.expand_as(first.value)
        first = replace(first, key=sinks[0], value=sinks[1])
        heads = zip(first.heads(num_kv_heads), (key, value), strict=True)
        key, value = (torch.cat([x[..., None, :], y[..., 1:, :]], dim=3) for x, y in heads)
        keys = Keys(key, value, self.tokens.is_token.unfold(1, *size))
        return keys if every is None else _stop_gradients(keys, self.num_carried, every)

    def left(
        self, num_late: int, num_segments: int, segment_length: int, num_kv_heads: int
    ) -> tuple[
        Float[Tensor, "B S N L K"], Num[Tensor, "B S N L V"], Bool[Tensor, "B S L"]
    ]:
        """Return keys, values and mask of what leaves the window at the end of each segment.

        These are the segments `num_late` before each, whole ones of `segment_length` tokens.
        """
        begin = self.num_carried - num_late * segment_length
        tokens = self.tokens.columns(begin, begin + num_segments * segment_length)
        key, value, _, _, is_token = (
            x.unflatten(1, (num_segments, segment_length)) for x in vars(tokens).values()
        )
        key, value = (x.unflatten(-1, (num_kv_heads, -1)).transpose(2, 3) for x in (key, value))
        return key, value, is_token

    def last(self) -> Tokens:
        """Return the C tokens before the end."""
        return self.tokens.columns(len(self.tokens) - self.num_carried)

    def context_at(self, first_column: Int[Tensor, "B"]) -> Tokens:
        """Return the C tokens before a border, which stands so many columns behind the first C."""
        columns = torch.arange(self.num_carried, device=first_column.device)
        index = first_column[:, None] + columns
        return self.tokens.map(lambda x: x.take_along_dim(like(index, x), dim=1))


def with_sink(context: Tokens, sink: Tokens) -> Tokens:
    """Put the sink in the place of the first carried token, at that token's position."""
    key = torch.cat([sink.key, context.key[:, 1:]], dim=1)
    value = torch.cat([sink.value, context.value[:, 1:]], dim=1)
    return replace(context, key=key, value=value)


def _stop_gradients(keys: Keys, num_carried: int, every: int) -> Keys:
    """Cut what crossed a border that stops gradients on its way to a segment."""
    num_segments, num_keys = keys.is_key.shape[1:]
    length = num_keys - num_carried
    device = keys.key.device
    segment = torch.arange(num_segments, device=device)[:, None]
    column = torch.arange(num_keys, device=device)
    own = segment + (column - num_carried).div(length, rounding_mode="floor")
    # The sink is the first token of the document; before this call everything is cut.
    own = torch.where(column == 0, 0, own) if num_carried else own
    is_cut = own.div(every, rounding_mode="floor") != segment.div(every, rounding_mode="floor")
    is_cut = is_cut[:, None, :, None]
    key, value = (torch.where(is_cut, x.detach(), x) for x in (keys.key, keys.value))
    return replace(keys, key=key, value=value)
