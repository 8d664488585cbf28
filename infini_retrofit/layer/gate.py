"""How what a query finds near and far becomes one output, as pure functions on tensors.

Knows nothing of how either part is found.

Source: Munkhdalai et al. 2024, arXiv:2404.07143v2, equation 10.

Axes:
    *B  any leading axes: batch, or batch and segment
    B   batch
    S   segment
    H   query head
    L   token within one segment
    V   value channel
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from infini_retrofit.layer.memory import SMALLEST_DENOMINATOR, quotient


@dataclass(frozen=True)
class Local:
    """What a segment's own tokens give to each query.

    Attributes:
        out: the attention's output.
        log_mass: log of its denominator, where others share it.
    """

    out: Float[Tensor, "B S H L V"]
    log_mass: Float[Tensor, "B S H L 1"] | None = None


@dataclass(frozen=True)
class Recalled:
    """What the queries find.

    Attributes:
        numerator: the sum of values, each times what its key has in common with the query.
        denominator: the sum of those weights; 0 where the memory is empty.
        logit: what the queries and their distance to the border add to the gate's logit.
    """

    numerator: Float[Tensor, "B S H L V"]
    denominator: Float[Tensor, "B S H L 1"]
    logit: Float[Tensor, "*#B #H #L 1"]


def add_up(recalled: Sequence[Recalled]) -> Recalled:
    """Put sums over different tokens together."""
    return Recalled(
        sum(r.numerator for r in recalled),
        sum(r.denominator for r in recalled),
        sum(r.logit for r in recalled),
    )


def memory_share(
    denominator: Float[Tensor, "*B H L 1"], logit: Float[Tensor, "*#B #H #L #1"]
) -> Float[Tensor, "*B H L 1"]:
    """Return the share of the MEMORY in each query's output: 0 where the memory is empty.

    Differs from the paper: there an empty memory still takes its share, which scales the first
    segment by `1 - memory_share`. Here an empty memory gives exactly the local attention.
    """
    return torch.sigmoid(logit.to(denominator.dtype)) * (denominator > SMALLEST_DENOMINATOR)


def mix(
    local: Float[Tensor, "*B H L V"],
    numerator: Float[Tensor, "*B H L V"],
    denominator: Float[Tensor, "*B H L 1"],
    share: Float[Tensor, "*B H L 1"],
) -> Float[Tensor, "*B H L V"]:
    """Blend local attention with what the memory recalls for each query (eq. 10)."""
    weight = quotient(share, denominator)
    return torch.addcmul(local * (1 - share), numerator, weight).to(local.dtype)
