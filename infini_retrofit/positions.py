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
from jaxtyping import Float
from torch import Tensor

from infini_retrofit.carrier import SegmentCut
from infini_retrofit.local_context import Place


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
