"""`Probe`: what an evaluation changes in the reading of memories, and what it notes.

Knows nothing of how a memory is written or read.

Axes:
    B  document
    S  segment of a document
    L  token of a segment
    H  query head
"""

from collections.abc import Mapping
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

    Attributes:
        share: of the memory in each query's output; of a parallel branch, in the branch's output
            before `alpha`.
        recalled_norm: length of the recalled vector, before its share.
        local_norm: length of the local attention's output.
    """

    share: Float[Tensor, "B S H L"]
    recalled_norm: Float[Tensor, "B S H L"]
    local_norm: Float[Tensor, "B S H L"]


@dataclass(frozen=True)
class Probe:
    """What one forward pass reads in place of its own memory, and notes: keyword `probe`.

    Attributes:
        read: what a segment reads.
        swapped: the memory to read in place of each segment's (B, S), by layer index.
        memories: each layer puts the memory before each segment (B, S) here; None: it does not.
        readings: each layer notes its use of the memory here; None: it does not.
    """

    read: Read = "own"
    swapped: Mapping[int, MemoryState] = field(default_factory=dict)
    memories: dict[int, MemoryState] | None = None
    readings: dict[int, MemoryReading] | None = None
