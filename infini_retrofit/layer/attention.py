"""`InfiniAttention`: local attention inside a segment, memory of all segments before it.

A drop-in for a decoder layer's attention module. It knows nothing of model families, weights
of a base model, losses or files.

Source: Munkhdalai et al. 2024, arXiv:2404.07143v2, section 2.1.

Axes:
    R  row of the batch as the model sees it
    T  token of a row
    D  model width
    B  document
    S  segment of a document
    L  token of a segment
    H  query head
    N  key/value head
    K  key channel
    V  value channel
    F  feature of a query or key
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from infini_retrofit.layer.compressive_memory import CompressiveMemory
from infini_retrofit.layer.cut import SegmentCut, place_by
from infini_retrofit.layer.feature_maps import FeatureMaps
from infini_retrofit.layer.form import AttentionShape, InfiniParams
from infini_retrofit.layer.gate import Local, Recalled, add_up, memory_share, mix
from infini_retrofit.layer.local_attention import (
    alibi_slopes,
    linear_attention,
    masked_linear_sums,
    softmax_attention,
)
from infini_retrofit.layer.local_context import Keys, carry_context
from infini_retrofit.layer.memory import SMALLEST_DENOMINATOR, quotient
from infini_retrofit.layer.state import Carried, Carrier, MemoryReading, Tokens
from infini_retrofit.layer.streaming import Segments, go_on
from infini_retrofit.layer.window_attention import older_sums, window_attention


class InfiniAttention(nn.Module):
    """Attention whose reach is one segment, plus a memory of every segment before.

    Attributes:
        memory: None: neither read nor written.
        gate_logit: one for each query head, float32; `sigmoid(gate_logit)` is the share of the
            memory, before queries and decay move it. With the local attention `window_linear`
            it weighs all linear sums against the window. None: there is nothing to weigh.
        alpha: factor on the output of a parallel branch, which starts at zero; None: no branch.
    """

    def __init__(self, shape: AttentionShape, params: InfiniParams, layer_index: int) -> None:
        super().__init__()
        shape = shape.of_heads(params.heads)
        self.shape = shape
        self.layer_index = layer_index
        self.local = params.local
        self.window = params.window
        self.uses_rope = params.positions == "rope"
        self.segment_length = params.segment_length
        self.local_context = params.local_context
        self.bptt_segments = params.cutting_borders
        self.state_dtype = params.state_dtype
        q_size, kv_size = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden_size, q_size, bias=shape.qkv_bias)
        self.k_proj = nn.Linear(shape.hidden_size, kv_size, bias=shape.qkv_bias)
        self.v_proj = nn.Linear(shape.hidden_size, kv_size, bias=shape.qkv_bias)
        self.o_proj = nn.Linear(q_size, shape.hidden_size, bias=shape.o_bias)
        num_features = params.count_features(shape.head_dim)
        self.feature_maps = None
        if params.memory == "on" or params.local != "softmax":
            heads = (shape.num_heads, shape.num_kv_heads)
            self.feature_maps = FeatureMaps(
                params.feature_map, *heads, shape.head_dim, num_features
            )
        slopes = alibi_slopes(shape.num_heads) if params.positions == "alibi" else None
        self.register_buffer("slopes", slopes, persistent=False)
        self.memory = self.gate_logit = self.alpha = None
        if params.memory == "on":
            self.memory = CompressiveMemory(shape, params, num_features)
        if params.memory == "on" or params.local == "window_linear":
            share = params.initial_memory_share
            logits = torch.full((shape.num_heads,), math.log(share / (1 - share)))
            self.gate_logit = nn.Parameter(logits)
        if params.insertion == "parallel":
            self.alpha = nn.Parameter(torch.zeros(1))

    @property
    def border_bytes(self) -> int:
        """Bytes that cross a segment border in this layer, for one document."""
        num_features = 0 if self.memory is None else self.feature_maps.num_features
        return self.shape.border_bytes(self.local_context, num_features, self.state_dtype)

    def memory_parameters(self) -> dict[str, list[nn.Parameter]]:
        """Return what a base's attention has no counterpart of, in groups of a learning rate."""
        memory = [] if self.memory is None else list(self.memory.parameters())
        maps = [] if self.feature_maps is None else list(self.feature_maps.parameters())
        gates = [] if self.memory is None else self.memory.gates()
        others = [p for p in memory if not any(p is g for g in gates)]
        return {
            "gate": gates + ([] if self.gate_logit is None else [self.gate_logit]),
            "alpha": [] if self.alpha is None else [self.alpha],
            "memory": others + maps,
        }

    def start_memory(self) -> None:
        """Finish the start of what depends on the projections, once these have theirs."""
        if self.memory is not None:
            self.memory.start_from(self.v_proj)

    def drop_memory(self) -> None:
        """Remember nothing from here on, beside the keys and values of `local_context`."""
        self.memory = None
        if self.local != "window_linear":
            self.gate_logit = None

    def forward(
        self,
        hidden_states: Float[Tensor, "R T D"],
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        carrier: Carrier | None = None,
        **_: object,
    ) -> tuple[Float[Tensor, "R T D"], None]:
        """Attend within segments and read the memory of the segments before.

        Args:
            hidden_states: the layer's normalised input.
            position_embeddings: cosines and sines, (R or 1, T, P) each; needed with RoPE only.
            carrier: how to cut and what to carry; None: in-layer, starting with nothing.

        Returns:
            The output and None, where the attention modules of `transformers` return weights.
        """
        carrier = Carrier() if carrier is None else carrier
        before = carrier.before.get(self.layer_index, Carried())
        query, key, value = (p(hidden_states) for p in (self.q_proj, self.k_proj, self.v_proj))
        tables = position_embeddings if self.uses_rope else None
        if carrier.is_open:
            new = Tokens.of(key, value, tables, carrier.is_token)
            out, after = go_on(self, query, new, before, carrier)
        else:
            cut = SegmentCut(hidden_states, carrier, self.segment_length)
            segments = self.lay_out(cut, key, value, tables, before, carrier)
            query = cut.split(query, self.shape.num_heads)
            out = cut.join(self.attend(query, segments, carrier))
            after = Carried(segments.memory, segments.context)
        carrier.after[self.layer_index] = after
        out = self.o_proj(out.to(hidden_states.dtype))
        return out if self.alpha is None else self.alpha.to(out.dtype) * out, None

    def reads(self, carrier: Carrier) -> bool:
        """Tell whether the memory is read and written."""
        return self.memory is not None and carrier.read != "off"

    def lay_out(
        self,
        cut: SegmentCut,
        key: Float[Tensor, "R T NK"],
        value: Float[Tensor, "R T NV"],
        tables: tuple[Tensor, Tensor] | None,
        before: Carried,
        carrier: Carrier,
    ) -> Segments:
        """Cut keys and values into segments, and let each segment find what the others left."""
        key = cut.split(key, self.shape.num_kv_heads)
        value = cut.split(value, self.shape.num_kv_heads)
        place = place_by(cut, tables)
        keys = Keys(place(key), value, cut.mask(key.device))
        # Padding stands at a document's end, where causality hides it: only what is carried
        # over needs a mask, because before the first segment there is nothing.
        is_key = context = feature = found = memory = None
        if self.local_context:
            carried = (self.local_context, before.context, self.bptt_segments)
            keys, context = carry_context(keys, key[:, 0, :, :1], place, *carried)
            is_key = keys.is_key
        # The memory works on queries and keys before position encoding (section 2.1 of the
        # paper): what was stored far away is found by content, not by distance.
        if self.reads(carrier) or self.local == "window_linear":
            feature = self.feature_maps.of_key(key)
        if self.reads(carrier):
            write = self.memory.recent_states if carrier.read == "recent" else self.memory.states
            found, memory = write(key, feature, value, cut.is_token, before.memory)
        return Segments(place, value, feature, keys, is_key, context, found, memory)

    def attend(
        self, query: Float[Tensor, "B S H L K"], segments: Segments, carrier: Carrier
    ) -> Float[Tensor, "B S H L V"]:
        """Attend inside each segment and read the memory that it finds."""
        local, sums = self._attend_locally(segments.place(query), segments), []
        if segments.key_feature is not None or segments.found is not None:
            query_feature = self.feature_maps.of_query(query)
        if self.local == "window_linear":
            sums.append(self._older(query_feature, segments))
        if segments.found is not None:
            found = segments.found
            if carrier.found is not None:
                carrier.found[self.layer_index] = found
            found = carrier.strangers.get(self.layer_index, found)
            read = self.memory.read(query, query_feature, found, segments.num_before)
            sums.append(read)
        return self._mix(local, sums, carrier) if sums else local.out

    def _attend_locally(self, query: Float[Tensor, "B S H L K"], segments: Segments) -> Local:
        """Attend inside each segment, and to what is carried over from the one before."""
        keys, grid = segments.keys, query.shape[:2]
        is_key = None if segments.is_key is None else segments.is_key.flatten(0, 1)
        flat = (query.flatten(0, 1), keys.key.flatten(0, 1), keys.value.flatten(0, 1), is_key)
        if self.local == "window_linear":
            out, log_mass = window_attention(*flat, self.window, self.slopes)
            return Local(out.unflatten(0, grid), log_mass.unflatten(0, grid))
        if self.local == "linear":
            out = linear_attention(*flat, self.feature_maps)
        else:
            out = softmax_attention(*flat, slopes=self.slopes)
        return Local(out.unflatten(0, grid))

    def _older(self, query_feature: Float[Tensor, "B S H L F"], segments: Segments) -> Recalled:
        """Sum over the segment's own tokens that a query's window has left behind."""
        value, is_older = segments.value, segments.is_older
        flat = [x.flatten(0, 1) for x in (query_feature, segments.key_feature, value)]
        if is_older is None:
            sums = older_sums(*flat, self.window)
        else:
            sums = masked_linear_sums(*flat, is_older.flatten(0, 1)[:, None, None])
        sums = [x.unflatten(0, value.shape[:2]) for x in sums]
        return Recalled(*sums, logit=query_feature.new_zeros(1, 1, 1))

    def _mix(
        self, local: Local, recalled: list[Recalled], carrier: Carrier
    ) -> Float[Tensor, "B S H L V"]:
        """Blend the local attention with what linear sums there are."""
        total = add_up(recalled)
        gate = self.gate_logit.to(total.denominator.dtype)[:, None, None]
        logit = gate + total.logit
        if local.log_mass is not None:
            # Of the order of 1 while the linear sums hold no more tokens than the window.
            mass = total.denominator / (self.feature_maps.num_features * self.window)
            logit = logit + mass.clamp_min(SMALLEST_DENOMINATOR).log() - local.log_mass
        share = memory_share(total.denominator, logit)
        if carrier.readings is not None:
            found = quotient(total.numerator, total.denominator)
            norms = (x.detach().float().norm(dim=-1) for x in (found, local.out))
            reading = MemoryReading(share.detach()[..., 0].float(), *norms)
            carrier.readings[self.layer_index] = reading
        return mix(local.out, total.numerator, total.denominator, share)
