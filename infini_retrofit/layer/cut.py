"""Cut a forward pass into segments; lay out, rotate and shift what is cut.

Knows shapes only, neither attention nor models.

Axes:
    R  row of the batch as the model sees it
    T  token of a row
    B  document
    S  segment of a document
    L  token of a segment (padding at the end of a document's last one)
    H  head
    N  key/value head
    K  channel of a head
    V  value channel
    P  rotated channel, the first P of K
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor

# Rotates queries or keys (B S H L K).
Place = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Cut:
    """How the rows of one forward pass are cut into segments: keyword `cut`.

    Without it each row is a document, which the layer cuts after its own segment length (in-layer).

    Only in-layer the document may continue in a later call (`is_open`): a segment that has not
    ended is kept, not written. In-layer a row may be padded anywhere; folded, a document may be
    padded at its end only.
    """

    num_segments: int | None = None  # rows that make up one document (folded)
    segment_length: int | None = None  # tokens, in-layer; None: the layer's own
    is_open: bool = False
    is_token: Bool[Tensor, "R T"] | None = None  # False at padding; None: no padding


class Layout:
    """The (row, token) grid of one call as (document, segment, token)."""

    # False at padding, of the documents or added to fill the last segment; None: no padding.
    is_token: Bool[Tensor, "B S L"] | None

    def __init__(self, hidden_states: Tensor, cut: Cut, segment_length: int) -> None:
        num_rows, num_tokens = hidden_states.shape[:2]
        self.num_rows, self.num_tokens = num_rows, num_tokens
        self.order: Int[Tensor, "R T"] | None = None
        is_token = cut.is_token
        if cut.num_segments is not None:
            assert num_rows % cut.num_segments == 0, "folded rows must fill whole documents"
            self.grid = (num_rows // cut.num_segments, cut.num_segments, num_tokens)
            self.padding = 0
        else:
            length = min(cut.segment_length or segment_length, num_tokens)
            num_segments = -(-num_tokens // length)
            self.grid = (num_rows, num_segments, length)
            self.padding = num_segments * length - num_tokens
            if is_token is not None:
                # Moves the padding of each row to its end.
                self.order = is_token.int().argsort(dim=1, descending=True, stable=True)
        if is_token is None and self.padding:
            is_token = hidden_states.new_ones(num_rows, num_tokens, dtype=torch.bool)
        self.is_token = None if is_token is None else self._grid(is_token)

    def _grid(self, x: Tensor) -> Tensor:
        """Lay (R, T, ...) out as (B, S, L, ...), the first real token of each row first."""
        if self.order is not None:
            x = x.gather(1, like(self.order, x).expand_as(x))
        if self.padding:
            x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, self.padding))
        return x.reshape(*self.grid, *x.shape[2:])

    def split(self, x: Num[Tensor, "R T HK"], num_heads: int) -> Num[Tensor, "B S H L K"]:
        """Cut projected hidden states into segments and heads."""
        return self._grid(x).unflatten(-1, (num_heads, -1)).transpose(2, 3)

    def line(self, x: Tensor) -> Tensor:
        """Lay (R, T, ...) out as documents (B, S * L, ...)."""
        return self._grid(x).flatten(1, 2)

    def join(self, x: Float[Tensor, "B S H L V"]) -> Float[Tensor, "R T HV"]:
        """Undo `split`."""
        x = x.transpose(2, 3).flatten(3)
        x = x.reshape(self.num_rows, -1, x.shape[-1])[:, : self.num_tokens]
        if self.order is None:
            return x
        return torch.empty_like(x).scatter(1, like(self.order, x).expand_as(x), x)

    def place_by(self, tables: tuple[Tensor, Tensor] | None) -> Place:
        """Return the function that rotates by cosines and sines, (R or 1, T, P) each."""
        if tables is None:
            return lambda x: x
        # All heads share a table.
        cos, sin = (self._grid(x.expand(self.num_rows, -1, -1))[:, :, None] for x in tables)

        return lambda x: rotate(x, cos, sin)


@dataclass(frozen=True)
class Keys:
    """Keys and values that the queries of each segment attend to."""

    key: Float[Tensor, "B S N L K"]  # with position encoding
    value: Num[Tensor, "B S N L V"]
    # False at padding, and where the document has not begun. None: causality hides padding, which
    # stands at a document's end.
    is_key: Bool[Tensor, "B S L"] | None = None

    def followed_by(self, new: "Keys") -> "Keys":
        """Append keys, in their number type; both must have a mask."""
        pairs = ((self.key, new.key), (self.value, new.value))
        key, value = (torch.cat([old.to(x.dtype), x], dim=3) for old, x in pairs)
        return Keys(key, value, torch.cat([self.is_key, new.is_key], dim=-1))


def rotate(
    x: Float[Tensor, "*B K"], cos: Float[Tensor, "*#B P"], sin: Float[Tensor, "*#B P"]
) -> Float[Tensor, "*B K"]:
    """Apply rotary position encoding to the first P channels, in the halves form.

    Source: Su et al. 2021, arXiv:2104.09864; halves as in GPT-NeoX and Llama.
    """
    rotated, rest = x.split([cos.shape[-1], x.shape[-1] - cos.shape[-1]], dim=-1)
    first, second = rotated.chunk(2, dim=-1)
    rotated = rotated * cos + torch.cat([-second, first], dim=-1) * sin
    return torch.cat([rotated.to(x.dtype), rest], dim=-1) if rest.shape[-1] else rotated.to(x.dtype)


def at_border(segments: Tensor, last: Tensor, border: Int[Tensor, "B"]) -> Tensor:
    """Choose from (B, S, ...) what precedes each row's border, or (B, ...) behind all segments."""
    num_segments = segments.shape[1]
    rows = torch.arange(len(border), device=border.device)
    before = segments[rows, border.clamp(max=num_segments - 1)]
    return torch.where((border == num_segments).view(-1, *(1,) * (last.dim() - 1)), last, before)


def like(order: Tensor, x: Tensor) -> Tensor:
    """Widen an index of rows and tokens to the trailing axes of `x`."""
    return order.view(*order.shape, *(1,) * (x.dim() - 2))
