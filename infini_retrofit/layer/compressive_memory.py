"""`CompressiveMemory`: the learnable parts of one layer's memory, around the equations.

Holds parameters, never a state. Knows nothing of the local attention, of position encodings or
of models.

Axes:
    B  document
    S  segment of a document
    L  token of a segment
    H  query head
    N  key/value head
    K  key channel
    F  feature of a query or key
    V  value channel
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor, nn

from infini_retrofit.layer.form import AttentionShape, InfiniParams
from infini_retrofit.layer.memory import (
    SMALLEST_DENOMINATOR,
    MemoryState,
    Write,
    empty_state,
    match,
    prefix_states,
    retrieve,
    scan_states,
    slot_states,
    with_slots,
    write_segments,
)

# Half-lives of a head's features at the start, evenly spread on a logarithmic scale.
SHORTEST_HALF_LIFE, LONGEST_HALF_LIFE = 2.0, 2048.0  # tokens
# Of a neural cache: so sharp that few of thousands of tokens count, and a floor that a chance
# likeness does not reach (LOG.md).
INITIAL_SHARPNESS, INITIAL_FLOOR = 20.0, 15.0
# The embeddings of tokens by their ids.
Embed = Callable[[Tensor], Tensor]


class CompressiveMemory(nn.Module):
    """Write and read one layer's memory, by `InfiniParams`.

    Attributes:
        decay_logit: log of the rates, in 1 / tokens, at which features forget; None: none does.
        write_gate: from the keys of all heads to each head's strength of writing and decay, of
            `gated_delta`; None: other rules write at full strength.
        sharpness, floor: of a neural cache's softmax, one for each head; None: other rules.
        query_gate: direction of a query that opens its head's gate, zero at the start; None: the
            gate does not depend on the query.
    """

    def __init__(self, shape: AttentionShape, params: InfiniParams, num_features: int) -> None:
        super().__init__()
        self.rule = params.update_rule
        # The seeds divided the matrix by the tokens of a segment, and not the normalizer.
        self.divisor = params.segment_length if params.seed_scaling else None
        self.stop_gradient_every = params.stop_gradient_every
        # The number type of a kept state; None: the one it is computed in.
        self.state_dtype = torch.bfloat16 if params.state_dtype == "bfloat16" else None
        self.num_slots = params.num_slots
        self.decay_logit = self.query_gate = self.write_gate = None
        self.sharpness = self.floor = None
        if params.update_rule == "neural_cache":
            ones = torch.ones(shape.num_heads)
            self.sharpness = nn.Parameter(ones * INITIAL_SHARPNESS)
            self.floor = nn.Parameter(ones * INITIAL_FLOOR)
        if params.update_rule == "gated_delta":
            num_kv_heads = shape.num_kv_heads
            self.write_gate = _Gate(num_kv_heads * shape.head_dim, 2 * num_kv_heads)
            nn.init.zeros_(self.write_gate.weight)
            decay = math.log(math.expm1(math.log(2) / LONGEST_HALF_LIFE))
            start = torch.tensor([0.0, decay]).repeat_interleave(num_kv_heads)
            self.write_gate.bias = nn.Parameter(start)
        if params.decay == "feature":
            ends = math.log(SHORTEST_HALF_LIFE), math.log(LONGEST_HALF_LIFE)
            logit = math.log(math.log(2)) - torch.linspace(*ends, num_features)
            self.decay_logit = nn.Parameter(logit.repeat(shape.num_kv_heads, 1))
        if params.gate == "query":
            self.query_gate = nn.Parameter(torch.zeros(shape.num_heads, shape.head_dim))

    def forward(self, job: str, *args: Any) -> Any:
        """Do `states`, `state_after`, `recent_states` or `read` as a call.

        Hooks of modules see calls only: offload brings the parameters, FSDP gathers them.
        """
        return getattr(self, job)(*args)

    def states(
        self,
        feature: Float[Tensor, "B S N L F"],
        key: Float[Tensor, "B S N L K"],
        value: Num[Tensor, "B S N L V"],
        is_token: Bool[Tensor, "B S L"] | None,
        before: MemoryState | None,
        *,
        only_last: bool = False,
    ) -> tuple[MemoryState, MemoryState]:
        """Return the memory before each segment (B, S), and the one after the last (B).

        Padding is not written. `before` is the memory before the first segment; None: the
        document begins. `only_last` spares the slots before each segment.
        """
        with torch.autocast(feature.device.type, enabled=False):
            write, retention = self._write(feature, key, value, is_token)
            first = empty_state(write) if before is None else before.to(feature.dtype)
            if self.rule == "neural_cache" and before is None:
                # No more slots than these tokens can fill.
                first = with_slots(first, min(feature[0, :, 0, :, 0].numel(), self.num_slots))
            if self.stop_gradient_every is not None:
                first = first.detach()
            if self.rule == "linear" and retention is None and self.state_dtype is None:
                return prefix_states(write_segments(write), first, self.stop_gradient_every)
            options = (self.stop_gradient_every, self.state_dtype)
            if self.rule == "neural_cache":
                memories, after = slot_states(write, first, *options, only_last=only_last)
            else:
                memories, after = scan_states(write, self.rule, first, retention, *options)
            return memories, after.to(self.state_dtype or feature.dtype)

    def state_after(self, *written: Any) -> MemoryState:
        """Return the memory after the last segment alone; takes what `states` takes."""
        return self.states(*written, only_last=True)[1]

    def whole(self, state: MemoryState) -> MemoryState:
        """Return a memory as it crosses calls: a neural cache with all of its slots."""
        return with_slots(state, self.num_slots) if self.rule == "neural_cache" else state

    def _write(
        self,
        feature: Float[Tensor, "B S N L F"],
        key: Float[Tensor, "B S N L K"],
        value: Num[Tensor, "B S N L V"],
        is_token: Bool[Tensor, "B S L"] | None,
    ) -> tuple[Write, Float[Tensor, "B S N F"] | None]:
        """Return what to write, and the share of each memory that is left after its segment."""
        weight = None if is_token is None else is_token[:, :, None, :, None].to(feature.dtype)
        if self.write_gate is not None:
            keys = key.transpose(2, 3).flatten(3).to(feature.dtype)
            strength, decay = self.write_gate(keys).transpose(2, 3).chunk(2, dim=2)
            strength, log_decay = strength.sigmoid(), -F.softplus(decay)
            if weight is not None:
                strength, log_decay = strength * weight[..., 0], log_decay * weight[..., 0]
            return Write(feature, value, strength=strength, log_decay=log_decay), None
        if self.decay_logit is None:
            return Write(feature, value, weight), None
        token = torch.arange(feature.shape[3], device=feature.device)[:, None]
        num_tokens = torch.full_like(feature[:, :, 0, 0, 0], len(token), dtype=torch.long)
        num_tokens = (num_tokens if is_token is None else is_token.sum(-1))[..., None, None]
        # No time passes in the padding at a segment's end.
        steps = (num_tokens[..., None] - 1 - token).clamp_min(0)
        left = torch.exp(-self._rate(feature.dtype)[:, None] * steps)
        retention = torch.exp(-self._rate(feature.dtype) * num_tokens)
        return Write(feature, value, left if weight is None else weight * left), retention

    def _rate(self, dtype: torch.dtype) -> Float[Tensor, "N F"]:
        """Return the rates of forgetting in 1 / tokens."""
        return self.decay_logit.to(dtype).exp()

    def recent_states(
        self,
        feature: Float[Tensor, "B S N L F"],
        key: Float[Tensor, "B S N L K"],
        value: Num[Tensor, "B S N L V"],
        is_token: Bool[Tensor, "B S L"] | None,
        before: MemoryState | None,
    ) -> tuple[MemoryState, MemoryState]:
        """Write like `states`, but each segment sees the last segment's memory only.

        The first segment sees `before` (protocol `segment_recent`).
        """
        alone = [x.flatten(0, 1)[:, None] for x in (feature, key, value)]
        mask = None if is_token is None else is_token.flatten(0, 1)[:, None]
        after = self.states(*alone, mask, None)[1].map(lambda x: x.unflatten(0, feature.shape[:2]))
        first, _ = self.states(feature[:, :1], key[:, :1], value[:, :1], None, before)
        if self.rule == "neural_cache":
            num_slots = max(x.normalizer.shape[-1] for x in (first, after))
            first, after = with_slots(first, num_slots), with_slots(after, num_slots)
        memories = first.map(lambda x, y: torch.cat([x, y[:, :-1].to(x.dtype)], dim=1), after)
        return memories, after.map(lambda x: x[:, -1])

    def read(
        self,
        query: Float[Tensor, "B S H L K"],
        feature: Float[Tensor, "B S H L F"],
        memories: MemoryState,
        num_before: Int[Tensor, "B"] | None = None,
        embed: Embed | None = None,
    ) -> tuple[
        Float[Tensor, "B S H L V"], Float[Tensor, "B S H L 1"], Float[Tensor, "*#B #H #L 1"]
    ]:
        """Read each segment's memory (B, S) with queries that are not rotated.

        `num_before` counts the tokens of a segment before its first query; None: none. `embed`
        gives the embeddings of a neural cache's tokens by their ids.

        Returns:
            Numerator and denominator (eq. 7), and what the gate's logit grows by. The numerator of
            a neural cache sums embeddings, which are not projected yet.
        """
        memories = memories.to(feature.dtype)
        with torch.autocast(query.device.type, enabled=False):
            logit = query.new_zeros(1, 1, 1, dtype=feature.dtype)
            if self.query_gate is not None:
                query, direction = query.to(feature.dtype), self.query_gate.to(feature.dtype)
                logit = torch.einsum("bshlk,hk->bshl", query, direction)[..., None]
                logit = logit * query.shape[-1] ** -0.5
            if self.decay_logit is not None:
                rate = self._rate(feature.dtype)
                feature, faded = _fade(rate, feature, memories.normalizer, num_before)
                logit = logit + faded
            if self.rule == "neural_cache":
                scales = (x.to(feature.dtype) for x in (self.sharpness, self.floor))
                weights = match(feature, memories, *scales)
                ids = (memories.normalizer.long() - 1).clamp_min(0)
                ids, places = ids.unique(return_inverse=True)
                table = embed(ids).to(weights)
                found = [  # segment by segment: the embeddings of all slots would take gigabytes
                    weights[:, s] @ F.embedding(places[:, s], table)
                    for s in range(places.shape[1])
                ]
                return torch.stack(found, dim=1), weights.sum(-1, keepdim=True), logit
            numerator, denominator = retrieve(feature, memories)
            if self.divisor is not None:
                numerator = numerator / self.divisor
            return numerator, denominator, logit


class _Gate(nn.Linear):
    """A linear map in the number type of what it maps."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


def _fade(
    rate: Float[Tensor, "N F"],
    feature: Float[Tensor, "B S H L F"],
    normalizer: Float[Tensor, "B S N F"],
    num_before: Int[Tensor, "B"] | None,
) -> tuple[Float[Tensor, "B S H L F"], Float[Tensor, "B S H L 1"]]:
    """Return the queries as faded since the border, and the log of what that leaves to read."""
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
