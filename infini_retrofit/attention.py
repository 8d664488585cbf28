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
    P  rotated channel, the first P of K
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from infini_retrofit.carrier import Carried, Carrier, SegmentCut
from infini_retrofit.local_attention import linear_attention, softmax_attention
from infini_retrofit.local_context import Keys, LocalContext, Place, carry_context
from infini_retrofit.memory import memory_bytes, mix, prefix_states, write_segments

# A deployed model keeps carried keys and values in a 16-bit type.
BYTES_PER_CARRIED_CHANNEL = 2


@dataclass(frozen=True, kw_only=True)
class InfiniParams:
    """Section `infini` of params.yaml: where the memory goes, and in what form."""

    layers: list[int] | Literal["all"]  # decoder layers, negative from the end
    insertion: Literal["replace"]
    init: Literal["base", "random_attention", "random_layer"]  # what starts from random weights
    local: Literal["softmax", "linear"]  # attention inside a segment
    positions: Literal["rope", "none"]  # position encoding of the local attention
    heads: Literal["base", "single"]  # as many as the base has, or one of the full width
    memory: Literal["on", "off"]
    segment_length: int  # tokens
    local_context: int  # tokens of keys and values carried over, the document's first included
    initial_memory_share: float  # sigmoid(gate_logit) at the start

    def __post_init__(self) -> None:
        """Refuse values that no base model could make sense of."""
        if self.layers != "all" and not self.layers:
            raise ValueError("infini.layers must name at least one layer, got []")
        if self.segment_length < 3:
            raise ValueError(
                "infini.segment_length must be at least 3 tokens, or the protocol t2 has none to "
                f"score, got {self.segment_length}"
            )
        if not 0 <= self.local_context <= self.segment_length:
            raise ValueError(
                f"infini.local_context must be in 0..segment_length={self.segment_length} "
                f"tokens, got {self.local_context}"
            )
        if not 0 < self.initial_memory_share < 1:
            raise ValueError(
                "infini.initial_memory_share must lie between 0 and 1, "
                f"got {self.initial_memory_share}"
            )
        if self.heads == "single" and (self.init == "base" or self.positions == "rope"):
            raise ValueError(
                "infini.heads must be base when infini.init is base or infini.positions is rope "
                "(neither the base's weights nor its rotations fit a single head), got single"
            )


@dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """Sizes of one attention module."""

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    qkv_bias: bool
    o_bias: bool

    def single_head(self) -> "AttentionShape":
        """Return the seeds' form: one head of the model's full width, no biases."""
        return AttentionShape(
            hidden_size=self.hidden_size,
            num_heads=1,
            num_kv_heads=1,
            head_dim=self.hidden_size,
            qkv_bias=False,
            o_bias=False,
        )

    def carried_token_bytes(self) -> int:
        """Count the bytes of one token's keys and values."""
        return 2 * self.num_kv_heads * self.head_dim * BYTES_PER_CARRIED_CHANNEL

    def border_bytes(self, local_context: int, has_memory: bool) -> int:
        """Count the bytes that cross a segment border, for one document."""
        num_bytes = local_context * self.carried_token_bytes()
        if has_memory:
            num_bytes += memory_bytes(self.num_kv_heads, self.head_dim, self.head_dim)
        return num_bytes


class InfiniAttention(nn.Module):
    """Attention whose reach is one segment, plus a memory of every segment before.

    Attributes:
        gate_logit: one for each query head, float32; `sigmoid(gate_logit)` is the share of the
            memory. None: no memory, neither read nor written.
    """

    def __init__(self, shape: AttentionShape, params: InfiniParams, layer_index: int) -> None:
        super().__init__()
        shape = shape.single_head() if params.heads == "single" else shape
        self.shape = shape
        self.layer_index = layer_index
        self.attend = softmax_attention if params.local == "softmax" else linear_attention
        self.uses_rope = params.positions == "rope"
        self.segment_length = params.segment_length
        self.local_context = params.local_context
        q_size, kv_size = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden_size, q_size, bias=shape.qkv_bias)
        self.k_proj = nn.Linear(shape.hidden_size, kv_size, bias=shape.qkv_bias)
        self.v_proj = nn.Linear(shape.hidden_size, kv_size, bias=shape.qkv_bias)
        self.o_proj = nn.Linear(q_size, shape.hidden_size, bias=shape.o_bias)
        self.gate_logit = None
        if params.memory == "on":
            share = params.initial_memory_share
            logits = torch.full((shape.num_heads,), math.log(share / (1 - share)))
            self.gate_logit = nn.Parameter(logits)

    @property
    def border_bytes(self) -> int:
        """Bytes that cross a segment border in this layer, for one document."""
        return self.shape.border_bytes(self.local_context, self.gate_logit is not None)

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
        out, context = self._attend_locally(place(query), own, key, place, before.context)
        memory = None
        if self.gate_logit is not None and carrier.read != "off":
            written = write_segments(key, value, cut.is_token)
            found, memory = prefix_states(written, before.memory)
            found = found.roll_batch() if carrier.read == "swapped" else found
            out = mix(out, query, found, self.gate_logit)
        carrier.after[self.layer_index] = Carried(memory, context)
        return self.o_proj(cut.join(out).to(hidden_states.dtype)), None

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
    ) -> tuple[Float[Tensor, "B S H L V"], LocalContext | None]:
        """Attend inside each segment, and to what is carried over from the one before."""
        # Padding stands at a document's end, where causality hides it: only what is carried
        # over needs a mask, because before the first segment there is nothing.
        keys, is_key, after = own, None, None
        if self.local_context:
            first_key = key[:, 0, :, :1]
            keys, after = carry_context(own, first_key, place, self.local_context, before)
            is_key = keys.is_key.flatten(0, 1)
        flat = (query.flatten(0, 1), keys.key.flatten(0, 1), keys.value.flatten(0, 1))
        return self.attend(*flat, is_key).unflatten(0, query.shape[:2]), after


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
