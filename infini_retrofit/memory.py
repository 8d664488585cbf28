"""Compressive memory of Infini-attention, as pure functions on tensors.

Memory is a value: it comes in as an argument and goes out as a result. Nothing here knows of
layers, position encodings, checkpoints or `transformers`.

Source: Munkhdalai et al. 2024, arXiv:2404.07143v2, equations 7, 8 and 10.

Axes:
    *B  any leading axes: batch, or batch and segment
    B   batch
    S   segment
    H   query head
    N   key/value head; H is a multiple of N, and query head h uses key/value head h // (H / N)
    L   token within one segment
    K   key channel
    V   value channel
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

# Below this a denominator counts as an empty memory. In float32 its square still has an inverse,
# which the gradient of a quotient needs.
SMALLEST_DENOMINATOR = 1e-18


@dataclass(frozen=True)
class MemoryState:
    """What one layer keeps of all segments before the current one, never below float32.

    Attributes:
        matrix: M in the paper, the sum over past tokens of feature(key) times value.
        normalizer: z in the paper, the sum over past tokens of feature(key).
    """

    matrix: Float[Tensor, "*B N K V"]
    normalizer: Float[Tensor, "*B N K"]

    def detach(self) -> "MemoryState":
        """Cut the gradient here, so that back-propagation stops at this segment."""
        return MemoryState(self.matrix.detach(), self.normalizer.detach())

    def roll_batch(self) -> "MemoryState":
        """Hand every document the memory of the document before it in the batch."""
        return MemoryState(self.matrix.roll(1, dims=0), self.normalizer.roll(1, dims=0))


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of a memory that is written from tensors of `dtype`."""
    return torch.promote_types(dtype, torch.float32)


def memory_bytes(num_heads: int, key_dim: int, value_dim: int) -> int:
    """Count the bytes of one layer's float32 memory, kept once for each key/value head."""
    return 4 * num_heads * (key_dim * value_dim + key_dim)


def feature_map(x: Float[Tensor, "*B"]) -> Float[Tensor, "*B"]:
    """Map queries or keys to positive features, ELU(x) + 1 (below eq. 7).

    Written as exp(x) for negative x: `elu(x) + 1` rounds to 0 in float32 from about -17 on.
    """
    return _FeatureMap.apply(x)


class _FeatureMap(torch.autograd.Function):
    """`feature_map` without `torch.where`, which takes most of the time on a CPU."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        feature = x.clamp(max=0).exp_().add_(x.clamp(min=0))
        ctx.save_for_backward(feature)
        return feature

    @staticmethod
    def backward(ctx, grad_feature: Tensor) -> Tensor:
        (feature,) = ctx.saved_tensors
        # The derivative is exp(x) where x is negative, as the feature itself, and 1 elsewhere.
        return grad_feature * feature.clamp(max=1)


def write_segments(
    key: Float[Tensor, "*B N L K"],
    value: Float[Tensor, "*B N L V"],
    is_token: Bool[Tensor, "*B L"] | None = None,
) -> MemoryState:
    """Return what each segment by itself adds to the memory (the sums of eq. 8).

    Args:
        key: keys before position encoding.
        value: values.
        is_token: False where a position is padding, which must not be written; None: no padding.
    """
    with torch.autocast(key.device.type, enabled=False):
        feature = feature_map(key.to(state_dtype(key.dtype)))
        if is_token is not None:
            feature = feature * is_token[..., None, :, None]
        matrix = feature.transpose(-1, -2) @ value.to(feature.dtype)
        return MemoryState(matrix, feature.sum(dim=-2))


def prefix_states(
    written: MemoryState, initial: MemoryState | None = None
) -> tuple[MemoryState, MemoryState]:
    """Turn what each segment writes into what each segment finds, for all segments at once.

    Args:
        written: leading axes (batch, segment), from `write_segments`.
        initial: the memory before the first segment, leading axis (batch); None: empty.

    Returns:
        The memory before each segment (batch, segment), and the one after the last (batch).
    """
    parts = []
    for name in ("matrix", "normalizer"):
        added = getattr(written, name)
        first = torch.zeros_like(added[:, 0]) if initial is None else getattr(initial, name)
        # Shifted, not `cumsum - own`: subtracting would leak rounding of the segment's own
        # tokens into what its earlier tokens read.
        parts.append(torch.cat([first.to(added.dtype)[:, None], added], dim=1).cumsum(dim=1))
    matrix, normalizer = parts
    before = MemoryState(matrix[:, :-1], normalizer[:, :-1])
    return before, MemoryState(matrix[:, -1], normalizer[:, -1])


def retrieve(
    query: Float[Tensor, "*B H L K"], state: MemoryState
) -> tuple[Float[Tensor, "*B H L V"], Float[Tensor, "*B H L 1"]]:
    """Read the memory once for each query (eq. 7), numerator and denominator apart.

    Args:
        query: queries before position encoding.
        state: a memory for each of the query's leading axes.
    """
    num_heads, num_tokens = query.shape[-3:-1]
    num_kv_heads = state.normalizer.shape[-2]
    with torch.autocast(query.device.type, enabled=False):
        query = query.to(state.matrix.dtype, memory_format=torch.contiguous_format)
        feature = feature_map(query)
        # The query heads that share a key/value head become rows of one product.
        feature = feature.unflatten(-3, (num_kv_heads, num_heads // num_kv_heads)).flatten(-3, -2)
        shape = (num_heads, num_tokens)
        numerator = feature @ state.matrix
        denominator = feature @ state.normalizer[..., None]
    return _split_groups(numerator, *shape), _split_groups(denominator, *shape)


def _split_groups(x: Float[Tensor, "*B N GL V"], num_heads: int, num_tokens: int) -> Tensor:
    return x.unflatten(-2, (num_heads // x.shape[-3], num_tokens)).flatten(-4, -3)


def recall(query: Float[Tensor, "*B H L K"], state: MemoryState) -> Float[Tensor, "*B H L V"]:
    """Read the memory once for each query (eq. 7); an empty memory reads as zeros."""
    numerator, denominator = retrieve(query, state)
    return numerator / denominator.clamp_min(SMALLEST_DENOMINATOR)


def mix(
    local: Float[Tensor, "*B H L V"],
    query: Float[Tensor, "*B H L K"],
    state: MemoryState,
    gate_logit: Float[Tensor, "H"],
) -> Float[Tensor, "*B H L V"]:
    """Blend local attention with what the memory recalls for each query (eq. 10).

    `sigmoid(gate_logit)` is the share of the MEMORY: a large negative logit gives the base
    model back, a large positive one hears the memory alone.

    Differs from the paper: there an empty memory still takes its share, which scales the first
    segment by `1 - memory_share`. Here an empty memory gives exactly the local attention.
    """
    numerator, denominator = retrieve(query, state)
    holds_something = denominator > SMALLEST_DENOMINATOR
    share = torch.sigmoid(gate_logit.to(denominator.dtype))[:, None, None] * holds_something
    weight = share / denominator.clamp_min(SMALLEST_DENOMINATOR)
    return torch.addcmul(local * (1 - share), numerator, weight).to(local.dtype)
