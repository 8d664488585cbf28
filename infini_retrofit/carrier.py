"""How one forward pass is cut into segments, and the value in which memory crosses calls.

Knows shapes only: nothing here computes attention, and nothing knows of models.

Axes:
    R  row of the batch as the model sees it
    T  token of a row
    B  document
    S  segment of a document
    L  token of a segment (padding at the end of a document's last one)
    H  head
    K  channel of a head
    P  rotated channel
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from infini_retrofit.local_context import LocalContext
from infini_retrofit.memory import MemoryState
from infini_retrofit.unfinished import Tokens

# Which memory a segment reads: of all segments before it, of the one just before it, or none.
Read = Literal["own", "recent", "off"]


@dataclass(frozen=True)
class Carried:
    """What crosses a segment border in one layer."""

    memory: MemoryState | None = None
    context: LocalContext | None = None
    unfinished: Tokens | None = None  # behind the last border, if the document may go on


@dataclass(frozen=True)
class MemoryReading:
    """How much one layer made of its memory, for diagnostics.

    Attributes:
        share: of the memory in each query's output. With the local attention `window_linear`,
            of all linear sums, the segment's own older tokens among them; of a parallel branch,
            in the branch's output, before `alpha`.
        recalled_norm: length of what was recalled, before its share.
        local_norm: length of the local attention's output.
    """

    share: Float[Tensor, "B S H L"]
    recalled_norm: Float[Tensor, "B S H L"]
    local_norm: Float[Tensor, "B S H L"]


@dataclass
class Carrier:
    """How one forward pass is cut, and what its layers carry in and out.

    Made for a single call and passed through it as the keyword `carrier`, so that memory
    never lives in a module.

    Attributes:
        num_segments: rows of the batch that make up one document (folded); None: every row
            is a document, which the layer cuts itself (in-layer).
        segment_length: tokens of a segment when cut in-layer; None: the layer's own.
        is_open: the document may go on in a later call wherever this one ends: a segment that has
            not ended is kept, not written. In-layer only.
        read: what a document's segments wrote (`own`), of that only what the segment just before
            wrote (`recent`), or nothing (`off`).
        is_token: False where a row holds padding; None: no padding. In-layer a row may be
            padded anywhere; folded, a document may be padded at its end only.
        before: what each layer starts with, by layer index; a layer not named starts empty.
        after: what each layer ends with, written by the layers. It continues the document
            only where that ended with a whole segment, or is open.
        strangers: what layers read in the place of the memory that each segment (B, S) finds, by
            layer index.
        found: a dictionary to have each layer put there what its segments find; None: don't.
        readings: a dictionary to have each layer note its use of the memory there; None: don't.
    """

    num_segments: int | None = None
    segment_length: int | None = None
    is_open: bool = False
    read: Read = "own"
    is_token: Bool[Tensor, "R T"] | None = None
    before: dict[int, Carried] = field(default_factory=dict)
    after: dict[int, Carried] = field(default_factory=dict)
    strangers: dict[int, MemoryState] = field(default_factory=dict)
    found: dict[int, MemoryState] | None = None
    readings: dict[int, MemoryReading] | None = None


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
