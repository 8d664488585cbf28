"""Feature maps: queries and keys as vectors of linear attention or of a delta rule.

Knows nothing of memory, layers and positions.

Axes:
    *B  any leading axes
    H   query head
    N   key/value head
    L   token
    K   channel of a query or key
    F   feature
    P   projection, two features each
"""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

FeatureMapName = Literal["elu1", "hedgehog", "unit"]
FEATURES_PER_CHANNEL = {"elu1": 1, "hedgehog": 2, "unit": 1}
# Larger exponents would overflow float32 in the sums over a long document.
LARGEST_EXPONENT = 20.0


def computing_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the number type in which features and sums of `dtype` are computed."""
    return torch.promote_types(dtype, torch.float32)


def elu1(x: Float[Tensor, "*B"]) -> Float[Tensor, "*B"]:
    """Map to positive features, ELU(x) + 1.

    Written as exp(x) for negative x: `elu(x) + 1` rounds to 0 in float32 from about -17 on.

    Source: Katharopoulos et al. 2020, arXiv:2006.16236, equation 7.
    """
    return _Elu1.apply(x)


class _Elu1(torch.autograd.Function):
    """`elu1` without `torch.where`, which takes most of the time on a CPU."""

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


def hedgehog(
    x: Float[Tensor, "*B H L K"], weight: Float[Tensor, "H K P"]
) -> Float[Tensor, "*B H L F"]:
    """Map to the exponentials of learned projections and of their negatives.

    Source: Zhang et al. 2024, arXiv:2402.04347, equation 6.

    Differs from the paper: no bias, as many projections as one likes, and exponents end at
    `LARGEST_EXPONENT`.
    """
    projected = (x @ weight).clamp(-LARGEST_EXPONENT, LARGEST_EXPONENT)
    return torch.cat([projected, -projected], dim=-1).exp()


def unit(x: Float[Tensor, "*B H L K"], weight: Float[Tensor, "H K F"]) -> Float[Tensor, "*B H L F"]:
    """Map to learned projections of length 1, of either sign: a delta rule needs no positive keys.

    Source: Yang et al. 2024, arXiv:2406.06484, section 3.3 (L2-normed queries and keys).
    """
    return F.normalize(x @ weight, dim=-1)


class FeatureMaps(nn.Module):
    """The feature maps of one layer: one for its queries and one for its keys.

    `hedgehog` starts as the exponential of x / K^(1/4): a query and a key, each scaled so, have
    the dot product that softmax attention exponentiates. With fewer features it starts from random
    orthogonal directions, the same for queries and keys. `unit` starts as x / |x|, x cut off after
    so many channels as there are features.
    """

    def __init__(
        self,
        name: FeatureMapName,
        num_heads: int,
        num_kv_heads: int,
        key_dim: int,
        num_features: int,
    ) -> None:
        super().__init__()
        self.name = name
        self.num_features = num_features
        self.query_weight = self.key_weight = None
        if name == "hedgehog":
            start = torch.eye(key_dim)
            if num_features < 2 * key_dim:
                start = torch.linalg.qr(torch.randn(key_dim, num_features // 2)).Q
            start = start * key_dim**-0.25
        if name == "unit":
            start = torch.eye(key_dim, num_features)
        if name != "elu1":
            self.query_weight = nn.Parameter(start.repeat(num_heads, 1, 1))
            self.key_weight = nn.Parameter(start.repeat(num_kv_heads, 1, 1))

    def of_query(self, query: Float[Tensor, "*B H L K"]) -> Float[Tensor, "*B H L F"]:
        """Map queries, in float32 or above, autocast or not."""
        return self(query, "query_weight")

    def of_key(self, key: Float[Tensor, "*B N L K"]) -> Float[Tensor, "*B N L F"]:
        """Map keys, in float32 or above, autocast or not."""
        return self(key, "key_weight")

    def forward(self, x: Tensor, weight_name: str) -> Tensor:
        """Map by one of the weights; what hooks do to a module, they do when it is called."""
        weight = getattr(self, weight_name)
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(computing_dtype(x.dtype), memory_format=torch.contiguous_format)
            if self.name == "elu1":
                return elu1(x)
            return (unit if self.name == "unit" else hedgehog)(x, weight.to(x.dtype))
