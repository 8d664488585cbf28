"""Causal attention inside a segment, as pure functions on tensors.

Nothing here knows of the memory, of layers or of `transformers`. Queries and keys come with
their position encoding already applied, or without one.

Axes:
    B  batch (documents times segments)
    H  query head
    N  key/value head; query head h uses key/value head h // (H / N)
    L  query token
    C  key token; the last L of them are the queries' own tokens, those before are context
    K  key channel
    V  value channel
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from infini_retrofit.memory import SMALLEST_DENOMINATOR, feature_map, state_dtype

# Up to this many tokens explicit products beat the fused kernel of a CPU in training.
LONGEST_EXPLICIT = 512


def visible_keys(num_queries: int, num_keys: int, device: torch.device) -> Bool[Tensor, "L C"]:
    """Return True where a query may see a key: all context, and its own past."""
    rows = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device)
    return rows.tril(diagonal=num_keys - num_queries)


def softmax_attention(
    query: Float[Tensor, "B H L K"],
    key: Float[Tensor, "B N C K"],
    value: Float[Tensor, "B N C V"],
    is_key: Bool[Tensor, "B C"] | None = None,
    scaling: float | None = None,
) -> Float[Tensor, "B H L V"]:
    """Attend causally with softmax (scale 1 / sqrt(K) unless given).

    Args:
        query: queries.
        key: keys.
        value: values.
        is_key: False where a key must not be seen (padding, or context before the first
            segment); a query always sees its own token. None: all keys count.
        scaling: factor on the scores.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    num_queries, num_keys = query.shape[2], key.shape[2]
    on_cpu = query.device.type == "cpu"
    if on_cpu and max(num_queries, num_keys) <= LONGEST_EXPLICIT:
        return _explicit_softmax_attention(query, key, value, is_key, scaling)
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    if is_key is None and num_queries == num_keys:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    mask = _mask(num_queries, num_keys, is_key, query.device)
    mask = mask[None] if mask.dim() == 2 else mask
    return F.scaled_dot_product_attention(query, key, value, mask[:, None], scale=scaling)


def _mask(
    num_queries: int, num_keys: int, is_key: Bool[Tensor, "B C"] | None, device: torch.device
) -> Tensor:
    visible = visible_keys(num_queries, num_keys, device)
    if is_key is None:
        return visible
    own = torch.eye(num_queries, dtype=torch.bool, device=device)
    own = F.pad(own, (num_keys - num_queries, 0))
    return (visible & is_key[:, None, :]) | own


def _explicit_softmax_attention(
    query: Tensor, key: Tensor, value: Tensor, is_key: Tensor | None, scaling: float
) -> Tensor:
    batch, num_heads, num_queries, key_dim = query.shape
    num_kv_heads, num_keys = key.shape[1:3]
    rows = (batch, num_kv_heads, num_heads // num_kv_heads, num_queries)
    grouped = (query * scaling).reshape(batch * num_kv_heads, -1, key_dim)
    scores = grouped @ key.reshape(batch * num_kv_heads, num_keys, key_dim).transpose(1, 2)
    mask = _mask(num_queries, num_keys, is_key, query.device)
    bias = torch.zeros_like(mask, dtype=scores.dtype).masked_fill_(~mask, -torch.inf)
    bias = bias if is_key is None else bias[:, None, None]
    # The row maximum is finite, because a query always sees its own token.
    weights = (scores.view(*rows, num_keys) + bias).softmax(dim=-1)
    weights = weights.view(batch * num_kv_heads, -1, num_keys)
    out = weights @ value.reshape(batch * num_kv_heads, num_keys, -1)
    return out.view(batch, num_heads, num_queries, -1)


def linear_attention(
    query: Float[Tensor, "B H L K"],
    key: Float[Tensor, "B N C K"],
    value: Float[Tensor, "B N C V"],
    is_key: Bool[Tensor, "B C"] | None = None,
) -> Float[Tensor, "B H L V"]:
    """Attend causally with weights feature(query) . feature(key), normalised to sum 1.

    Source: Katharopoulos et al. 2020, arXiv:2006.16236, equations 8 and 9.
    """
    batch, num_heads, num_queries, key_dim = query.shape
    num_kv_heads, num_keys = key.shape[1:3]
    grouped = feature_map(query).reshape(batch * num_kv_heads, -1, key_dim)
    feature = feature_map(key).reshape(batch * num_kv_heads, num_keys, key_dim)
    scores = (grouped @ feature.transpose(1, 2)).view(batch, num_heads, num_queries, num_keys)
    mask = _mask(num_queries, num_keys, is_key, query.device)
    scores = scores * (mask if is_key is None else mask[:, None])
    total = scores.sum(dim=-1, keepdim=True, dtype=state_dtype(scores.dtype))
    scores = scores.view(batch * num_kv_heads, -1, num_keys)
    out = scores @ value.reshape(batch * num_kv_heads, num_keys, -1)
    out = out.view(batch, num_heads, num_queries, -1)
    return (out / total.clamp_min(SMALLEST_DENOMINATOR)).to(value.dtype)
