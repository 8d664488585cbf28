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
    P  rotated channel, the first P of K
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from infini_retrofit.carrier import Carried, Carrier, MemoryReading, SegmentCut
from infini_retrofit.compressive_memory import CompressiveMemory, Recalled
from infini_retrofit.feature_maps import FeatureMaps
from infini_retrofit.infini_params import AttentionShape, InfiniParams
from infini_retrofit.local_attention import alibi_slopes, linear_attention, softmax_attention
from infini_retrofit.local_context import Keys, LocalContext, Place, carry_context
from infini_retrofit.memory import SMALLEST_DENOMINATOR, memory_share, mix
from infini_retrofit.window_attention import older_sums, window_attention


@dataclass(frozen=True)
class Local:
    """What a segment's own tokens give to each query.

    Attributes:
        out: the attention's output.
        log_mass: log of its denominator, where others share it.
    """

    out: Float[Tensor, "B S H L V"]
    log_mass: Float[Tensor, "B S H L 1"] | None = None


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
        return self.shape.border_bytes(self.local_context, num_features)

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
        cut = SegmentCut(hidden_states, carrier, self.segment_length)
        query = cut.split(self.q_proj(hidden_states), self.shape.num_heads)
        key = cut.split(self.k_proj(hidden_states), self.shape.num_kv_heads)
        value = cut.split(self.v_proj(hidden_states), self.shape.num_kv_heads)
        before = carrier.before.get(self.layer_index, Carried())
        # The memory works on queries and keys before position encoding (section 2.1 of the
        # paper): what was stored far away is found by content, not by distance.
        place = self._place(cut, position_embeddings)
        own = Keys(place(key), value, cut.mask(key.device))
        local, context = self._attend_locally(place(query), own, key, place, before.context)
        reads = self.memory is not None and carrier.read != "off"
        sums, memory = [], None
        if reads or self.local == "window_linear":
            query_feature = self.feature_maps.of_query(query)
            key_feature = self.feature_maps.of_key(key)
        if self.local == "window_linear":
            sums.append(self._older(query_feature, key_feature, value))
        if reads:
            write = self.memory.recent_states if carrier.read == "recent" else self.memory.states
            found, memory = write(key, key_feature, value, cut.is_token, before.memory)
            if carrier.found is not None:
                carrier.found[self.layer_index] = found
            found = carrier.strangers.get(self.layer_index, found)
            sums.append(self.memory.read(query, query_feature, found))
        out = self._mix(local, sums, carrier) if sums else local.out
        carrier.after[self.layer_index] = Carried(memory, context)
        out = self.o_proj(cut.join(out).to(hidden_states.dtype))
        return out if self.alpha is None else self.alpha.to(out.dtype) * out, None

    def _place(self, cut: SegmentCut, position_embeddings: tuple[Tensor, Tensor] | None) -> Place:
        """Return the function that gives queries and keys their positions, if they have any."""
        if not self.uses_rope:
            return lambda x, index=None: x
        cos, sin = (cut.split_positions(table) for table in position_embeddings)

        def place(x: Tensor, index: int | None = None) -> Tensor:
            at = slice(None) if index is None else slice(index, index + 1)
            return rotate(x, cos[..., at, :], sin[..., at, :])

        return place

    def _attend_locally(
        self,
        query: Float[Tensor, "B S H L K"],
        own: Keys,
        key: Float[Tensor, "B S N L K"],
        place: Place,
        before: LocalContext | None,
    ) -> tuple[Local, LocalContext | None]:
        """Attend inside each segment, and to what is carried over from the one before."""
        # Padding stands at a document's end, where causality hides it: only what is carried
        # over needs a mask, because before the first segment there is nothing.
        keys, is_key, after = own, None, None
        if self.local_context:
            first_key = key[:, 0, :, :1]
            keys, after = carry_context(own, first_key, place, self.local_context, before)
            is_key = keys.is_key.flatten(0, 1)
        flat = (query.flatten(0, 1), keys.key.flatten(0, 1), keys.value.flatten(0, 1), is_key)
        grid = query.shape[:2]
        if self.local == "window_linear":
            out, log_mass = window_attention(*flat, self.window, self.slopes)
            return Local(out.unflatten(0, grid), log_mass.unflatten(0, grid)), after
        if self.local == "linear":
            out = linear_attention(*flat, self.feature_maps)
        else:
            out = softmax_attention(*flat, slopes=self.slopes)
        return Local(out.unflatten(0, grid)), after

    def _older(
        self,
        query_feature: Float[Tensor, "B S H L F"],
        key_feature: Float[Tensor, "B S N L F"],
        value: Float[Tensor, "B S N L V"],
    ) -> Recalled:
        """Sum over the segment's own tokens that a query's window has left behind."""
        flat = (x.flatten(0, 1) for x in (query_feature, key_feature, value))
        sums = [x.unflatten(0, value.shape[:2]) for x in older_sums(*flat, self.window)]
        return Recalled(*sums, logit=query_feature.new_zeros(1, 1, 1))

    def _mix(
        self, local: Local, recalled: list[Recalled], carrier: Carrier
    ) -> Float[Tensor, "B S H L V"]:
        """Blend the local attention with what linear sums there are."""
        numerator = sum(r.numerator for r in recalled)
        denominator = sum(r.denominator for r in recalled)
        logit = self.gate_logit.to(denominator.dtype)[:, None, None]
        logit = logit + sum(r.logit for r in recalled)
        if local.log_mass is not None:
            # Of the order of 1 while the linear sums hold no more tokens than the window.
            mass = denominator / (self.feature_maps.num_features * self.window)
            logit = logit + mass.clamp_min(SMALLEST_DENOMINATOR).log() - local.log_mass
        share = memory_share(denominator, logit)
        if carrier.readings is not None:
            found = numerator / denominator.clamp_min(SMALLEST_DENOMINATOR)
            norms = (x.detach().float().norm(dim=-1) for x in (found, local.out))
            reading = MemoryReading(share.detach()[..., 0].float(), *norms)
            carrier.readings[self.layer_index] = reading
        return mix(local.out, numerator, denominator, share)


def rotate(
    x: Float[Tensor, "B S H L K"],
    cos: Float[Tensor, "#B #S 1 L P"],
    sin: Float[Tensor, "#B #S 1 L P"],
) -> Float[Tensor, "B S H L K"]:
    """Apply rotary position encoding to the first P channels, in the halves form.

    Source: Su et al. 2021, arXiv:2104.09864; halves as in GPT-NeoX and Llama.
    """
    rotated, rest = x.split([cos.shape[-1], x.shape[-1] - cos.shape[-1]], dim=-1)
    first, second = rotated.chunk(2, dim=-1)
    rotated = rotated * cos + torch.cat([-second, first], dim=-1) * sin
    return torch.cat([rotated.to(x.dtype), rest], dim=-1) if rest.shape[-1] else rotated.to(x.dtype)
