"""A rival that keeps the keys and values which got the most attention, behind a window.

At each border the tokens that leave the window compete with those that were kept. The attention
that each has got so far decides, for every layer and key/value head apart. What is dropped never
comes back. Knows nothing of how models are scored.

Source: Zhang et al. 2023, arXiv:2306.14048 (H2O).

Differs from the paper: tokens are dropped at borders of segments, not one by one.

Axes:
    B  document
    L  token of a segment
    T  token of a document
    N  key/value head
    G  query head of those that share a key/value head
    K  key channel
    X  key or value channel
    R  token in reach of a segment: kept, then in the window, then its own
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from infini_retrofit.layer.attention import InfiniAttention
from infini_retrofit.layer.cut import Cut, rotate

BYTES_PER_MASS = 4  # of the attention that a token has got, float32


class SelectedAttention(nn.Module):
    """Softmax attention over a segment, a window before it and kept tokens.

    It takes the place of an `InfiniAttention` with softmax, RoPE and no memory, and computes the
    same where it keeps no token. Kept tokens stay at their own positions.
    """

    def __init__(self, own: InfiniAttention, num_kept: int) -> None:
        super().__init__()
        self.shape, self.local_context, self.num_kept = own.shape, own.local_context, num_kept
        self.own = own

    @property
    def state_bytes(self) -> int:
        """Bytes that cross a border in this layer: keys and values, and what each token got."""
        num_tokens = self.local_context + self.num_kept
        masses = self.shape.num_kv_heads * BYTES_PER_MASS
        return num_tokens * (self.shape.context_token_bytes() + masses)

    def forward(
        self,
        hidden_states: Float[Tensor, "BS L D"],
        position_embeddings: tuple[Tensor, Tensor],
        cut: Cut,
        **_: object,
    ) -> tuple[Float[Tensor, "BS L D"], None]:
        """Attend segment by segment; the rows are folded documents."""
        length = hidden_states.shape[1]
        cos, sin = (self._line(x.expand(len(hidden_states), -1, -1), cut)[:, None]
                    for x in position_embeddings)
        if not self.shape.rotates:
            cos, sin = cos[..., :0], sin[..., :0]
        query, key, value = (
            self._line(x, cut).unflatten(-1, (-1, self.shape.head_dim)).transpose(1, 2)
            for x in self.own.project(hidden_states)
        )
        query = rotate(query, cos, sin).unflatten(1, (key.shape[1], -1))
        first, key = key[:, :, :1], rotate(key, cos, sin)
        mass = torch.zeros(key.shape[:3], device=key.device)
        kept = mass.new_zeros(*mass.shape[:2], 0, dtype=torch.long)
        outputs = []
        for begin in range(0, key.shape[2], length):
            end = begin + length
            window, keys = self._window(first, key, begin, cos, sin)
            window = torch.cat([window, torch.arange(begin, end, device=key.device)])
            reach = torch.cat([kept, window.expand(*kept.shape[:2], -1)], dim=2)
            keys = torch.cat([_pick(key, kept), keys, key[:, :, begin:end]], dim=2)
            out, got = attend(
                query[..., begin:end, :], keys, _pick(value, reach), self.shape.scaling
            )
            outputs.append(out.flatten(1, 2).transpose(1, 2).flatten(2))
            mass.scatter_add_(2, reach, got)
            kept = self._keep(mass, kept, begin, end)
        out = torch.cat(outputs, dim=1).reshape(*hidden_states.shape[:2], -1)
        return self.own.o_proj(out.to(hidden_states.dtype)), None

    @staticmethod
    def _line(x: Tensor, cut: Cut) -> Tensor:
        """Lay the segments of a document out one after another."""
        return x.unflatten(0, (-1, cut.num_segments)).flatten(1, 2)

    def _window(
        self,
        first: Float[Tensor, "B N 1 K"],
        key: Float[Tensor, "B N T K"],
        begin: int,
        cos: Tensor,
        sin: Tensor,
    ) -> tuple[Int[Tensor, "_"], Float[Tensor, "B N _ K"]]:
        """Return the tokens in the window before a segment, and their keys.

        The document's first token stands next to the window, as in `layer.local_context`.
        """
        start = max(begin - self.local_context, 0)
        window = torch.arange(start, begin, device=key.device)
        keys = key[:, :, start:begin]
        if start and len(window):
            sink = rotate(first, cos[:, :, start : start + 1], sin[:, :, start : start + 1])
            window[0], keys = 0, torch.cat([sink, keys[:, :, 1:]], dim=2)
        return window, keys

    def _keep(
        self, mass: Float[Tensor, "B N T"], kept: Int[Tensor, "B N _"], begin: int, end: int
    ) -> Int[Tensor, "B N _"]:
        """Return the tokens to keep after a segment, in their order."""
        num_recent, has_sink = max(self.local_context - 1, 0), int(self.local_context > 0)
        leaving = range(max(begin - num_recent, has_sink), max(end - num_recent, has_sink))
        leaving = torch.tensor(leaving, dtype=torch.long, device=mass.device)
        candidates = torch.cat([kept, leaving.expand(*kept.shape[:2], -1)], dim=2)
        num_kept = min(self.num_kept, candidates.shape[2])
        best = mass.gather(2, candidates).topk(num_kept, dim=2).indices
        return candidates.gather(2, best).sort(dim=2).values


def attend(
    query: Float[Tensor, "B N G L K"],
    key: Float[Tensor, "B N R K"],
    value: Float[Tensor, "B N R K"],
    scaling: float | None = None,
) -> tuple[Float[Tensor, "B N G L K"], Float[Tensor, "B N R"]]:
    """Attend causally, and sum the weights that each token gets; the last L are the queries'."""
    num_queries, num_keys = query.shape[3], key.shape[2]
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = (query * scaling) @ key[:, :, None].transpose(3, 4)
    future = _future(num_queries, num_keys, key.device)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    weights = scores.masked_fill_(future, -torch.inf).softmax(dim=-1)
    return weights.to(value.dtype) @ value[:, :, None], weights.sum(dim=(2, 3)).float()


def _future(num_queries: int, num_keys: int, device: torch.device) -> Bool[Tensor, "L R"]:
    mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device)
    return mask.triu(diagonal=num_keys - num_queries + 1)


def _pick(x: Float[Tensor, "B N T X"], tokens: Int[Tensor, "B N _"]) -> Float[Tensor, "B N _ X"]:
    return x.gather(2, tokens[..., None].expand(-1, -1, -1, x.shape[-1]))
