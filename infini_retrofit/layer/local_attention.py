"""Causal attention inside a segment, as pure functions on tensors.

Queries and keys are rotated already, or need no rotation. Knows nothing of the memory, of layers
or of `transformers`.

Axes:
    B  batch (documents times segments)
    H  query head
    N  key/value head; query head h uses key/value head h // (H / N)
    L  query token
    M  query token of a block
    C  key token; the last L of them are the queries' own tokens, those before are context
    G  query head of those that share a key/value head
    K  key channel
    V  value channel
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from infini_retrofit.layer.feature_maps import FeatureMaps, computing_dtype
from infini_retrofit.layer.memory import quotient

# On a CPU explicit products beat the fused kernel, by 2.8 times in training at 256 tokens. In
# training they keep weights, which limits their length; without gradients they keep none.
LONGEST_EXPLICIT = 1024  # tokens
LONGER_WITHOUT_GRADIENTS = 4  # times
QUERIES_PER_BLOCK = 128


def prefers_products(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Return whether explicit products are faster than a fused kernel."""
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    longest = LONGEST_EXPLICIT * (1 if needs_grad else LONGER_WITHOUT_GRADIENTS)
    return query.device.type == "cpu" and max(query.shape[2], key.shape[2]) <= longest


def softmax_attention(
    query: Float[Tensor, "B H L K"],
    key: Float[Tensor, "B N C K"],
    value: Float[Tensor, "B N C V"],
    is_key: Bool[Tensor, "B C"] | None = None,
    scaling: float | None = None,
    slopes: Float[Tensor, "H"] | None = None,
    window: int | None = None,
) -> Float[Tensor, "B H L V"]:
    """Attend causally with softmax (scale 1 / sqrt(K) unless given).

    `is_key` is False where a key must not be seen: padding, or context before the first segment.
    A query always sees its own token. `slopes` are those of ALiBi; `window` is the number of
    tokens that a query sees, its own among them.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    num_queries, num_keys = query.shape[2], key.shape[2]
    if window is not None and window >= num_keys:
        window = None
    if num_queries == 1 and slopes is None and window is None:
        return _attend_once(query, key, value, is_key, scaling)
    if prefers_products(query, key, value):
        return _ExplicitSoftmaxAttention.apply(query, key, value, is_key, scaling, slopes, window)
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    plain = is_key is None and slopes is None and window is None
    if plain and num_queries == num_keys:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    mask = _mask(num_queries, num_keys, is_key, query.device, window)
    if slopes is not None:
        bias = alibi_bias(slopes, num_queries, num_keys).to(query.dtype)
        mask = bias.masked_fill(~mask, -torch.inf)
    return F.scaled_dot_product_attention(query, key, value, mask, scale=scaling)


def _attend_once(
    query: Float[Tensor, "B H 1 K"],
    key: Float[Tensor, "B N C K"],
    value: Float[Tensor, "B N C V"],
    is_key: Bool[Tensor, "B C"] | None,
    scaling: float,
) -> Float[Tensor, "B H 1 V"]:
    """Attend with one query, as while generating: the last key is its own."""
    if is_key is not None:
        is_key = F.pad(is_key[:, :-1], (0, 1), value=True)[:, None, None]
    # The query heads that share a key/value head become its queries: on a CPU in bfloat16 six to
    # eight times as fast as the kernel's own `enable_gqa`.
    rows = query.reshape(*key.shape[:2], -1, query.shape[-1])
    out = F.scaled_dot_product_attention(rows, key, value, is_key, scale=scaling)
    return out.reshape(*query.shape[:3], -1)


def alibi_slopes(num_heads: int) -> Float[Tensor, "H"]:
    """Return each head's slope: 2^(-8 h / H) for h = 1 ... H.

    Source: Press et al. 2022, arXiv:2108.12409, section 3.

    Differs from the paper: the same formula also where H is no power of two.
    """
    return 2.0 ** (-8.0 * torch.arange(1, num_heads + 1) / num_heads)


def alibi_bias(
    slopes: Float[Tensor, "H"], num_queries: int, num_keys: int
) -> Float[Tensor, "H L C"]:
    """Return the bias that ALiBi adds to the scores."""
    keys = torch.arange(num_keys, device=slopes.device)
    distance = keys[num_keys - num_queries :, None] - keys
    return -slopes[:, None, None] * distance


def _mask(
    num_queries: int,
    num_keys: int,
    is_key: Bool[Tensor, "B C"] | None,
    device: torch.device,
    window: int | None = None,
) -> Bool[Tensor, "#B 1 L C"]:
    """Return True where a query may see a key: itself, and those before it that are not hidden."""
    num_context = num_keys - num_queries
    past = torch.ones(1, 1, num_queries, num_keys, dtype=torch.bool, device=device)
    past = past.tril(diagonal=num_context)
    if window is not None:
        past = past.triu(diagonal=num_context - window + 1)
    if is_key is None:
        return past
    own = F.pad(torch.eye(num_queries, dtype=torch.bool, device=device), (num_context, 0))
    return (past & is_key[:, None, None]) | own


class _ExplicitSoftmaxAttention(torch.autograd.Function):
    """Softmax attention by explicit products over blocks of queries.

    A block skips the keys after its last query, which saves up to half of the work.
    """

    @staticmethod
    def forward(
        ctx,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        is_key: Tensor | None,
        scaling: float,
        slopes: Tensor | None,
        window: int | None,
    ) -> Tensor:
        query = _group(query, key.shape[1])
        key, value = key.contiguous() * scaling, value.contiguous()
        out = _empty_groups(query, value.shape[-1])
        weights = []
        seen = key.shape[2] - query.shape[2]
        blocks = (x.split(QUERIES_PER_BLOCK, dim=2) for x in (query, out))
        for own, own_out in zip(*blocks, strict=True):
            seen += own.shape[2]
            scores = _products(own, key[:, :, :seen].transpose(2, 3))
            if slopes is not None:
                scores.add_(_group(alibi_bias(slopes, scores.shape[2], seen)[None], key.shape[1]))
            _hide_keys(scores, is_key, window)
            # A row's maximum is finite, because a query always sees its own token.
            weight = scores.softmax(dim=-1)
            own_out.copy_(_products(weight, value[:, :, :seen]))
            if any(ctx.needs_input_grad):
                weights.append(weight)
        ctx.save_for_backward(query, key, value, *weights)
        ctx.scaling = scaling
        return _ungroup(out)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *weights = ctx.saved_tensors
        grad_out = _group(grad_out, key.shape[1])
        grad_query = _empty_groups(query, query.shape[-1])
        grad_key, grad_value = torch.zeros_like(key), torch.zeros_like(value)
        blocks = (x.split(QUERIES_PER_BLOCK, dim=2) for x in (query, grad_query, grad_out))
        for own, own_grad, out, weight in zip(*blocks, weights, strict=True):
            seen = weight.shape[-1]
            grad_value[:, :, :seen].add_(weight.flatten(2, 3).transpose(2, 3) @ out.flatten(2, 3))
            grad = _products(out, value[:, :, :seen].transpose(2, 3))
            grad = torch._softmax_backward_data(grad, weight, -1, weight.dtype)
            own_grad.copy_(_products(grad, key[:, :, :seen]))
            grad_key[:, :, :seen].add_(grad.flatten(2, 3).transpose(2, 3) @ own.flatten(2, 3))
        return _ungroup(grad_query), grad_key * ctx.scaling, grad_value, *(None,) * 4


def _hide_keys(
    scores: Float[Tensor, "B N L G C"], is_key: Bool[Tensor, "B *"] | None, window: int | None
) -> None:
    """Set the scores of keys that must not be seen to minus infinity, in place."""
    num_queries, num_keys = scores.shape[2], scores.shape[4]
    if is_key is not None:
        is_key = is_key[:, :num_keys]
    elif window is None:
        # Then only keys beside the queries themselves can be in the future.
        scores, num_keys = scores[..., num_keys - num_queries :], num_queries
    mask = _mask(num_queries, num_keys, is_key, scores.device, window)
    bias = torch.zeros_like(mask, dtype=scores.dtype).masked_fill_(~mask, -torch.inf)
    scores.add_(bias.reshape(-1, 1, num_queries, 1, num_keys))


def _group(x: Float[Tensor, "B H L K"], num_kv_heads: int) -> Float[Tensor, "B N L G K"]:
    """Group the query heads that share a key/value head."""
    return x.unflatten(1, (num_kv_heads, -1)).transpose(2, 3).contiguous()


def _empty_groups(x: Float[Tensor, "B N L G K"], size: int) -> Float[Tensor, "B N L G V"]:
    """Allocate a result in the memory order of the output projection: L first."""
    batch, num_kv_heads, num_tokens, group, _ = x.shape
    return x.new_empty(batch, num_tokens, num_kv_heads, group, size).transpose(1, 2)


def _ungroup(x: Float[Tensor, "B N L G K"]) -> Float[Tensor, "B H L K"]:
    return x.transpose(1, 2).flatten(2, 3).transpose(1, 2)


def _products(
    x: Float[Tensor, "B N M G K"], matrix: Float[Tensor, "B N K V"]
) -> Float[Tensor, "B N M G V"]:
    """Multiply tokens with all heads of their group, as rows of one product."""
    return (x.flatten(2, 3) @ matrix).unflatten(2, (-1, x.shape[3]))


def linear_attention(
    query: Float[Tensor, "B H L K"],
    key: Float[Tensor, "B N C K"],
    value: Float[Tensor, "B N C V"],
    is_key: Bool[Tensor, "B C"] | None,
    feature_maps: FeatureMaps,
) -> Float[Tensor, "B H L V"]:
    """Attend causally with weights feature(query) . feature(key), normalised to sum 1.

    Source: Katharopoulos et al. 2020, arXiv:2006.16236, equations 8 and 9.
    """
    mask = _mask(query.shape[2], key.shape[2], is_key, query.device)
    query, key = feature_maps.of_query(query), feature_maps.of_key(key)
    # The query heads that share a key/value head become rows of one product.
    rows = query.unflatten(1, (key.shape[1], -1)).flatten(2, 3)
    weights = (rows @ key.transpose(2, 3)).view(*query.shape[:3], -1) * mask
    total = weights.sum(dim=-1, keepdim=True, dtype=computing_dtype(weights.dtype))
    out = weights.view(*rows.shape[:3], -1) @ value.to(weights.dtype)
    return quotient(out.view(*query.shape[:3], -1), total).to(value.dtype)
