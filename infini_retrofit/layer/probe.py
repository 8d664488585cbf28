"""`Probe`: what an evaluation changes in the reading of memories, and what it notes.

Knows nothing of how a memory is written or read.

Axes:
    B  document
    S  segment of a document
    L  token of a segment
    H  query head
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from infini_retrofit.layer.memory import MemoryState

# What a segment reads: the memory of all segments before it, of the last one only, or nothing.
Read = Literal["own", "recent", "off"]


@dataclass(frozen=True)
class MemoryReading:
    """How much one layer made of its memory.

    The share is that of the memory in each query's output, before `alpha` of a branch.
    """

    share: Float[Tensor, "B S H L"]
    recalled_norm: Float[Tensor, "B S H L"]  # length of the recalled vector, before its share
    local_norm: Float[Tensor, "B S H L"]  # length of the local attention's output


@dataclass(frozen=True)
class Probe:
    """What one forward pass reads in place of its own memory, and notes: keyword `probe`.

    All is by layer index. Layers write to `memories` and `readings`, where these are given.
    """

    read: Read = "own"
    # Layers whose output nobody needs: they neither attend nor read, and write as ever.
    unread: Collection[int] = ()
    # Read in place of each segment's memory (B, S).
    swapped: Mapping[int, MemoryState] = field(default_factory=dict)
    memories: dict[int, MemoryState] | None = None  # before each segment (B, S)
    readings: dict[int, MemoryReading] | None = None
