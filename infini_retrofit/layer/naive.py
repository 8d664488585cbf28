"""Every form of Infini-attention as loops that can be checked by eye, one token at a time.

Slow, one document at a time, and without a state: what a query finds is summed anew over every
token that was ever written. Shares no code with the library, but for the weights of a layer.

Axes:
    T  token of a document
    D  model width
    H  query head
    N  key/value head
    K  key channel
    F  feature
    V  value channel
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from infini_retrofit.layer.attention import InfiniAttention
from infini_retrofit.layer.form import InfiniParams

# Cosines and sines, or numerator and denominator.
Tables = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Heads:
    """Queries (H T K), keys (N T K) and values (N T V) of one document, not yet placed."""

    query: Tensor
    key: Tensor
    value: Tensor


@dataclass(frozen=True)
class Entry:
    """One thing that the memory of one head holds.

    Attributes:
        feature: of its key, (F).
        value: (V).
        weight: with which its value counts.
        mass: with which its key counts in the denominator.
        token: its position in the document; -1: from before it.
    """

    feature: Tensor
    value: Tensor
    weight: Tensor | float
    mass: Tensor | float
    token: int


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


class NaiveLayer:
    """What an Infini layer computes, by its weights and the form that it should have."""

    def __init__(self, layer: InfiniAttention, params: InfiniParams) -> None:
        self.layer, self.params, self.memory = layer, params, layer.memory
        self.group = layer.shape.num_heads // layer.shape.num_kv_heads

    def __call__(
        self, hidden_states: Tensor, tables: Tables | None, memory_of: Tensor | None = None
    ) -> Tensor:
        """Compute the output (T D) of one document.

        Args:
            hidden_states: (T D).
            tables: cosines and sines, (T P) each; None: no positions.
            memory_of: the document whose memory is read, (T D); None: its own.
        """
        heads = naive_heads(self.layer, hidden_states)
        owner = heads if memory_of is None else naive_heads(self.layer, memory_of)
        rows = []
        for h in range(len(heads.query)):
            finds = self.written(owner, h // self.group) if self.memory is not None else {}
            tokens = range(len(hidden_states))
            rows.append(torch.stack([self.one(heads, tables, finds, h, t) for t in tokens]))
        out = self.layer.o_proj(torch.cat(rows, dim=-1))
        return out if self.layer.alpha is None else self.layer.alpha * out

    def feature(self, x: Tensor, head: int, of: str) -> Tensor:
        """Map one vector of a head of queries or of keys."""
        weight = getattr(self.layer.feature_maps, f"{of}_weight", None)
        return naive_feature(x, self.params.feature_map, None if weight is None else weight[head])

    def written(self, heads: Heads, n: int) -> dict[int, list[Entry]]:
        """Return what a key/value head holds where each segment begins."""
        entries, found = [], {}
        if self.memory.initial_matrix is not None:
            weights = self.memory.initial_logit[n].exp()
            units = torch.eye(len(weights), dtype=weights.dtype)
            values = self.memory.initial_matrix[n]
            entries = [Entry(*e, -1) for e in zip(units, values, weights, weights, strict=True)]
        length, num_tokens = self.params.segment_length, heads.key.shape[1]
        of_armt = self.params.update_rule == "delta_gamma"
        for begin in range(0, num_tokens, length):
            found[begin] = list(entries)
            chosen = self.chosen(heads.key[n, begin : begin + length], n)
            for t, weight in chosen.items():
                feature = self.feature(heads.key[n, begin + t], n, "key")
                value, new = heads.value[n, begin + t], 1.0
                if self.params.update_rule != "linear":
                    numerator, denominator = self.sums(feature, found[begin], n, begin)
                    if denominator > 0:
                        value = value - numerator / denominator
                        known = denominator / (feature @ feature)
                        new = (1 - known).clamp(0, 1) if of_armt else 1.0
                entries.append(Entry(feature, value, weight, weight * new, begin + t))
        return found

    def chosen(self, keys: Tensor, n: int) -> dict[int, Tensor | float]:
        """Return the tokens of a segment that are written, and how much each counts."""
        if self.params.written_tokens == "all":
            return dict.fromkeys(range(len(keys)), 1.0)
        scores = [k @ self.memory.write_score[n] / len(k) ** 0.5 for k in keys]
        best = sorted(range(len(keys)), key=lambda t: -scores[t].item())
        return {t: torch.sigmoid(scores[t]) for t in best[: self.params.written_tokens]}

    def sums(self, feature: Tensor, entries: list[Entry], n: int, at: int) -> Tables:
        """Return numerator and denominator of what one feature vector finds at a position."""
        numerator = feature.new_zeros(self.layer.shape.head_dim)
        denominator = feature.new_zeros(())
        for entry in entries:
            common = feature * entry.feature
            if self.memory.decay_logit is not None:
                rate = self.memory.decay_logit[n].exp()
                common = common * torch.exp(-rate * (at - 1 - entry.token))
            common = common.sum()
            numerator = numerator + entry.weight * common * entry.value
            denominator = denominator + entry.mass * common
        return numerator, denominator

    def one(
        self, heads: Heads, tables: Tables | None, finds: dict[int, list[Entry]], h: int, t: int
    ) -> Tensor:
        """Compute one head's output (V) for one token."""
        params, n = self.params, h // self.group
        begin = t // params.segment_length * params.segment_length
        key, value, distance = self.seen(heads, tables, n, begin, t)
        query, placed = heads.query[h, t], place_at(heads.query[h, t], t, tables)
        feature = self.feature(query, h, "query")
        numerator, denominator, logit = 0, 0, 0
        if self.layer.gate_logit is not None:
            logit = self.layer.gate_logit[h]
        if finds:
            numerator, denominator = self.sums(feature, finds[begin], n, t)
            at_border = self.sums(feature, finds[begin], n, begin)[1]
            if at_border > 0:
                logit = logit + torch.log(denominator / at_border)
            if self.memory.query_gate is not None:
                logit = logit + query @ self.memory.query_gate[h] / len(query) ** 0.5
        scores = (key @ placed) / len(query) ** 0.5
        if params.positions == "alibi":
            scores = scores - 2.0 ** (-8 * (h + 1) / len(heads.query)) * distance
        if params.local == "window_linear":
            for s in range(begin, t - params.window + 1):
                common = feature @ self.feature(heads.key[n, s], n, "key")
                numerator = numerator + common * heads.value[n, s]
                denominator = denominator + common
            near = (scores - scores.max()).exp()
            far = torch.as_tensor(logit).exp() / (len(feature) * params.window)
            # ARMT's z may have nothing in common with a query where M has.
            far = far * (denominator > 0)
            return (near @ value + far * numerator) / (near.sum() + far * denominator)
        weights = scores.exp()
        if params.local == "linear":
            placed = self.feature(placed, h, "query")
            weights = torch.stack([placed @ self.feature(k, n, "key") for k in key])
        local = naive_average(weights, value)
        if not finds or denominator == 0:
            return local
        recalled = numerator / denominator
        if params.seed_scaling:
            recalled = recalled / params.segment_length
        if params.recall_norm == "rms":
            size = recalled.square().mean().sqrt()
            recalled = self.memory.recall_gain[h] * (recalled / size if size > 0 else recalled)
        share = torch.sigmoid(logit)
        return (1 - share) * local + share * recalled

    def seen(
        self, heads: Heads, tables: Tables | None, n: int, begin: int, t: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return keys, values and distances of what a token attends to besides the memory.

        That is its own segment up to itself, or the last tokens of that, and of the segment
        before the last ones, but for one, and the document's first, placed next to them.
        """
        context, first = self.params.local_context, begin
        if self.params.local == "window_linear":
            first = max(begin, t - self.params.window + 1)
        seen = {s: s for s in range(first, t + 1)}  # position: token
        if begin and context:
            seen[begin - context] = 0
            seen |= {s: s for s in range(begin - context + 1, begin)}
        key = [place_at(heads.key[n, token], at, tables) for at, token in seen.items()]
        distance = torch.tensor([t - at for at in seen]).double()
        return torch.stack(key), heads.value[n, list(seen.values())], distance


def naive_feature(x: Tensor, name: str = "elu1", weight: Tensor | None = None) -> Tensor:
    """Map one query or key (K) to features as the papers print it."""
    if name == "elu1":
        return F.elu(x) + 1
    if name == "hedgehog":
        projected = sum(x[k] * weight[k] for k in range(len(x)))
        return torch.cat([projected.exp(), (-projected).exp()])
    rectified = [c.clamp_min(0) for c in (*x, *-x)]
    return torch.stack([rectified[i] * rectified[i - 1] for i in range(len(rectified))])


def naive_average(weights: Tensor, value: Tensor) -> Tensor:
    """Average values (T V); zero where no weight is."""
    return weights @ value / weights.sum() if weights.sum() > 0 else 0 * weights @ value


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
