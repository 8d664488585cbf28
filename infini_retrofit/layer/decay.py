"""How a memory forgets as tokens pass, as pure functions of rates in 1 / tokens.

Knows nothing of what else decides the writing and reading.

Axes:
    B  document
    S  segment of a document
    L  token of a segment
    H  query head
    N  key/value head
    F  feature of a query or key
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from infini_retrofit.layer.memory import SMALLEST_DENOMINATOR

# Half-lives of a head's features at the start, evenly spread on a logarithmic scale.
SHORTEST_HALF_LIFE, LONGEST_HALF_LIFE = 2.0, 2048.0  # tokens


def starting_rates(number: int) -> Float[Tensor, "_"]:
    """Return the logarithms of the rates that features start with."""
    shortest, longest = math.log(SHORTEST_HALF_LIFE), math.log(LONGEST_HALF_LIFE)
    return math.log(math.log(2)) - torch.linspace(shortest, longest, number)


def token_retention(
    rate: Float[Tensor, "N F"], num_tokens: Int[Tensor, "B S"], segment_length: int
) -> Float[Tensor, "B S N L F"]:
    """Return the share of each token that is left at the end of its segment.

    `num_tokens` leaves out the padding at a segment's end, `segment_length` includes it.
    """
    last = num_tokens[..., None, None, None] - 1
    steps = (last - torch.arange(segment_length, device=rate.device)[:, None]).clamp_min(0)
    return torch.exp(-rate[:, None] * steps)


def memory_retention(
    rate: Float[Tensor, "N F"], num_tokens: Int[Tensor, "B S"]
) -> Float[Tensor, "B S N F"]:
    """Return the share of the memory before each segment that is left after it."""
    return torch.exp(-rate * num_tokens[..., None, None])


def fade(
    rate: Float[Tensor, "N F"],
    feature: Float[Tensor, "B S H L F"],
    normalizer: Float[Tensor, "B S N F"],
    num_before: Int[Tensor, "B"] | None,
) -> tuple[Float[Tensor, "B S H L F"], Float[Tensor, "B S H L 1"]]:
    """Scale queries by the decay of the memory since the segment began.

    `normalizer` is that of the memory before each segment, `num_before` counts the tokens of a
    segment before its first query (None: none). The second result is the logarithm of the
    denominator's share that is left: the gate falls by it.
    """
    group = feature.shape[2] // len(rate)
    rate = rate.repeat_interleave(group, dim=0)
    steps = torch.arange(feature.shape[3], device=feature.device)[:, None]
    if num_before is not None:
        steps = steps + num_before.view(-1, 1, 1, 1, 1)
    left = feature * torch.exp(-rate[:, None] * steps)
    normalizer = normalizer.repeat_interleave(group, dim=2)[:, :, :, None]
    at_border, now = ((x * normalizer).sum(-1, keepdim=True) for x in (feature, left))
    logs = (x.clamp_min(SMALLEST_DENOMINATOR).log() for x in (now, at_border))
    return left, torch.sub(*logs)
