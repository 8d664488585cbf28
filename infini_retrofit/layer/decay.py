"""How a memory fades as tokens pass, as pure functions of rates in 1 / tokens.

Knows nothing of what else decides what is written and read.

Axes:
    B  document
    S  segment of a document
    L  token of a segment
    H  query head
    N  key/value head
    F  feature of a query or key; 1 where all features of a head fade alike
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from infini_retrofit.layer.memory import SMALLEST_DENOMINATOR

# Half-lives with which the heads of a layer, or the features of a head, start: evenly spread on a
# logarithmic scale.
SHORTEST_HALF_LIFE, LONGEST_HALF_LIFE = 2.0, 2048.0  # tokens


def starting_rates(number: int) -> Float[Tensor, "_"]:
    """Return the logarithms of so many rates to start with."""
    shortest, longest = math.log(SHORTEST_HALF_LIFE), math.log(LONGEST_HALF_LIFE)
    middle = torch.tensor([(shortest + longest) / 2])
    half_lives = torch.linspace(shortest, longest, number) if number > 1 else middle
    return math.log(math.log(2)) - half_lives


def left_of_tokens(
    rate: Float[Tensor, "N #F"], num_tokens: Int[Tensor, "B S"], segment_length: int
) -> Float[Tensor, "B S N L #F"]:
    """Return what is left of each token where its segment ends.

    Args:
        rate: of each head.
        num_tokens: of each segment: it ends with its last token, not with padding behind it.
        segment_length: tokens, padding included.
    """
    last = num_tokens[..., None, None, None] - 1
    steps = (last - torch.arange(segment_length, device=rate.device)[:, None]).clamp_min(0)
    return torch.exp(-rate[:, None] * steps)


def left_of_memory(
    rate: Float[Tensor, "N #F"], num_tokens: Int[Tensor, "B S"]
) -> Float[Tensor, "B S N #F"]:
    """Return what each segment leaves of the memory that it finds."""
    return torch.exp(-rate * num_tokens[..., None, None])


def fade(
    rate: Float[Tensor, "N #F"],
    feature: Float[Tensor, "B S H L F"],
    normalizer: Float[Tensor, "B S N F"],
    num_before: Int[Tensor, "B"] | None,
) -> tuple[Float[Tensor, "B S H L F"], Float[Tensor, "B S H L 1"]]:
    """Let what was found at the border go on fading while the segment is read.

    Args:
        rate: of each head.
        feature: of the queries.
        normalizer: of the memory that each segment finds.
        num_before: tokens of the segment before its first query; None: none.

    Returns:
        The features that read what is left, and the logarithm of how much that is: the share
        of a memory falls as what it holds for a query does.
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
