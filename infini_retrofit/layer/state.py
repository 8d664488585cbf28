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

from dataclasses import dataclass, field, fields
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from infini_retrofit.layer.local_context import LocalContext
from infini_retrofit.layer.memory import MemoryState


@dataclass(frozen=True)
class Tokens:
    """Keys and values of some tokens, with what gives them their positions."""

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
        """Put together what one call brings.

        Args:
            key: keys.
            value: values.
            tables: cosines and sines, one for all rows or one each; None: no rotations.
            is_token: False at padding; None: no padding.
        """
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
        """Put the columns of a call behind those that were kept."""
        pairs = zip(self._tensors(), new._tensors(), strict=True)
        return Tokens(*(torch.cat(pair, dim=1) for pair in pairs))

    def num_whole(self, segment_length: int) -> Int[Tensor, "B"]:
        """Return how many segments each row fills."""
        return self.is_token.sum(dim=1) // segment_length

    def after(self, num_tokens: Int[Tensor, "B"]) -> "Tokens":
        """Leave out as many of the first tokens of each row, and padding that fills up no row.

        The longest row has no padding.
        """
        is_left = self.is_token & (self.is_token.cumsum(dim=1) > num_tokens[:, None])
        width = int(is_left.sum(dim=1).max())
        order = is_left.int().argsort(dim=1, stable=True)[:, len(self) - width :]
        kept = (x.take_along_dim(_like(order, x), dim=1) for x in self._tensors()[:-1])
        return Tokens(*kept, is_left.gather(1, order))

    def _tensors(self) -> list[Tensor]:
        return [getattr(self, field.name) for field in fields(self)]


def _like(order: Tensor, x: Tensor) -> Tensor:
    """Widen a (row, column) index to the trailing axes of `x`."""
    return order.view(*order.shape, *(1,) * (x.dim() - 2))


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
