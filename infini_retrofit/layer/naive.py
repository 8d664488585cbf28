"""Infini-attention in every form, as loops over tokens: start reading here.

Slow, one document at a time, and without a state: each query sums anew over every token that was
ever written. `attention` computes the same numbers fast, and the tests compare both, gradients
too. Shares no code with the fast path but the weights of a layer.

Source: Munkhdalai et al. 2024, arXiv:2404.07143v2, section 2.1.

Axes:
    T  token of a document
    D  model width
    H  query head
    N  key/value head; query head h uses key/value head h // (H / N)
    K  key channel
    F  feature of a query or key
    V  value channel
    P  rotated channel, the first P of K
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from infini_retrofit.layer.attention import InfiniAttention
from infini_retrofit.layer.form import InfiniParams

# Cosines and sines, (T P) each; or numerator and denominator of an average.
Tables = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Heads:
    """Queries (H T K), keys (N T K) and values (N T V) of a document, not rotated."""

    query: Tensor
    key: Tensor
    value: Tensor


@dataclass(frozen=True)
class Entry:
    """One token in the memory of one head."""

    feature: Tensor  # of its key, (F)
    value: Tensor  # (V), under a delta rule less what the memory recalled for its key
    mass: Tensor | float  # weight of its key in the normalizer
    token: int  # its position in the document


class NaiveLayer:
    """An Infini layer by its weights and the form that it should have."""

    def __init__(self, layer: InfiniAttention, params: InfiniParams) -> None:
        self.layer, self.params, self.memory = layer, params, layer.memory
        self.group = layer.shape.num_heads // layer.shape.num_kv_heads

    def __call__(
        self, hidden_states: Tensor, tables: Tables | None, memory_of: Tensor | None = None
    ) -> Tensor:
        """Compute the output (T D) of one document (T D).

        It reads the memory of the document `memory_of` (T D); None: its own.
        """
        heads = self.project(hidden_states)
        owner = heads if memory_of is None else self.project(memory_of)
        rows = []
        for h in range(len(heads.query)):
            memories = self.write(owner, h // self.group) if self.memory is not None else {}
            tokens = range(len(hidden_states))
            rows.append(torch.stack([self.attend(heads, tables, memories, h, t) for t in tokens]))
        return self.layer.o_proj(torch.cat(rows, dim=-1))

    def attend(
        self, heads: Heads, tables: Tables | None, memories: dict[int, list[Entry]], h: int, t: int
    ) -> Tensor:
        """Compute the output (V) of one head for one token (eq. 10)."""
        n = h // self.group
        begin = t // self.params.segment_length * self.params.segment_length
        local = self.attend_locally(heads, tables, h, t, begin)
        if not memories:
            return local
        query, entries = heads.query[h, t], memories[begin]
        feature = self.feature(query, h, "query")
        numerator, denominator = self.read(feature, entries, n, t)
        if denominator == 0:  # an empty memory: exactly the local attention
            return local
        recalled = numerator / denominator  # eq. 7
        if self.params.seed_scaling:
            recalled = recalled / self.params.segment_length
        logit = self.layer.gate_logit[h]
        at_border = self.read(feature, entries, n, begin)[1]
        logit = logit + torch.log(denominator / at_border)  # 0 unless features forget
        if self.memory.query_gate is not None:
            logit = logit + query @ self.memory.query_gate[h] / len(query) ** 0.5
        share = torch.sigmoid(logit)
        return share * recalled + (1 - share) * local

    def write(self, heads: Heads, n: int) -> dict[int, list[Entry]]:
        """Return the memory of one head before each segment, by the segment's first token.

        All tokens of a segment are written at its end: eq. 8; under a delta rule eq. 9.
        """
        entries: list[Entry] = []
        memories = {}
        length, num_tokens = self.params.segment_length, heads.key.shape[1]
        for begin in range(0, num_tokens, length):
            memories[begin] = list(entries)
            for t in range(begin, min(begin + length, num_tokens)):
                feature, mass = self.feature(heads.key[n, t], n, "key"), 1.0
                value = heads.value[n, t]
                if self.params.update_rule != "linear":
                    numerator, denominator = self.read(feature, memories[begin], n, begin)
                    if denominator > 0:
                        value = value - numerator / denominator
                        if self.params.update_rule == "delta_gamma":
                            mass = (1 - denominator / (feature @ feature)).clamp(0, 1)
                entries.append(Entry(feature, value, mass, t))
        return memories

    def read(self, feature: Tensor, entries: list[Entry], n: int, at: int) -> Tables:
        """Return numerator (V) and denominator of eq. 7 for one feature at a position."""
        numerator = feature.new_zeros(self.layer.shape.head_dim)
        denominator = feature.new_zeros(())
        for entry in entries:
            likeness = feature * entry.feature
            if self.memory.decay_logit is not None:
                rate = self.memory.decay_logit[n].exp()
                likeness = likeness * torch.exp(-rate * (at - 1 - entry.token))
            likeness = likeness.sum()
            numerator = numerator + likeness * entry.value
            denominator = denominator + likeness * entry.mass
        return numerator, denominator

    def attend_locally(
        self, heads: Heads, tables: Tables | None, h: int, t: int, begin: int
    ) -> Tensor:
        """Attend with one query to its segment up to itself, and to the carried context."""
        key, value, distance = self.visible(heads, tables, h // self.group, begin, t)
        query = place_at(heads.query[h, t], t, tables)
        if self.params.local == "linear":
            query = self.feature(query, h, "query")
            weights = [query @ self.feature(k, h // self.group, "key") for k in key]
            return naive_average(torch.stack(weights), value)
        scores = (key @ query) / len(query) ** 0.5
        if self.params.positions == "alibi":
            scores = scores - 2.0 ** (-8 * (h + 1) / len(heads.query)) * distance
        return naive_average(scores.exp(), value)

    def visible(
        self, heads: Heads, tables: Tables | None, n: int, begin: int, t: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return keys, values and distances of the tokens that a query attends to.

        Carried are the last tokens of the segment before, and the document's first token in the
        place of the one before them.
        """
        context = self.params.local_context
        token_at = {position: position for position in range(begin, t + 1)}
        if begin and context:
            token_at[begin - context] = 0
            token_at |= {s: s for s in range(begin - context + 1, begin)}
        key = [place_at(heads.key[n, token], at, tables) for at, token in token_at.items()]
        distance = torch.tensor([t - at for at in token_at]).double()
        return torch.stack(key), heads.value[n, list(token_at.values())], distance

    def feature(self, x: Tensor, head: int, of: str) -> Tensor:
        """Map one query or key (K) of a head to features (F)."""
        weight = getattr(self.layer.feature_maps, f"{of}_weight")
        if weight is None:
            return F.elu(x) + 1
        projected = sum(x[k] * weight[head, k] for k in range(len(x)))  # Hedgehog
        return torch.cat([projected.exp(), (-projected).exp()])

    def project(self, hidden_states: Tensor) -> Heads:
        """Project hidden states (T D), one head after another."""
        size, shape = self.layer.shape.head_dim, self.layer.shape

        def heads_of(linear: torch.nn.Linear, num_heads: int) -> Tensor:
            heads = []
            for h in range(num_heads):
                rows = slice(h * size, (h + 1) * size)
                bias = 0 if linear.bias is None else linear.bias[rows]
                heads.append(hidden_states @ linear.weight[rows].T + bias)
            return torch.stack(heads)

        return Heads(
            heads_of(self.layer.q_proj, shape.num_heads),
            heads_of(self.layer.k_proj, shape.num_kv_heads),
            heads_of(self.layer.v_proj, shape.num_kv_heads),
        )


def naive_average(weights: Tensor, value: Tensor) -> Tensor:
    """Average values (T V); zero where no weight is."""
    return weights @ value / weights.sum() if weights.sum() > 0 else 0 * weights @ value


def place_at(x: Tensor, position: int, tables: Tables | None) -> Tensor:
    """Rotate one vector (K) by the position of its token, if there are positions.

    Channels (c, c + P/2) turn as a point of the plane; channels from P on stay.
    """
    if tables is None:
        return x
    cos, sin = (table[position] for table in tables)
    half = len(cos) // 2
    channels = list(x)
    for c in range(half):
        a, b = x[c], x[c + half]
        channels[c] = a * cos[c] - b * sin[c]
        channels[c + half] = b * cos[c] + a * sin[c]
    return torch.stack(channels)
