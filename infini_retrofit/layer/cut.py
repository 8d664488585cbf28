"""Rotary positions of queries and keys that are cut into segments.

Knows nothing of attention and of where a model's tables of cosines and sines come from.

Axes:
    B  document
    S  segment of a document
    L  token of a segment
    H  head
    K  channel of a head
    P  rotated channel, the first P of K
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from infini_retrofit.layer.local_context import Place
from infini_retrofit.layer.state import Carrier


class SegmentCut:
    """The cut of one (row, token) grid into (document, segment, token).

    Attributes:
        is_token: False at padding, of the documents or added to fill the last segment; None:
            no padding anywhere.
    """

    is_token: Bool[Tensor, "B S L"] | None

    def __init__(self, hidden_states: Tensor, carrier: Carrier, length: int) -> None:
        num_rows, num_tokens = hidden_states.shape[:2]
        self.num_rows, self.num_tokens = num_rows, num_tokens
        self.order: Tensor | None = None
        is_token = carrier.is_token
        if carrier.num_segments is not None:
            assert num_rows % carrier.num_segments == 0, "folded rows must fill whole documents"
            self.grid = (num_rows // carrier.num_segments, carrier.num_segments, num_tokens)
            self.padding = 0
        else:
            length = min(carrier.segment_length or length, num_tokens)
            num_segments = -(-num_tokens // length)
            self.grid = (num_rows, num_segments, length)
            self.padding = num_segments * length - num_tokens
            if is_token is not None:
                self.order = _tokens_first(is_token)
        if is_token is None and self.padding:
            is_token = hidden_states.new_ones(num_rows, num_tokens, dtype=torch.bool)
        self.is_token = None if is_token is None else self._grid(is_token)

    def _grid(self, x: Tensor) -> Tensor:
        """Lay (R, T, ...) out as (B, S, L, ...), each row's first real token first."""
        if self.order is not None:
            x = x.gather(1, _like(self.order, x))
        if self.padding:
            x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, self.padding))
        return x.reshape(*self.grid, *x.shape[2:])

    def split(self, x: Float[Tensor, "R T HK"], num_heads: int) -> Float[Tensor, "B S H L K"]:
        """Cut projected hidden states into segments and heads."""
        return self._grid(x).unflatten(-1, (num_heads, -1)).transpose(2, 3)

    def split_positions(self, x: Float[Tensor, "#R T P"]) -> Float[Tensor, "#B #S 1 L P"]:
        """Cut a table of cosines or sines, which all heads share."""
        if len(x) == 1 and self.num_rows > 1 and self.order is None and not self.padding:
            # One table for all rows: a folded row is a segment, an in-layer row a document.
            num_segments = self.num_tokens // self.grid[2]
            return x.reshape(1, num_segments, 1, self.grid[2], -1)
        return self._grid(x.expand(self.num_rows, -1, -1))[:, :, None]

    def join(self, x: Float[Tensor, "B S H L V"]) -> Float[Tensor, "R T HV"]:
        """Undo `split`."""
        x = x.transpose(2, 3).flatten(3)
        x = x.reshape(self.num_rows, -1, x.shape[-1])[:, : self.num_tokens]
        if self.order is None:
            return x
        return torch.empty_like(x).scatter(1, _like(self.order, x), x)

    def mask(self, device: torch.device) -> Bool[Tensor, "B S L"]:
        """Return `is_token`, all True where there is no padding."""
        if self.is_token is not None:
            return self.is_token
        return torch.ones(self.grid, dtype=torch.bool, device=device)


def _tokens_first(is_token: Bool[Tensor, "R T"]) -> Tensor:
    """Return for each row the order that moves its padding to its end."""
    return is_token.int().argsort(dim=1, descending=True, stable=True)


def _like(order: Tensor, x: Tensor) -> Tensor:
    """Widen a (row, token) index to the trailing axes of `x`."""
    return order.view(*order.shape, *(1,) * (x.dim() - 2)).expand_as(x)


def place_by(cut: SegmentCut, tables: tuple[Tensor, Tensor] | None) -> Place:
    """Return the function that gives queries and keys their positions.

    Args:
        cut: how the tokens are laid out.
        tables: cosines and sines of each; None: there are no positions.
    """
    if tables is None:
        return lambda x, index=None: x
    cos, sin = (cut.split_positions(table) for table in tables)

    def place(x: Tensor, index: int | None = None) -> Tensor:
        at = slice(None) if index is None else slice(index, index + 1)
        return rotate(x, cos[..., at, :], sin[..., at, :])

    return place


def rotate(
    x: Float[Tensor, "B S H L K"],
    cos: Float[Tensor, "#B #S 1 L P"],
    sin: Float[Tensor, "#B #S 1 L P"],
) -> Float[Tensor, "B S H L K"]:
    """Apply rotary position encoding to the first P channels, in the halves form.

    Source: Su et al. 2021, arXiv:2104.09864; halves as in GPT-NeoX and Llama.
    """
    rotated, rest = x.split([cos.shape[-1], x.shape[-1] - cos.shape[-1]], dim=-1)
    first, second = rotated.chunk(2, dim=-1)
    rotated = rotated * cos + torch.cat([-second, first], dim=-1) * sin
    return torch.cat([rotated.to(x.dtype), rest], dim=-1) if rest.shape[-1] else rotated.to(x.dtype)
