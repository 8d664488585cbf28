"""`CompressiveMemory`: what is learnable about one layer's memory, around the pure equations.

Holds parameters, never a state: that comes in and goes out. Knows nothing of the local
attention, of position encodings or of models.

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

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from infini_retrofit.layer.decay import fade, left_of_memory, left_of_tokens, starting_rates
from infini_retrofit.layer.feature_maps import rms_norm
from infini_retrofit.layer.form import AttentionShape, InfiniParams
from infini_retrofit.layer.gate import Recalled
from infini_retrofit.layer.memory import (
    SMALLEST_DENOMINATOR,
    MemoryState,
    Write,
    empty_state,
    prefix_states,
    quotient,
    retrieve,
    scan_states,
    write_segments,
)

# What a learnable initial state weighs at first, as a number of tokens written.
INITIAL_STATE_TOKENS = 1.0


class CompressiveMemory(nn.Module):
    """Write rule, read and start of one layer's memory, by `InfiniParams`.

    Attributes:
        decay_logit: log of the rates, in 1 / tokens, at which each key/value head forgets, one a
            head or one a feature.
        query_gate: direction of a query that opens its head's gate; starts at zero.
        write_score: direction of a key that makes its token worth writing.
        recall_gain: size of what is recalled once normalised.
        initial_matrix: values that a new memory holds, by feature; starts at zero, but at random
            where what is recalled is normalised, which has no usable gradient at zero.
        initial_logit: log of the weights with which it holds them.
    """

    def __init__(self, shape: AttentionShape, params: InfiniParams, num_features: int) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = shape.num_heads, shape.num_kv_heads
        heads, size = shape.num_kv_heads, shape.head_dim
        self.rule = params.update_rule
        # The seeds divided the matrix by the tokens of a segment, and the normalizer not.
        self.divisor = params.segment_length if params.seed_scaling else None
        self.bptt_segments = params.cutting_borders
        # In which a state is kept; None: that of what is computed.
        self.state_dtype = torch.bfloat16 if params.state_dtype == "bfloat16" else None
        self.written_tokens = None if params.written_tokens == "all" else params.written_tokens
        self.decay_logit = self.query_gate = self.write_score = self.recall_gain = None
        self.initial_matrix = self.initial_logit = None
        if params.decay == "head":
            self.decay_logit = nn.Parameter(starting_rates(heads)[:, None])
        if params.decay == "feature":
            self.decay_logit = nn.Parameter(starting_rates(num_features).repeat(heads, 1))
        if params.gate == "query":
            self.query_gate = nn.Parameter(torch.zeros(shape.num_heads, size))
        if self.written_tokens is not None:
            self.write_score = nn.Parameter(torch.randn(heads, size) * size**-0.5)
        if params.recall_norm == "rms":
            self.recall_gain = nn.Parameter(torch.ones(shape.num_heads))
        if params.initial_state == "learnable":
            self.initial_matrix = nn.Parameter(torch.zeros(heads, num_features, size))
            start = math.log(INITIAL_STATE_TOKENS)
            self.initial_logit = nn.Parameter(torch.full((heads, num_features), start))

    def gates(self) -> list[nn.Parameter]:
        """Return what needs a learning rate in logits, as a gate does."""
        return [] if self.decay_logit is None else [self.decay_logit]

    def start_from(self, v_proj: nn.Linear) -> None:
        """Give what is recalled the size that values have, if it is normalised at all."""
        if self.recall_gain is None:
            return
        with torch.no_grad():
            # What a row makes of inputs of size 1 that have nothing to do with each other.
            squares = v_proj.weight.float().square().sum(dim=1)
            sizes = squares.view(self.num_kv_heads, -1).mean(dim=1).sqrt()
            self.recall_gain.copy_(sizes.repeat_interleave(self.num_heads // self.num_kv_heads))
            if self.initial_matrix is not None:
                self.initial_matrix.normal_().mul_(sizes[:, None, None])

    def states(
        self,
        key: Float[Tensor, "B S N L K"],
        feature: Float[Tensor, "B S N L F"],
        value: Float[Tensor, "B S N L V"],
        is_token: Bool[Tensor, "B S L"] | None,
        before: MemoryState | None,
    ) -> tuple[MemoryState, MemoryState]:
        """Write all segments.

        Args:
            key: before position encoding.
            feature: of the keys.
            value: values.
            is_token: False at padding, which must not be written; None: no padding.
            before: the memory before the first segment; None: the document begins.

        Returns:
            The memory before each segment (B, S), and the one after the last (B).
        """
        with torch.autocast(key.device.type, enabled=False):
            num_tokens = _count_tokens(key, is_token)
            write = Write(feature, value, self._weight(key.to(feature.dtype), is_token))
            before = self._before(write, before)
            if self.rule == "linear" and self.decay_logit is None and self.state_dtype is None:
                return prefix_states(write_segments(write), before, self.bptt_segments)
            retention = None
            if self.decay_logit is not None:
                retention = left_of_memory(self._rate(feature.dtype), num_tokens)
            options = (self.bptt_segments, self.state_dtype)
            found, after = scan_states(write, self.rule, before, retention, *options)
            return found, self._kept(after)

    def _kept(self, state: MemoryState) -> MemoryState:
        """Return a state, which has been rounded, in the number type that it is kept in."""
        return state.to(self.state_dtype or state.matrix.dtype)

    def _before(self, write: Write, before: MemoryState | None) -> MemoryState:
        """Return what the first segment finds."""
        if before is not None:
            before = before.to(write.feature.dtype)
            return before if self.bptt_segments is None else before.detach()
        if self.initial_matrix is None:
            return empty_state(write)
        weight, num_documents = self.initial_logit.exp(), len(write.feature)
        matrix = weight[..., None] * self.initial_matrix
        parts = (x.expand(num_documents, *x.shape) for x in (matrix, weight))
        return MemoryState(*parts).rounded_to(self.state_dtype)

    def recent_states(
        self,
        key: Float[Tensor, "B S N L K"],
        feature: Float[Tensor, "B S N L F"],
        value: Float[Tensor, "B S N L V"],
        is_token: Bool[Tensor, "B S L"] | None,
        before: MemoryState | None,
    ) -> tuple[MemoryState, MemoryState]:
        """Do what `states` does, every segment but the first finding what the last one wrote.

        How much of a memory's gain is older than a segment can be told from that.
        """
        alone = [x.flatten(0, 1)[:, None] for x in (key, feature, value)]
        mask = None if is_token is None else is_token.flatten(0, 1)[:, None]
        after = self.states(*alone, mask, None)[1].to(feature.dtype)
        first, found = self._before(Write(feature, value), before), []
        for name in ("matrix", "normalizer"):
            written = getattr(after, name).unflatten(0, key.shape[:2])
            found.append(torch.cat([getattr(first, name)[:, None], written], dim=1))
        last = MemoryState(*(x[:, -1] for x in found))
        return MemoryState(*(x[:, :-1] for x in found)), self._kept(last)

    def read(
        self,
        query: Float[Tensor, "B S H L K"],
        feature: Float[Tensor, "B S H L F"],
        found: MemoryState,
        num_before: Int[Tensor, "B"] | None = None,
    ) -> Recalled:
        """Read each segment's memory.

        Args:
            query: before position encoding.
            feature: of the queries.
            found: a memory for each segment, leading axes (B, S).
            num_before: tokens of the segment before its first query; None: none.
        """
        found = found.to(feature.dtype)
        with torch.autocast(query.device.type, enabled=False):
            logit = self._logit(query.to(feature.dtype))
            if self.decay_logit is not None:
                rate = self._rate(feature.dtype)
                feature, faded = fade(rate, feature, found.normalizer, num_before)
                logit = logit + faded
            numerator, denominator = retrieve(feature, found)
            if self.divisor is not None:
                numerator = numerator / self.divisor
            if self.recall_gain is not None:
                gain = self.recall_gain.to(numerator.dtype)[:, None, None]
                numerator = rms_norm(quotient(numerator, denominator)) * gain
                denominator = (denominator > SMALLEST_DENOMINATOR).to(numerator.dtype)
            return Recalled(numerator, denominator, logit)

    def _weight(
        self, key: Float[Tensor, "B S N L K"], is_token: Bool[Tensor, "B S L"] | None
    ) -> Float[Tensor, "B S #N L #F"] | None:
        """Return how much each token counts when it is written; None: all count once."""
        weight = None if is_token is None else is_token[:, :, None, :, None].to(key.dtype)
        if self.decay_logit is not None:
            num_tokens = _count_tokens(key, is_token)
            left = left_of_tokens(self._rate(key.dtype), num_tokens, key.shape[3])
            weight = left if weight is None else weight * left
        if self.written_tokens is not None:
            score = torch.einsum("bsnlk,nk->bsnl", key, self.write_score.to(key.dtype))
            score = score * key.shape[-1] ** -0.5
            if is_token is not None:
                score = score.masked_fill(~is_token[:, :, None], -torch.inf)
            best = score.topk(min(self.written_tokens, key.shape[3]), dim=-1).indices
            chosen = torch.zeros_like(score).scatter(-1, best, 1.0) * torch.sigmoid(score)
            weight = chosen[..., None] if weight is None else weight * chosen[..., None]
        return weight

    def _rate(self, dtype: torch.dtype) -> Float[Tensor, "N #F"]:
        """Return the rates of forgetting in 1 / tokens."""
        return self.decay_logit.to(dtype).exp()

    def _logit(self, query: Float[Tensor, "B S H L K"]) -> Float[Tensor, "*#B #H #L 1"]:
        """Return what the queries add to the gate's logit."""
        if self.query_gate is None:
            return query.new_zeros(1, 1, 1)
        moved = torch.einsum("bshlk,hk->bshl", query, self.query_gate.to(query.dtype))
        return moved[..., None] * query.shape[-1] ** -0.5


def _count_tokens(
    key: Float[Tensor, "B S N L K"], is_token: Bool[Tensor, "B S L"] | None
) -> Int[Tensor, "B S"]:
    if is_token is None:
        return torch.full(key.shape[:2], key.shape[3], device=key.device)
    return is_token.sum(dim=-1)
