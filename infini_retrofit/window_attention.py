"""Softmax attention in a short sliding window, and linear sums over everything older.

Together they make LoLCATs' attention: both parts share one denominator, so that each query
decides by itself how much it hears of what is near and what is far. Knows nothing of memory
that comes from other segments: its sums are to be added to those here.

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
from jaxtyping import Bool, Float
from torch import Tensor

from infini_retrofit.feature_maps import computing_dtype
from infini_retrofit.local_attention import alibi_bias, masked_linear_sums, visible_keys


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
        is_key: False where a context key must not be seen; None: all count.
        window: tokens, the query's own included.
        slopes: of ALiBi; None: no ALiBi.

    Returns:
        The output, and the logarithm of its denominator once the largest score is taken off
        every score, as in LoLCATs.
    """
    num_heads, num_queries, num_keys = query.shape[1], query.shape[2], key.shape[2]
    grouped = query.unflatten(1, (key.shape[1], -1)).flatten(2, 3)
    scores = (grouped @ key.transpose(2, 3)) * query.shape[-1] ** -0.5
    scores = scores.to(computing_dtype(scores.dtype)).unflatten(2, (-1, num_queries)).flatten(1, 2)
    if slopes is not None:
        scores = scores + alibi_bias(slopes, num_queries, num_keys)
    near = visible_keys(num_queries, num_keys, query.device)
    near = near & ~_older_own(num_queries, num_keys, window, query.device)
    if is_key is not None:
        near = near & (is_key[:, None] | _own(num_queries, num_keys, query.device))
        near = near[:, None]
    scores = scores.masked_fill(~near, -torch.inf)
    log_sum = scores.logsumexp(dim=-1, keepdim=True)
    weight = (scores - log_sum).exp().to(value.dtype)
    weight = weight.unflatten(1, (key.shape[1], -1)).flatten(2, 3)
    out = (weight @ value).unflatten(2, (-1, num_queries)).flatten(1, 2)
    assert out.shape[1] == num_heads
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
    num_tokens = query.shape[2]
    return masked_linear_sums(
        query, key, value, _older_own(num_tokens, num_tokens, window, query.device)
    )


def _own(num_queries: int, num_keys: int, device: torch.device) -> Bool[Tensor, "C"]:
    """Return True at keys of the segment's own tokens."""
    return torch.arange(num_keys, device=device) >= num_keys - num_queries


def _older_own(
    num_queries: int, num_keys: int, window: int, device: torch.device
) -> Bool[Tensor, "L C"]:
    """Return True where a key is of the segment's own tokens and has left a query's window."""
    keys = torch.arange(num_keys, device=device)
    distance = keys[num_keys - num_queries :, None] - keys
    return (distance >= window) & _own(num_queries, num_keys, device)
