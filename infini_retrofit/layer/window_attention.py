"""Softmax attention in a short sliding window, and linear sums over everything older.

Together they make LoLCATs' attention: both parts share one denominator, so that each query
decides by itself how much it hears of what is near and what is far. Knows nothing of memory
that comes from other segments: its sums are to be added to those here. Queries go in blocks, none
of which meets own keys that its windows have left: work grows with the length of a segment, not
with its square.

Source: Zhang et al. 2024, arXiv:2410.10254, equation 7.

Axes:
    B  batch (documents times segments)
    H  query head
    N  key/value head; query head h uses key/value head h // (H / N)
    L  query token
    C  key token; the last L of them are the queries' own tokens, those before are context
    G  query head of those that share a key/value head
    K  key channel
    F  feature
    V  value channel
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from infini_retrofit.layer.feature_maps import computing_dtype
from infini_retrofit.layer.local_attention import masked_linear_sums, query_blocks
from infini_retrofit.layer.memory import MemoryState, Write, retrieve, write_segments


def window_attention(
    query: Float[Tensor, "B H L K"],
    key: Float[Tensor, "B N C K"],
    value: Float[Tensor, "B N C V"],
    is_key: Bool[Tensor, "B C"] | None,
    window: int,
    slopes: Float[Tensor, "H"] | None = None,
) -> tuple[Float[Tensor, "B H L V"], Float[Tensor, "B H L 1"]]:
    """Attend with softmax to the last `window` tokens and to all context before the segment.

    Args:
        query: queries.
        key: keys.
        value: values.
        is_key: False where a context key must not be seen; None: all count. Own tokens do always.
        window: tokens, the query's own included.
        slopes: of ALiBi; None: no ALiBi.

    Returns:
        The output, and the logarithm of its denominator once the largest score is taken off
        every score, as in LoLCATs.
    """
    num_context = key.shape[2] - query.shape[2]
    parts = []
    for rows in query_blocks(query.shape[2]):
        first = max(0, rows.start - window + 1)
        seen = _positions(slice(0, num_context + rows.stop), query.device)
        keys, values = (x[:, :, : len(seen)] for x in (key, value))
        if first:
            seen = seen[(seen < num_context) | (seen >= num_context + first)]
            keys, values = keys[:, :, seen], values[:, :, seen]
        distance = num_context + _positions(rows, query.device)[:, None] - seen
        is_own = seen >= num_context
        near = (distance >= 0) & ((distance < window) | ~is_own)
        if is_key is not None:
            near = (near & (is_key[:, seen] | is_own)[:, None])[:, None]
        bias = None if slopes is None else -slopes[:, None, None] * distance
        parts.append(_attend(query[:, :, rows], keys, values, near, bias))
    outs, masses = zip(*parts, strict=True)
    return torch.cat(outs, dim=2), torch.cat(masses, dim=2)


def _attend(
    query: Float[Tensor, "B H L K"],
    key: Float[Tensor, "B N C K"],
    value: Float[Tensor, "B N C V"],
    near: Bool[Tensor, "*#B L C"],
    bias: Float[Tensor, "H L C"] | None,
) -> tuple[Float[Tensor, "B H L V"], Float[Tensor, "B H L 1"]]:
    """Attend with softmax to the keys that are near."""
    num_queries = query.shape[2]
    grouped = query.unflatten(1, (key.shape[1], -1)).flatten(2, 3)
    scores = (grouped @ key.transpose(2, 3)) * query.shape[-1] ** -0.5
    scores = scores.to(computing_dtype(scores.dtype)).unflatten(2, (-1, num_queries)).flatten(1, 2)
    if bias is not None:
        scores = scores + bias
    scores = scores.masked_fill(~near, -torch.inf)
    log_sum = scores.logsumexp(dim=-1, keepdim=True)
    weight = (scores - log_sum).exp().to(value.dtype)
    weight = weight.unflatten(1, (key.shape[1], -1)).flatten(2, 3)
    out = (weight @ value).unflatten(2, (-1, num_queries)).flatten(1, 2)
    return out, log_sum - scores.amax(dim=-1, keepdim=True)


def older_sums(
    query: Float[Tensor, "B H L F"],
    key: Float[Tensor, "B N L F"],
    value: Float[Tensor, "B N L V"],
    window: int,
) -> tuple[Float[Tensor, "B H L V"], Float[Tensor, "B H L 1"]]:
    """Return the linear sums over a segment's own tokens that a query's window has left behind.

    Args:
        query: features of the queries.
        key: features of the segment's own keys.
        value: its values.
        window: tokens, the query's own included.
    """
    parts, state, num_summed = [], None, 0
    for rows in query_blocks(query.shape[2]):
        # Older than the window of every query of the block.
        num_older = max(0, rows.start - window + 1)
        if num_older > num_summed:
            added = slice(num_summed, num_older)
            state = _add(state, write_segments(Write(key[:, :, added], value[:, :, added])))
            num_summed = num_older
        beside = slice(num_summed, rows.stop)
        keys = _positions(beside, query.device)
        is_older = _positions(rows, query.device)[:, None] - keys >= window
        block = query[:, :, rows]
        with torch.autocast(query.device.type, enabled=False):
            sums = masked_linear_sums(block, key[:, :, beside], value[:, :, beside], is_older)
        if state is not None:
            sums = tuple(a + b for a, b in zip(sums, retrieve(block, state), strict=True))
        parts.append(sums)
    numerators, denominators = zip(*parts, strict=True)
    return torch.cat(numerators, dim=2), torch.cat(denominators, dim=2)


def _add(state: MemoryState | None, added: MemoryState) -> MemoryState:
    if state is None:
        return added
    return MemoryState(state.matrix + added.matrix, state.normalizer + added.normalizer)


def _positions(tokens: slice, device: torch.device) -> Int[Tensor, "L"]:
    """Return the indices of some tokens in their segment."""
    return torch.arange(tokens.start, tokens.stop, device=device)
