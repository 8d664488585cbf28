"""The tokens of a segment that has not ended yet: what a layer keeps of them between calls.

Rows may stand at different places of their segments. Knows nothing of attention and memory.

Axes:
    B  document
    W  column, filled from the right
    NK channel of all keys of a token, heads side by side
    NV channel of all values of a token
    P  rotated channel; none without rotations
"""

from dataclasses import dataclass, fields

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


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
