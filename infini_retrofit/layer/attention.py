"""`InfiniAttention`: local attention inside a segment, memory of all segments before it.

A drop-in for a decoder layer's attention module. Knows nothing of model families, weights of a
base model, losses or files. `naive` computes the same, one token at a time.

Source: Munkhdalai et al. 2024, arXiv:2404.07143v2, section 2.1.

Axes:
    R  row of the batch as the model sees it
    T  token of a row
    D  model width
    B  document
    S  segment of a document
    L  token of a segment
    H  query head
    K  key channel
    V  value channel
    HK channel of all queries of a token
    HV channel of all outputs of a token
    NK channel of all keys of a token
    NV channel of all values of a token
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Num
from torch import Tensor, nn

from infini_retrofit.layer.compressive_memory import CompressiveMemory, Embed
from infini_retrofit.layer.cut import Cut, Keys, Layout
from infini_retrofit.layer.feature_maps import FeatureMaps
from infini_retrofit.layer.form import (
    BYTES_PER_ID,
    BYTES_PER_STATE_VALUE,
    AttentionShape,
    InfiniParams,
    slot_bytes,
)
from infini_retrofit.layer.local_attention import alibi_slopes, linear_attention, softmax_attention
from infini_retrofit.layer.local_context import Line
from infini_retrofit.layer.memory import UNIT_RULES, memory_share, mix, quotient
from infini_retrofit.layer.probe import MemoryReading, Probe
from infini_retrofit.layer.state import (
    LayerState,
    Segments,
    State,
    running_keys,
    running_segment,
    state_after,
)
from infini_retrofit.layer.tokens import Tokens

# The gate at the start: small enough to keep the base's output, large enough to have a gradient.
# A branch without local attention has nothing to displace: its gate starts half open.
INITIAL_MEMORY_SHARE = 0.02
# A recalled embedding is small beside what it is added to: from 1 it learns too late (LOG.md).
INITIAL_EMBEDDING_SCALE = 8.0


@dataclass
class Noted:
    """What the layer `key_layer` attends with, for the keys of later ones; of one forward pass."""

    hidden_states: Float[Tensor, "R T D"] | None = None
    has_graph: bool = True


class InfiniAttention(nn.Module):
    """Attention whose reach is one segment, plus a memory of every segment before.

    Attributes:
        memory: None: neither read nor written.
        gate_logit: one for each query head, float32; `sigmoid(gate_logit)` is the share of the
            memory, before queries and decay move it. None: there is no memory.
    """

    def __init__(self, shape: AttentionShape, params: InfiniParams, layer_index: int) -> None:
        super().__init__()
        shape = shape.of_heads(params.heads)
        self.shape, self.params, self.layer_index = shape, params, layer_index
        self.segment_length = params.segment_length
        self.local_context = 0 if params.local == "none" else params.local_context
        q_size, kv_size = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        qk_bias = shape.qkv_bias or params.local == "none"  # to take away what keys have in common
        self.q_proj = nn.Linear(shape.hidden_size, q_size, bias=qk_bias)
        self.k_proj = nn.Linear(shape.hidden_size, kv_size, bias=qk_bias)
        v_bias = shape.qkv_bias or params.memory_value == "embedding"
        self.v_proj = nn.Linear(shape.hidden_size, kv_size, bias=v_bias)
        self.o_proj = nn.Linear(q_size, shape.hidden_size, bias=shape.o_bias)
        self.q_norm = self.k_norm = None  # the base's, where `shape.norms` says so
        if params.memory_key == "before":
            self.q_proj.load_state_dict(self.k_proj.state_dict())  # a query is like its own key
        if params.memory_value == "embedding":  # what is recalled starts as an embedding
            nn.init.eye_(self.v_proj.weight)
            nn.init.zeros_(self.v_proj.bias)
            self.o_proj.weight.data.copy_(self.v_proj.weight.data * INITIAL_EMBEDDING_SCALE)
        num_features = params.count_features(shape.head_dim)
        self.feature_maps = None
        if params.memory == "on" or params.local == "linear":
            sizes = (shape.num_heads, shape.num_kv_heads, shape.head_dim, num_features)
            self.feature_maps = FeatureMaps(params.feature_map, *sizes)
        slopes = alibi_slopes(shape.num_heads) if params.positions == "alibi" else None
        self.register_buffer("slopes", slopes, persistent=False)
        self.memory = self.gate_logit = None
        if params.memory == "on":
            self.memory = CompressiveMemory(shape, params, num_features)
            logit = math.log(INITIAL_MEMORY_SHARE / (1 - INITIAL_MEMORY_SHARE))
            if params.local == "none":
                logit = 0.0
            self.gate_logit = nn.Parameter(torch.full((shape.num_heads,), logit))

    @property
    def state_bytes(self) -> int:
        """Bytes that cross a segment border in this layer, for one document."""
        context = self.local_context * self.shape.context_token_bytes()
        if self.memory is None:
            return context
        num_features, dtype = self.feature_maps.num_features, self.params.state_dtype
        if self.memory.rule == "neural_cache":
            return context + self.memory.num_slots * slot_bytes(num_features, dtype)
        # A matrix and a normalizer for each key/value head.
        num_features *= self.shape.num_kv_heads
        has_normalizer = self.memory.rule != "gated_delta"
        num_values = num_features * (self.shape.head_dim + has_normalizer)
        return context + num_values * BYTES_PER_STATE_VALUE[dtype]

    @property
    def open_token_bytes(self) -> int:
        """Bytes kept of a token whose segment has not ended, keys and values in 16 bits."""
        both = self.shape.context_token_bytes()
        if self.memory is None or self.memory.rule != "neural_cache":
            return both
        return both // 2 + BYTES_PER_ID

    def memory_parameters(self) -> dict[str, list[nn.Parameter]]:
        """Return the parameters that a base's attention lacks, by learning-rate group."""
        gates = [self.gate_logit]
        others = [] if self.feature_maps is None else list(self.feature_maps.parameters())
        if self.memory is not None:
            # Single numbers, which need a gate's rate.
            gates[:0] = [self.memory.decay_logit, self.memory.sharpness, self.memory.floor]
            others.insert(0, self.memory.query_gate)
            if self.memory.write_gate is not None:
                others += self.memory.write_gate.parameters()
        if self.params.local == "none":
            projections = (self.q_proj, self.k_proj, self.v_proj, self.o_proj)
            others += (p for module in projections for p in module.parameters())
        groups = {"gate": gates, "memory": others}
        return {name: [p for p in group if p is not None] for name, group in groups.items()}

    def project(
        self,
        hidden_states: Float[Tensor, "R T D"],
        embeddings: Float[Tensor, "R T D"] | None = None,
        token_ids: Int[Tensor, "R T"] | None = None,
        noted: Noted | None = None,
    ) -> tuple[Float[Tensor, "R T HK"], Float[Tensor, "R T NK"], Num[Tensor, "R T NV"]]:
        """Return queries, keys and values, clipped and normed as the base's, not rotated.

        The value of `neural_cache` is the token's id + 1 (NV = 1).
        """
        seen = self.key_states(hidden_states, noted)
        query, key = self.q_proj(seen), self.k_proj(seen)
        is_id = self.params.update_rule == "neural_cache"
        if is_id:
            value = (token_ids[..., None] + 1).int()
        else:
            of_embedding = self.params.memory_value == "embedding"
            value = self.v_proj(embeddings if of_embedding else hidden_states)
        if (most := self.shape.clip) is not None:
            query, key = query.clamp(-most, most), key.clamp(-most, most)
            value = value if is_id else value.clamp(-most, most)
        if self.q_norm is not None:
            query, key = self._normed(self.q_norm, query), self._normed(self.k_norm, key)
        return query, key, value

    def key_states(
        self, hidden_states: Float[Tensor, "R T D"], noted: Noted | None
    ) -> Float[Tensor, "R T D"]:
        """Return what queries and keys are projections of."""
        if self.params.key_layer == "own":
            return hidden_states
        if torch.is_grad_enabled() and not noted.has_graph:
            raise ValueError(
                "gradient checkpointing must have use_reentrant=False where infini.key_layer is "
                "not own: no gradient would reach the layer that keys are made of"
            )
        return noted.hidden_states.to(hidden_states.device)

    def _normed(self, norm: nn.Module, x: Tensor) -> Tensor:
        if self.shape.norms == "all":
            return norm(x).to(x.dtype)
        by_head = x.unflatten(-1, (-1, self.shape.head_dim)).transpose(1, 2)
        return norm(by_head).to(x.dtype).transpose(1, 2).flatten(2)

    def drop_memory(self) -> None:
        """Remove the memory; keys and values of `local_context` still cross borders."""
        self.memory = self.gate_logit = None

    def forward(
        self,
        hidden_states: Float[Tensor, "R T D"],
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        cut: Cut | None = None,
        state: State | None = None,
        probe: Probe | None = None,
        embeddings: Float[Tensor, "R T D"] | None = None,
        token_ids: Int[Tensor, "R T"] | None = None,
        embed: Embed | None = None,
        noted: Noted | None = None,
        **_: object,
    ) -> tuple[Float[Tensor, "R T D"], None]:
        """Attend within segments and read the memory of the segments before.

        `position_embeddings` are cosines and sines, (R or 1, T, P) each, for RoPE only;
        `embeddings` are those of the tokens, for `memory_value: embedding` only; `neural_cache`
        needs their ids instead, and `embed`; `key_layer` needs `noted`. Without `state` the
        document begins and ends here. The None of the result stands where attention modules of
        `transformers` return weights.
        """
        cut, probe = cut or Cut(), probe or Probe()
        before = (state or State()).before.get(self.layer_index, LayerState())
        query, key, value = self.project(hidden_states, embeddings, token_ids, noted)
        turns = self.params.positions == "rope" and self.shape.rotates
        tables = position_embeddings if turns else None
        new = Tokens.of(key, value, tables, cut.is_token)
        if cut.is_open:
            out, after = self._stream(query, new, before, cut, probe, embed)
        else:
            layout = Layout(hidden_states, cut, self.segment_length)
            length = cut.segment_length or self.segment_length
            segments = self._lay_out(layout, new, before, probe, length)
            query = layout.split(query, self.shape.num_heads)
            out = layout.join(self._attend(query, segments, probe, embed))
            after = LayerState(segments.memory)
            if (line := segments.line) is not None:
                after = LayerState(segments.memory, line.last(), line.sink)
        if state is not None:
            if after.memory is not None:
                after = replace(after, memory=self.memory.whole(after.memory))
            state.after[self.layer_index] = after
        return self.o_proj(out.to(hidden_states.dtype)), None

    def _stream(
        self,
        query: Float[Tensor, "B T HK"],
        new: Tokens,
        before: LayerState,
        cut: Cut,
        probe: Probe,
        embed: Embed | None,
    ) -> tuple[Float[Tensor, "B T HV"], LayerState]:
        """Attend with an open call's tokens; return the state that the next call needs too."""
        kept, heads = before.unfinished, self.shape.num_heads
        tokens = new if kept is None else kept.followed_by(new)
        length = cut.segment_length or self.segment_length
        is_step = kept is not None and len(new) == 1 and cut.is_token is None
        if is_step:  # one query: the keys of its segment are known already
            reads = self.memory is not None and probe.read != "off"
            by_distance = self.slopes is not None or self.shape.window is not None
            keys = None
            if self.params.local != "none":
                keys = running_keys(tokens, before, self.shape.num_kv_heads)
            segments = running_segment(tokens, before, keys, reads, by_distance)
            layout = Layout(new.key, Cut(num_segments=1), 1)
            out = layout.join(self._attend(layout.split(query, heads), segments, probe, embed))
            if len(tokens) < length:
                return out, replace(before, unfinished=tokens, keys=keys)
        is_token = None if cut.is_token is None and len(tokens) == len(new) else tokens.is_token
        layout = Layout(tokens.key, Cut(is_token=is_token), length)
        border = None
        if self.layer_index in probe.unread:
            border = tokens.is_token.sum(dim=1) // length
        segments = self._lay_out(layout, tokens, before, probe, length, border)
        if not is_step:
            # Pad queries; the outputs of earlier tokens are dropped, and read no memory.
            num_kept, first = len(tokens) - len(new), 0
            if num_kept and layout.grid[1] == 1 and segments.memories is not None:
                first = int(kept.is_token.sum(dim=1).min())
                num_before = torch.full((len(query),), first, device=query.device)
                segments = replace(segments, num_before=num_before)
            query = layout.split(F.pad(query, (0, 0, num_kept, 0)), heads)
            out = layout.join(self._attend(query, segments, probe, embed, first))[:, num_kept:]
        return out, state_after(segments, tokens, length)

    def _lay_out(
        self,
        layout: Layout,
        tokens: Tokens,
        before: LayerState,
        probe: Probe,
        length: int,
        border: Int[Tensor, "B"] | None = None,
    ) -> Segments:
        """Cut keys and values into segments, and write the memory before each.

        With `border` only the memory after so many segments of each document.
        """
        key, value = (layout.split(x, self.shape.num_kv_heads) for x in (tokens.key, tokens.value))
        place = layout.place_by(tokens.tables)
        line = memories = memory = None
        if not self.local_context:
            keys = Keys(place(key), value)
        else:
            own = tokens.map(layout.line)
            every, carried = self.params.stop_gradient_every, (before.context, before.sink)
            if every is not None and before.sink is not None:
                carried = tuple(x.map(Tensor.detach) for x in carried)
            line = Line.of(own, *carried, self.local_context)
            keys = line.keys(layout.grid[2], self.shape.num_kv_heads, every)
        if self.memory is not None and probe.read != "off":
            is_token = layout.is_token
            if late := self.local_context // length:  # whole segments that have not left
                key, value, is_token = line.left(late, layout.grid[1], length, key.shape[2])
            # Queries and keys before position encoding (section 2.1 of the paper): the memory
            # finds by content, not by distance.
            job = "recent_states" if probe.read == "recent" else "states"
            feature = self.feature_maps.of_key(key)
            if self.params.memory_key == "before":  # none for a segment's first token
                feature = F.pad(feature[..., :-1, :], (0, 0, 1, 0))
                if self.memory.rule == "neural_cache":
                    value = F.pad(value[..., 1:, :], (0, 0, 1, 0))
            if border is not None:  # what comes after it is not written yet
                segment = torch.arange(layout.grid[1], device=key.device)[:, None]
                ends = (segment < border[:, None, None]).expand(-1, -1, key.shape[3])
                is_token = ends if is_token is None else is_token & ends
            written = feature, key, value, is_token, before.memory
            if border is None:
                memories, memory = self.memory(job, *written)
            else:
                memory = self.memory("state_after", *written)
        return Segments(place, keys, line, memories, memory)

    def _attend(
        self,
        query: Float[Tensor, "B S H L K"],
        segments: Segments,
        probe: Probe,
        embed: Embed | None,
        first: int = 0,
    ) -> Float[Tensor, "B S H L V"]:
        """Attend inside each segment, and blend with what its memory recalls (eq. 10).

        Queries before the `first` read no memory.
        """
        if self.layer_index in probe.unread:
            return torch.zeros_like(query)
        local = self._attend_locally(query, segments)
        if segments.memories is None:
            return local
        skipped, local, query = local[..., :first, :], local[..., first:, :], query[..., first:, :]
        if probe.memories is not None:
            probe.memories[self.layer_index] = segments.memories
        memories = probe.swapped.get(self.layer_index, segments.memories)
        feature = self.feature_maps.of_query(query)
        numerator, denominator, logit = self.memory(
            "read", query, feature, memories, segments.num_before, embed
        )
        if self.memory.rule == "neural_cache":  # one projection for each query, not for each slot
            found = quotient(numerator, denominator).to(query.dtype)
            numerator = denominator * self.v_proj(found).to(denominator.dtype)
        gate = self.gate_logit.to(denominator.dtype)[:, None, None]
        share = memory_share(denominator, gate + logit)
        if probe.readings is not None:
            found = quotient(numerator, denominator)
            noted = (share[..., 0], found.float().norm(dim=-1), local.float().norm(dim=-1))
            probe.readings[self.layer_index] = MemoryReading(*(x.detach().float() for x in noted))
        if self.memory.rule in UNIT_RULES:  # recalls little for a key that it does not hold
            out = torch.addcmul(local, share, numerator).to(local.dtype)
        else:
            out = mix(local, numerator, denominator, share)
        return torch.cat([skipped, out], dim=-2) if first else out

    def _attend_locally(
        self, query: Float[Tensor, "B S H L K"], segments: Segments
    ) -> Float[Tensor, "B S H L V"]:
        """Attend inside each segment, and to what it carries."""
        if self.params.local == "none":
            return torch.zeros_like(query)
        keys = segments.keys
        is_key = None if keys.is_key is None else keys.is_key.flatten(0, 1)
        flat = (x.flatten(0, 1) for x in (segments.place(query), keys.key, keys.value))
        if self.params.local == "linear":
            local = linear_attention(*flat, is_key, self.feature_maps)
        else:
            how = {"scaling": self.shape.scaling, "window": self.shape.window}
            local = softmax_attention(*flat, is_key, slopes=self.slopes, **how)
        return local.unflatten(0, query.shape[:2])
