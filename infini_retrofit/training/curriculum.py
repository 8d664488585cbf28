"""Of how many segments the documents of a training step are.

Long documents are cut into pieces of whole segments, each a document of its own, so that every
step sees the same number of tokens. Knows no model, no loss and no trainer.

Axes:
    B  document
    T  token of a document
    P  piece of a document
    L  token of a piece
"""

import random
from typing import Literal

from jaxtyping import Int
from torch import Tensor

NumSegments = Literal["all", "random", "curriculum"]
# From here on, as a share of all steps, the curriculum keeps documents whole.
WHOLE_FROM = 2 / 3


def piece_lengths(num_segments: int) -> list[int]:
    """Return the numbers of segments into which a document can be cut: 2, 4, ... all."""
    powers = [2**i for i in range(1, num_segments.bit_length())]
    return [n for n in powers if n < num_segments and num_segments % n == 0] + [num_segments]


def choose_length(how: NumSegments, num_segments: int, step: int, num_steps: int, seed: int) -> int:
    """Choose of how many segments the pieces of a step are.

    A function of the step alone, so that a resumed run and every process choose alike.

    Args:
        how: `all`: whole documents; `random`: any length; `curriculum`: longer and longer.
        num_segments: of a whole document.
        step: from 0.
        num_steps: of the whole run.
        seed: of `random`.
    """
    lengths = piece_lengths(num_segments)
    if how == "all":
        return num_segments
    if how == "random":
        return random.Random(f"{seed}, {step}").choice(lengths)
    reached = int(step / (WHOLE_FROM * num_steps) * (len(lengths) - 1))
    return lengths[min(reached, len(lengths) - 1)]


def recut(documents: Int[Tensor, "B T"], num_tokens: int) -> Int[Tensor, "BP L"]:
    """Cut documents into pieces of `num_tokens`, those of a document one after another."""
    assert documents.shape[1] % num_tokens == 0
    return documents.reshape(-1, num_tokens)
