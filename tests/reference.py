"""What the library computes, as loops that can be checked by eye: slow, and one document at a time.

Axes:
    T  token of a document
    D  model width
    H  query head
    N  key/value head
    K  key channel
    V  value channel
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from infini_retrofit.attention import InfiniAttention, InfiniParams
from infini_retrofit.carrier import Carried, Carrier, Read
from infini_retrofit.retrofit import FAMILIES, decoder_layers


def infini_params(**over: object) -> InfiniParams:
    """Return Infini-attention as published, in every layer, with some fields changed."""
    fields = {
        "layers": "all",
        "insertion": "replace",
        "init": "base",
        "local": "softmax",
        "positions": "rope",
        "heads": "base",
        "memory": "on",
        "segment_length": 5,
        "local_context": 0,
        "initial_memory_share": 0.3,
    }
    return InfiniParams(**fields | over)


def largest(x: Tensor) -> float:
    """Return the largest absolute value; NaN if there is one."""
    return x.detach().abs().max().item()


def naive_feature(x: Tensor) -> Tensor:
    """Map to positive features as the paper prints it."""
    return F.elu(x) + 1


def naive_recall(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Recall one value for one query (K) from all that was written (T K) and (T V)."""
    weights = (naive_feature(query) * naive_feature(key)).sum(-1)
    return weights @ value / weights.sum()


def naive_attend(query: Tensor, key: Tensor, value: Tensor, kind: str) -> Tensor:
    """Attend with one query (K) to all keys (T K) and values (T V) given."""
    if kind == "linear":
        return naive_recall(query, key, value)
    weights = ((query * key).sum(-1) / len(query) ** 0.5).exp()
    return weights @ value / weights.sum()


Tables = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Heads:
    """Queries (H T K), keys (N T K) and values (N T V) of one document, not yet placed."""

    query: Tensor
    key: Tensor
    value: Tensor


def naive_rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn channels (c, c + P/2) as a point of the plane; channels from P on stay."""
    half = cos.shape[-1] // 2
    channels = list(x.unbind(-1))
    for c in range(half):
        a, b = x[..., c], x[..., c + half]
        channels[c] = a * cos[:, c] - b * sin[:, c]
        channels[c + half] = b * cos[:, c] + a * sin[:, c]
    return torch.stack(channels, dim=-1)


def place_at(x: Tensor, position: int, tables: Tables | None) -> Tensor:
    """Give one vector (K) the position of a token of the document, if there are positions."""
    if tables is None:
        return x
    cos, sin = tables
    return naive_rotate(x[None], cos[position, None], sin[position, None])[0]


def naive_infini(
    heads: Heads,
    tables: Tables | None,
    gate_logit: Tensor | None,
    segment_length: int,
    kind: str = "softmax",
    local_context: int = 0,
    memory_of: Heads | None = None,
) -> Tensor:
    """Compute (H T V) token by token, from all keys and values there are, without a state.

    Args:
        heads: before position encoding; what the memory works on.
        tables: cosines and sines, (T P) each; None: no positions.
        gate_logit: (H); None: no memory.
        segment_length: tokens.
        kind: softmax or linear local attention.
        local_context: tokens that a segment attends to besides itself: the last ones of the
            segment before, but for one, and the document's first, placed next to them.
        memory_of: whose memory is read; None: the document's own.
    """
    num_heads, num_tokens = heads.query.shape[:2]
    group = num_heads // len(heads.key)
    memory_of = heads if memory_of is None else memory_of
    rows = []
    for h in range(num_heads):
        n = h // group
        for t in range(num_tokens):
            begin = t // segment_length * segment_length
            seen = {s: s for s in range(begin, t + 1)}  # position: token
            if begin and local_context:
                seen[begin - local_context] = 0
                seen |= {s: s for s in range(begin - local_context + 1, begin)}
            key = [place_at(heads.key[n, token], at, tables) for at, token in seen.items()]
            value = heads.value[n, list(seen.values())]
            query = place_at(heads.query[h, t], t, tables)
            out = naive_attend(query, torch.stack(key), value, kind)
            if gate_logit is not None and begin:
                past_key, past_value = memory_of.key[n, :begin], memory_of.value[n, :begin]
                share = torch.sigmoid(gate_logit[h])
                recalled = naive_recall(heads.query[h, t], past_key, past_value)
                out = (1 - share) * out + share * recalled
            rows.append(out)
    return torch.stack(rows).unflatten(0, (num_heads, num_tokens))


def naive_heads(layer: InfiniAttention, hidden_states: Tensor) -> Heads:
    """Project hidden states (T D), one head after another."""
    size = layer.shape.head_dim

    def project(linear: torch.nn.Linear, num_heads: int) -> Tensor:
        heads = []
        for h in range(num_heads):
            rows = slice(h * size, (h + 1) * size)
            bias = 0 if linear.bias is None else linear.bias[rows]
            heads.append(hidden_states @ linear.weight[rows].T + bias)
        return torch.stack(heads)

    return Heads(
        project(layer.q_proj, layer.shape.num_heads),
        project(layer.k_proj, layer.shape.num_kv_heads),
        project(layer.v_proj, layer.shape.num_kv_heads),
    )


def naive_layer(
    layer: InfiniAttention,
    hidden_states: Tensor,
    tables: Tables | None,
    kind: str,
    memory_of: Tensor | None = None,
) -> Tensor:
    """Compute an Infini layer's output (T D) for one document.

    Args:
        layer: whose weights and sizes are used.
        hidden_states: (T D).
        tables: cosines and sines, (T P) each; None: no positions.
        kind: softmax or linear local attention.
        memory_of: the document whose memory is read, (T D); None: its own.
    """
    out = naive_infini(
        naive_heads(layer, hidden_states),
        tables,
        layer.gate_logit,
        layer.segment_length,
        kind,
        layer.local_context,
        None if memory_of is None else naive_heads(layer, memory_of),
    )
    return layer.o_proj(torch.cat(list(out), dim=-1))


def segment_loop(
    model: PreTrainedModel, input_ids: Tensor, segment_length: int, read: Read = "own"
) -> Tensor:
    """Run documents one segment after another, handing over what crosses the border."""
    outputs: list[Tensor] = []
    carried: dict[int, Carried] = {}
    for begin in range(0, input_ids.shape[1], segment_length):
        ids = input_ids[:, begin : begin + segment_length]
        positions = torch.arange(begin, begin + ids.shape[1]).expand_as(ids)
        carrier = Carrier(num_segments=1, read=read, before=carried)
        hidden = model.base_model(
            input_ids=ids, position_ids=positions, use_cache=False, carrier=carrier
        ).last_hidden_state
        outputs.append(hidden)
        carried = carrier.after
    return torch.cat(outputs, dim=1)


def record_layers(model: PreTrainedModel, input_ids: Tensor) -> dict[str, list[Tensor]]:
    """Note what each layer is given, what its attention returns and what it returns."""
    notes: dict[str, list[Tensor]] = {"given": [], "attention": [], "returned": []}
    name = FAMILIES[model.config.model_type].attention
    hooks = []
    for layer in decoder_layers(model):
        attention = getattr(layer, name)
        hooks += [
            layer.register_forward_pre_hook(
                lambda _, args, kwargs: notes["given"].append((*args, *kwargs.values())[0]),
                with_kwargs=True,
            ),
            attention.register_forward_hook(lambda _, __, out: notes["attention"].append(out[0])),
            layer.register_forward_hook(lambda _, __, out: notes["returned"].append(out)),
        ]
    with torch.no_grad():
        model(input_ids=input_ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return notes
