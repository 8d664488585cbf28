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
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from infini_retrofit.feature_maps import rms_norm
from infini_retrofit.infini_params import AttentionShape, InfiniParams
from infini_retrofit.memory import (
    SMALLEST_DENOMINATOR,
    MemoryState,
    Write,
    prefix_states,
    retrieve,
    scan_states,
    write_segments,
)

# Half-lives with which the heads of a layer, or the features of a head, start: evenly spread on a
# logarithmic scale.
SHORTEST_HALF_LIFE, LONGEST_HALF_LIFE = 2.0, 2048.0  # tokens
# What a learnable initial state weighs at first, as a number of tokens written.
INITIAL_STATE_TOKENS = 1.0


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
        self.bptt_segments = None if params.bptt_segments == "all" else params.bptt_segments
        self.written_tokens = None if params.written_tokens == "all" else params.written_tokens
        self.decay_logit = self.query_gate = self.write_score = self.recall_gain = None
        self.initial_matrix = self.initial_logit = None
        if params.decay == "head":
            self.decay_logit = nn.Parameter(_starting_decay(heads)[:, None])
        if params.decay == "feature":
            self.decay_logit = nn.Parameter(_starting_decay(num_features).repeat(heads, 1))
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
            if before is None:
                before = self._initial_state(len(key))
            elif self.bptt_segments is not None:
                before = before.detach()
            if self.rule == "linear" and self.decay_logit is None:
                return prefix_states(write_segments(write), before, self.bptt_segments)
            retention = None
            if self.decay_logit is not None:
                retention = torch.exp(-self._rate(feature.dtype) * num_tokens[..., None, None])
            return scan_states(write, self.rule, before, retention, self.bptt_segments)

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
        first, _ = self.states(key[:, :1], feature[:, :1], value[:, :1], None, before)
        _, after = self.states(*alone, mask, None)
        found = []
        for name in ("matrix", "normalizer"):
            written = getattr(after, name).unflatten(0, key.shape[:2])
            found.append(torch.cat([getattr(first, name), written], dim=1))
        return MemoryState(*(x[:, :-1] for x in found)), MemoryState(*(x[:, -1] for x in found))

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
        with torch.autocast(query.device.type, enabled=False):
            logit = self._logit(query.to(feature.dtype))
            if self.decay_logit is not None:
                feature, faded = self._fade(feature, found, num_before)
                logit = logit + faded
            numerator, denominator = retrieve(feature, found)
            if self.divisor is not None:
                numerator = numerator / self.divisor
            if self.recall_gain is not None:
                gain = self.recall_gain.to(numerator.dtype)[:, None, None]
                mean = numerator / denominator.clamp_min(SMALLEST_DENOMINATOR)
                numerator = rms_norm(mean) * gain
                denominator = (denominator > SMALLEST_DENOMINATOR).to(numerator.dtype)
            return Recalled(numerator, denominator, logit)

    def _fade(
        self,
        feature: Float[Tensor, "B S H L F"],
        found: MemoryState,
        num_before: Int[Tensor, "B"] | None,
    ) -> tuple[Float[Tensor, "B S H L F"], Float[Tensor, "B S H L 1"]]:
        """Let what was found at the border go on fading while the segment is read.

        Returns:
            The features that read what is left, and the logarithm of how much that is: the share
            of a memory falls as what it holds for a query does.
        """
        group = self.num_heads // self.num_kv_heads
        rate = self._rate(feature.dtype).repeat_interleave(group, dim=0)
        steps = torch.arange(feature.shape[3], device=feature.device)[:, None]
        if num_before is not None:
            steps = steps + num_before.view(-1, 1, 1, 1, 1)
        left = feature * torch.exp(-rate[:, None] * steps)
        normalizer = found.normalizer.repeat_interleave(group, dim=2)[:, :, :, None]
        at_border, now = ((x * normalizer).sum(-1, keepdim=True) for x in (feature, left))
        logs = (x.clamp_min(SMALLEST_DENOMINATOR).log() for x in (now, at_border))
        return left, torch.sub(*logs)

    def _weight(
        self, key: Float[Tensor, "B S N L K"], is_token: Bool[Tensor, "B S L"] | None
    ) -> Float[Tensor, "B S #N L #F"] | None:
        """Return how much each token counts when it is written; None: all count once."""
        weight = None if is_token is None else is_token[:, :, None, :, None].to(key.dtype)
        if self.decay_logit is not None:
            # To the last token, not to the end of the padding behind it.
            last = _count_tokens(key, is_token)[..., None, None, None] - 1
            steps = (last - torch.arange(key.shape[3], device=key.device)[:, None]).clamp_min(0)
            faded = torch.exp(-self._rate(key.dtype)[:, None] * steps)
            weight = faded if weight is None else weight * faded
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

    def _initial_state(self, batch: int) -> MemoryState | None:
        if self.initial_matrix is None:
            return None
        weight = self.initial_logit.exp()
        matrix = weight[..., None] * self.initial_matrix
        return MemoryState(matrix.expand(batch, *matrix.shape), weight.expand(batch, *weight.shape))


def _count_tokens(
    key: Float[Tensor, "B S N L K"], is_token: Bool[Tensor, "B S L"] | None
) -> Int[Tensor, "B S"]:
    if is_token is None:
        return torch.full(key.shape[:2], key.shape[3], device=key.device)
    return is_token.sum(dim=-1)


def _starting_decay(number: int) -> Float[Tensor, "_"]:
    shortest, longest = math.log(SHORTEST_HALF_LIFE), math.log(LONGEST_HALF_LIFE)
    middle = torch.tensor([(shortest + longest) / 2])
    half_lives = torch.linspace(shortest, longest, number) if number > 1 else middle
    return math.log(math.log(2)) - half_lives
