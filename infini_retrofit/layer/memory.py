"""Compressive memory of Infini-attention: equations 7 to 10, as pure functions.

Memory is a value: an argument and a result. It is written and read with features of keys and
queries (module feature_maps), outside of autocast. Knows nothing of layers and positions.

Where each equation is: 7 `retrieve`, 8 `write_segments` and `prefix_states`, 9 `_update`, 10 `mix`.

Source: Munkhdalai et al. 2024, arXiv:2404.07143v2.

Axes:
    *B  any leading axes: batch, or batch and segment
    B   batch
    S   segment
    H   query head
    N   key/value head; H is a multiple of N, and query head h uses key/value head h // (H / N)
    L   token within one segment
    F   feature of a query or key
    V   value channel
    C   slot of a neural cache
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Num
from torch import Tensor

# Below this a denominator counts as an empty memory. In float32 its square still has an inverse,
# which the gradient of a quotient needs.
SMALLEST_DENOMINATOR = 1e-18

UpdateRule = Literal["linear", "delta", "delta_gamma", "gated_delta", "neural_cache"]
# Their features have length 1 and either sign; what they recall is added, not averaged in.
UNIT_RULES = ("gated_delta", "neural_cache")


@dataclass(frozen=True)
class MemoryState:
    """The memory of one layer: sums over the tokens so far, or the slots of a neural cache.

    Computed in float32 or float64; kept in that or a shorter number type. A slot holds one token,
    the newest in the last.
    """

    # M, under the linear rule the sum of feature(key) * value; of neural_cache its slots' features
    matrix: Float[Tensor, "*B N F V"] | Float[Tensor, "*B N C F"]
    # z, the sum of feature(key): Z = F; gated_delta: Z = 0; of neural_cache (Z = C) the tokens that
    # came next, as int32: their ids + 1, 0 where a slot is empty
    normalizer: Float[Tensor, "*B N Z"] | Int[Tensor, "*B N Z"]

    def map(self, change: Callable[..., Tensor], *others: "MemoryState") -> "MemoryState":
        """Change the matrix and the normalizer, each with those of other states."""
        states = (self, *others)
        matrix = change(*(state.matrix for state in states))
        return MemoryState(matrix, change(*(state.normalizer for state in states)))

    def detach(self) -> "MemoryState":
        """Stop the gradient here."""
        return self.map(Tensor.detach)

    def to(self, target: torch.dtype | torch.device, non_blocking: bool = False) -> "MemoryState":
        """Convert to another number type, or move to another device, as hooks of offload do.

        Ids of tokens keep their type.
        """
        keeps = isinstance(target, torch.dtype)
        return self.map(
            lambda x: x
            if keeps and not x.is_floating_point()
            else x.to(target, non_blocking=non_blocking)
        )

    def rounded(self, dtype: torch.dtype) -> "MemoryState":
        """Round to a shorter number type; the gradient passes unchanged."""
        short = self.to(dtype).to(self.matrix.dtype)
        return self.map(lambda x, y: x + (y - x).detach() if x.is_floating_point() else x, short)

    def roll_batch(self) -> "MemoryState":
        """Give every document the memory of the one before it in the batch."""
        return self.map(lambda x: x.roll(1, dims=0))


def quotient(
    numerator: Float[Tensor, "*B V"], denominator: Float[Tensor, "*B 1"]
) -> Float[Tensor, "*B V"]:
    """Divide by a sum of weights; 0 / 0 is 0, where the memory is empty."""
    return numerator / denominator.clamp_min(SMALLEST_DENOMINATOR)


@dataclass(frozen=True)
class Write:
    """The tokens to write to a memory."""

    feature: Float[Tensor, "*B N L F"]  # of the keys
    value: Num[Tensor, "*B N L V"]  # of a neural cache: a token's id + 1
    weight: Float[Tensor, "*B #N L #F"] | None = None  # 0 at padding; None: 1 for all
    # Of gated_delta: the strength of each write, 0 at padding, and the log of what each token
    # leaves of the memory before it.
    strength: Float[Tensor, "*B N L"] | None = None
    log_decay: Float[Tensor, "*B N L"] | None = None

    @property
    def weighted(self) -> Float[Tensor, "*B N L F"]:
        """The features times their weights."""
        return self.feature if self.weight is None else self.feature * self.weight

    @property
    def weighted_value(self) -> Num[Tensor, "*B N L V"]:
        """The values times their weights."""
        return self.value if self.weight is None else self.value * self.weight

    def segment(self, index: int) -> "Write":
        """Return one segment of leading axes (batch, segment)."""
        return Write(*(None if x is None else x[:, index] for x in vars(self).values()))


def write_segments(write: Write) -> MemoryState:
    """Return the memory that each segment alone adds (the sums of eq. 8)."""
    feature = write.weighted
    matrix = feature.transpose(-1, -2) @ write.value.to(feature.dtype)
    return MemoryState(matrix, feature.sum(dim=-2))


def prefix_states(
    written: MemoryState, initial: MemoryState, stop_gradient_every: int | None = None
) -> tuple[MemoryState, MemoryState]:
    """Turn what each segment adds (B, S) into the memory before each, all at once.

    `initial` is the memory (B) before the first segment. Gradients stop at each border after
    `stop_gradient_every` segments; None: at no border.

    Returns:
        The memory before each segment (B, S), and the one after the last (B).
    """
    num_segments = written.normalizer.shape[1]
    every = stop_gradient_every or num_segments
    parts, state = [], initial
    for begin in range(0, num_segments, every):
        # Shifted, not `cumsum - own`: subtracting would leak rounding of the segment's own
        # tokens into what its earlier tokens read.
        added = written.map(lambda x, i=begin: x[:, i : i + every])
        sums = state.map(lambda first, x: torch.cat([first[:, None], x], dim=1).cumsum(1), added)
        parts.append(sums.map(lambda x: x[:, :-1]))
        state = sums.map(lambda x: x[:, -1])
        if stop_gradient_every is not None and begin + every <= num_segments:
            state = state.detach()
    return parts[0].map(lambda *x: torch.cat(x, dim=1), *parts[1:]), state


def scan_states(
    write: Write,
    rule: UpdateRule,
    initial: MemoryState,
    retention: Float[Tensor, "B S N #F"] | None = None,
    stop_gradient_every: int | None = None,
    state_dtype: torch.dtype | None = None,
) -> tuple[MemoryState, MemoryState]:
    """Write (B, S) segment by segment, for rules that need the memory so far.

    `retention` is the share of the memory before each segment that is left after it; None: all.
    Every state is rounded to `state_dtype`; the gradient passes unchanged. All else is as in
    `prefix_states`.
    """
    assert rule != "neural_cache", "its slots are no sums: slot_states"
    states, state = [], initial
    for index in range(write.feature.shape[1]):
        states.append(state)
        left = None if retention is None else retention[:, index]
        if rule == "gated_delta":
            state = MemoryState(_gated_delta(state.matrix, write.segment(index)), state.normalizer)
        else:
            state = _update(state, write.segment(index), rule, left)
        if state_dtype is not None:
            state = state.rounded(state_dtype)
        if stop_gradient_every is not None and (index + 1) % stop_gradient_every == 0:
            state = state.detach()
    return states[0].map(lambda *x: torch.stack(x, dim=1), *states[1:]), state


def empty_state(write: Write) -> MemoryState:
    """Return an empty memory for the documents of a write; a neural cache without slots for ids."""
    batch, _, num_heads, _, num_features = write.feature.shape
    if not write.value.is_floating_point():
        matrix = write.feature.new_zeros(batch, num_heads, 0, num_features)
        return MemoryState(matrix, matrix[..., 0].int())
    matrix = write.feature.new_zeros(batch, num_heads, num_features, write.value.shape[-1])
    has_normalizer = write.strength is None
    return MemoryState(matrix, matrix[..., 0] if has_normalizer else matrix[..., 0][..., :0])


def _update(
    state: MemoryState, write: Write, rule: UpdateRule, retention: Float[Tensor, "B N #F"] | None
) -> MemoryState:
    """Write one segment: eq. 8 (linear), eq. 9 (delta) or ARMT's correction (delta_gamma).

    `delta` as printed has a flaw: z grows by the feature of a key that was known, so a pair
    written twice is read back at half. ARMT scales the gain of z by the new part of the feature.

    Source: Rodkin et al. 2024, arXiv:2407.04841, equation 4, for gamma.
    """
    value = write.value.to(write.feature.dtype)
    if rule != "linear":
        numerator, denominator = retrieve(write.feature, state)
        # ARMT's z may have nothing in common with a key where M has.
        holds_something = denominator > SMALLEST_DENOMINATOR
        value = value - quotient(numerator, denominator) * holds_something
    added = write_segments(replace(write, value=value))
    gain = added.normalizer
    if rule == "delta_gamma":
        square = write.feature.square().sum(-1, keepdim=True)
        new_share = (1 - quotient(denominator, square)).clamp(0, 1)
        gain = replace(write, feature=write.feature * new_share).weighted.sum(dim=-2)
    if retention is not None:
        state = MemoryState(state.matrix * retention[..., None], state.normalizer * retention)
    return MemoryState(state.matrix + added.matrix, state.normalizer + gain)


def _gated_delta(matrix: Float[Tensor, "B N F V"], write: Write) -> Float[Tensor, "B N F V"]:
    """Write one segment token by token: M_t = a_t M_(t-1) + b_t k_t (v_t - a_t M_(t-1)^T k_t)^T.

    Token t leaves the share a_t of the memory and writes with strength b_t. All tokens at once:
    what each really writes solves a triangular system.

    Source: Yang et al. 2024, arXiv:2412.06464, equations 10 and 12.
    """
    key, strength = write.feature, write.strength[..., None]
    value = write.value.to(key.dtype)
    age = write.log_decay.cumsum(dim=-1)
    # Of what token j wrote, exp(age_i - age_j) is left at token i > j.
    left = (age[..., :, None] - age[..., None, :]).tril().exp()
    likeness = strength * (key @ key.transpose(-1, -2) * left).tril(-1)
    wanted = strength * (value - age[..., None].exp() * (key @ matrix))
    written = torch.linalg.solve_triangular(likeness, wanted, upper=False, unitriangular=True)
    end = age[..., -1:]
    faded = key * (end - age)[..., None].exp()
    return matrix * end[..., None].exp() + faded.transpose(-1, -2) @ written


def with_slots(state: MemoryState, num_slots: int) -> MemoryState:
    """Give a neural cache empty slots before its own, so that it has as many."""
    more = num_slots - state.normalizer.shape[-1]
    if not more:
        return state
    return MemoryState(F.pad(state.matrix, (0, 0, more, 0)), F.pad(state.normalizer, (more, 0)))


def slot_states(
    write: Write,
    initial: MemoryState,
    stop_gradient_every: int | None = None,
    state_dtype: torch.dtype | None = None,
    *,
    only_last: bool = False,
) -> tuple[MemoryState, MemoryState]:
    """Append (B, S) to a neural cache segment by segment: the oldest tokens lose their slots.

    All else is as in `scan_states`. What each segment finds is cut out of one row of tokens, or
    `only_last` what is found after them all.
    """
    num_segments, num_slots = write.feature.shape[1], initial.normalizer.shape[-1]
    token = write.weighted_value[..., 0].int()
    num_left = (token > 0).sum(dim=-1).flip(1).cumsum(dim=1).flip(1)  # from each segment on
    row = torch.cat([initial.normalizer, token.transpose(1, 2).flatten(2)], dim=-1)
    features = torch.cat([initial.matrix, write.weighted.transpose(1, 2).flatten(2, 3)], dim=-2)
    states = MemoryState(features, row)
    if state_dtype is not None:
        states = states.rounded(state_dtype)
    # Empty slots first. Then a segment's slots end where the tokens that are left begin.
    order = (row > 0).int().argsort(dim=-1, stable=True)
    begin = row.shape[-1] - num_slots - F.pad(num_left, (0, 0, 0, 1))
    reader = torch.arange(num_segments + 1, device=row.device)[:, None, None]
    if only_last:
        begin, reader = begin[:, -1:], reader[-1:]
    places = begin[..., None] + torch.arange(num_slots, device=row.device)
    places = order[:, None].expand(-1, len(reader), -1, -1).gather(-1, places)
    stacked = states.map(lambda x: _take(x, places))
    if stop_gradient_every is not None:
        writer = (places - num_slots).clamp_min(0) // token.shape[-1]
        is_cut = writer // stop_gradient_every != reader // stop_gradient_every
        matrix = torch.where(is_cut[..., None], stacked.matrix.detach(), stacked.matrix)
        stacked = replace(stacked, matrix=matrix)
    return stacked.map(lambda x: x[:, :-1]), stacked.map(lambda x: x[:, -1])


def _take(
    row: Num[Tensor, "B N T *F"], places: Int[Tensor, "B S N C"]
) -> Num[Tensor, "B S N C *F"]:
    """Return what stands at places of each row of tokens."""
    num_rows, length = row.shape[:2].numel(), row.shape[2]
    first = torch.arange(num_rows, device=row.device).view(-1, 1, row.shape[1], 1) * length
    if row.dim() == 3:
        return row.flatten()[places + first]
    return F.embedding(places + first, row.flatten(0, 2))  # its gradient is fast


def match(
    feature: Float[Tensor, "*B N L F"],
    state: MemoryState,
    sharpness: Float[Tensor, "N"],
    floor: Float[Tensor, "N"],
) -> Float[Tensor, "*B N L C"]:
    """Return how much each query takes of each slot: the softmax of sharpness * (query . key).

    A further slot that holds nothing always scores `floor`. So the weights sum to less than 1, and
    to nearly 0 for a query that no key is like.

    Source: Grave et al. 2017, arXiv:1612.04426, equation 3.

    Differs from the paper: features of length 1, the floor, and what is found is an embedding to
    add to the hidden state, not a probability to mix.
    """
    scores = sharpness[:, None, None] * (feature @ state.matrix.transpose(-1, -2))
    scores = scores.masked_fill(state.normalizer[..., None, :] == 0, -torch.inf)
    nothing = floor[:, None, None].expand(*scores.shape[:-1], 1)
    return torch.cat([scores, nothing], dim=-1).softmax(dim=-1)[..., :-1]


def retrieve(
    feature: Float[Tensor, "*B H L F"], state: MemoryState
) -> tuple[Float[Tensor, "*B H L V"], Float[Tensor, "*B H L 1"]]:
    """Read the memory once for each query (eq. 7), numerator and denominator apart.

    The denominator is 1 under `gated_delta`, which has no normalizer.
    """
    num_kv_heads, num_tokens = state.matrix.shape[-3], feature.shape[-2]
    # The query heads that share a key/value head become rows of one product.
    feature = feature.unflatten(-3, (num_kv_heads, -1)).flatten(-3, -2)
    sums = [feature @ state.matrix, feature.new_ones(*feature.shape[:-1], 1)]
    if state.normalizer.shape[-1]:
        sums[1] = feature @ state.normalizer[..., None]
    numerator, denominator = (x.unflatten(-2, (-1, num_tokens)).flatten(-4, -3) for x in sums)
    return numerator, denominator


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
    """Blend local attention with what each query recalls (eq. 10)."""
    weight = quotient(share, denominator)
    return torch.addcmul(local * (1 - share), numerator, weight).to(local.dtype)
