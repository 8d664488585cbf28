"""`Tokens`: keys and values of tokens in columns, before position encoding, with their positions.

Knows nothing of segments, memory and attention.

Axes:
    B  document
    W  column, filled from the right
    NK channel of all keys of a token, heads side by side
    NV channel of all values of a token
    N  key/value head
    K  key channel
    V  value channel
    P  rotated channel; none without rotations
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor

from infini_retrofit.layer.cut import like, rotate


@dataclass(frozen=True)
class Tokens:
    """Keys and values of a call, of a carried context, or of a segment that has not ended.

    Rows may stand at different places of their documents.
    """

    key: Float[Tensor, "B W NK"]  # without position encoding
    value: Num[Tensor, "B W NV"]
    cos: Float[Tensor, "B W P"]
    sin: Float[Tensor, "B W P"]
    is_token: Bool[Tensor, "B W"]

    @classmethod
    def of(
        cls,
        key: Float[Tensor, "B W NK"],
        value: Num[Tensor, "B W NV"],
        tables: tuple[Tensor, Tensor] | None,
        is_token: Bool[Tensor, "B W"] | None,
    ) -> "Tokens":
        """Put the tokens of one call together; the tables are one for all rows or one each."""
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

    def map(self, change: Callable[[Tensor], Tensor]) -> "Tokens":
        """Change every tensor."""
        return Tokens(*map(change, vars(self).values()))

    def columns(self, begin: int, end: int | None = None) -> "Tokens":
        """Return some of the columns."""
        return self.map(lambda x: x[:, begin:end])

    def heads(self, num_kv_heads: int) -> tuple[Tensor, Tensor]:
        """Return rotated keys (B W N K) and values (B W N V)."""
        key, value = (x.unflatten(-1, (num_kv_heads, -1)) for x in (self.key, self.value))
        if self.cos.shape[-1]:
            key = rotate(key, self.cos[:, :, None], self.sin[:, :, None])
        return key, value

    def followed_by(self, new: "Tokens") -> "Tokens":
        """Append the columns of a later call."""
        pairs = zip(vars(self).values(), vars(new).values(), strict=True)
        return Tokens(*(torch.cat([old.to(x.dtype), x], dim=1) for old, x in pairs))

    def after(self, num_tokens: Int[Tensor, "B"]) -> "Tokens":
        """Drop the first tokens of each row; the longest row that is left has no padding."""
        is_left = self.is_token & (self.is_token.cumsum(dim=1) > num_tokens[:, None])
        width = int(is_left.sum(dim=1).max())
        order = is_left.int().argsort(dim=1, stable=True)[:, len(self) - width :]
        columns = (*list(vars(self).values())[:-1], is_left)
        return Tokens(*(x.take_along_dim(like(order, x), dim=1) for x in columns))
