"""A pointer into the text behind the window: what followed the last time proposes the next token.

It needs the token ids alone, and helps any model: its proposal is mixed into the model's
probability. Knows no model and no file.

Axes:
    B  document
    T  token of a document
    Scored  token that is scored: all but the first
    M  tokens that match, from 0 (no proposal) to `MOST_MATCHED`
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

MOST_MATCHED = 4  # tokens
_STEPS = 60  # of the bisection: more change nothing in float64


@dataclass(frozen=True, kw_only=True)
class Stored:
    """Which token ids a pointer has: the last before the window of a segment."""

    segment_length: int  # tokens
    window: int  # tokens before a segment, which the model sees itself
    num_stored: int  # tokens behind the window

    def longest_matches(
        self, ids: Int[Tensor, "T"]
    ) -> tuple[Int[Tensor, "Scored"], Int[Tensor, "Scored"]]:
        """Find for each token but the first what the stored text proposes.

        The longest match of the tokens before it counts, up to `MOST_MATCHED`, and of these the
        most recent one.

        Returns:
            The number of tokens that match, 0 where none does, and the proposal (-1 there).
        """
        tokens = ids.tolist()
        lengths, proposals, num_left = [], [], 1
        last: dict[tuple[int, ...], int] = {}  # where what follows a run of tokens stands
        for at in range(1, len(tokens)):
            # The token before `at` predicts: its segment counts.
            border = (at - 1) // self.segment_length * self.segment_length - self.window
            for follows in range(num_left, border):
                last.update(dict.fromkeys(_runs(tokens, follows), follows))
            num_left = max(num_left, border)
            oldest = border - self.num_stored
            runs = _runs(tokens, at)
            found = [run for run in runs if run in last and last[run] - len(run) >= oldest]
            lengths.append(len(found[-1]) if found else 0)
            proposals.append(tokens[last[found[-1]]] if found else -1)
        return torch.tensor(lengths), torch.tensor(proposals)

    def matches(
        self, documents: Int[Tensor, "B T"]
    ) -> tuple[Int[Tensor, "B Scored"], Bool[Tensor, "B Scored"]]:
        """Return how many tokens match before each token, and whether it is what was proposed."""
        found = [self.longest_matches(ids) for ids in documents]
        lengths, proposals = (torch.stack(x) for x in zip(*found, strict=True))
        return lengths, proposals == documents[:, 1:].cpu()


def _runs(tokens: list[int], end: int) -> list[tuple[int, ...]]:
    """Return the runs of tokens before a place, the shortest first."""
    return [tuple(tokens[end - n : end]) for n in range(1, min(MOST_MATCHED, end) + 1)]


def fit_weights(
    nlls: Float[Tensor, "B Scored"],
    lengths: Int[Tensor, "B Scored"],
    is_hit: Bool[Tensor, "B Scored"],
) -> Float[Tensor, "M"]:
    """Return the pointer's weight by number of matching tokens, of the greatest likelihood.

    The log-likelihood is concave in each weight, so its slope is bisected. Without a match, or
    where no token has so many, the weight is 0.
    """
    weights = torch.zeros(MOST_MATCHED + 1, dtype=torch.float64)
    for length in range(1, MOST_MATCHED + 1):
        chosen = lengths == length
        probability, hit = nlls[chosen].double().neg().exp(), is_hit[chosen].double()
        low, high = 0.0, 1.0
        for _ in range(_STEPS):
            weight = (low + high) / 2
            slope = ((hit - probability) / torch.lerp(probability, hit, weight)).sum()
            low, high = (weight, high) if slope > 0 else (low, weight)
        weights[length] = low
    return weights


def mix(
    nlls: Float[Tensor, "B Scored"],
    lengths: Int[Tensor, "B Scored"],
    is_hit: Bool[Tensor, "B Scored"],
    weights: Float[Tensor, "M"],
) -> Float[Tensor, "B Scored"]:
    """Return the NLLs of (1 - weight) * model + weight * pointer."""
    weight = weights[lengths]
    probability = nlls.double().neg().exp()
    return -torch.lerp(probability, is_hit.double(), weight).log().to(nlls.dtype)
