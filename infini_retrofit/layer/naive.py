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
from infini_retrofit.layer.memory import UNIT_RULES

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
    log_decay: Tensor | float = 0.0  # of what was written before, under gated_delta


class NaiveLayer:
    """An Infini layer by its weights and the form that it should have."""

    def __init__(self, layer: InfiniAttention, params: InfiniParams) -> None:
        self.layer, self.params, self.memory = layer, params, layer.memory
        # Whole segments among the carried tokens are not in the memory yet.
        length = params.segment_length
        self.late = layer.local_context // length * length
        self.num_kv_heads = layer.shape.num_kv_heads
        self.group = layer.shape.num_heads // self.num_kv_heads

    def __call__(
        self,
        hidden_states: Tensor,
        tables: Tables | None,
        memory_of: Tensor | None = None,
        embeddings: Tensor | None = None,
        seen: Tensor | None = None,
    ) -> Tensor:
        """Compute the output (T D) of one document (T D), whose tokens have `embeddings` (T D).

        It reads the memory of the document `memory_of` (T D); None: its own. Queries and keys are
        made of `seen` (T D), which `key_layer` attends with; None: of the document.
        """
        heads = self.project(hidden_states, embeddings, seen)
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
        numerator, denominator = self.read(feature, entries, n, t - self.late)
        if self.params.update_rule in UNIT_RULES:
            return local + torch.sigmoid(self.gate(query, h)) * numerator
        if denominator == 0:  # an empty memory: exactly the local attention
            return local
        recalled = numerator / denominator  # eq. 7
        if self.params.seed_scaling:
            recalled = recalled / self.params.segment_length
        at_border = self.read(feature, entries, n, begin - self.late)[1]
        faded = torch.log(denominator / at_border)  # 0 unless features forget
        share = torch.sigmoid(self.gate(query, h) + faded)
        return share * recalled + (1 - share) * local

    def gate(self, query: Tensor, h: int) -> Tensor:
        """Return the logit of the memory's share in one query's output."""
        logit = self.layer.gate_logit[h]
        if self.memory.query_gate is not None:
            logit = logit + query @ self.memory.query_gate[h] / len(query) ** 0.5
        return logit

    def write(self, heads: Heads, n: int) -> dict[int, list[Entry]]:
        """Return the memory of one head that each segment reads, by the segment's first token.

        All tokens of a segment are written together, when it leaves what queries attend to: eq. 8;
        under a delta rule eq. 9.
        """
        entries: list[Entry] = []
        memories: dict[int, list[Entry]] = {}
        length, num_tokens = self.params.segment_length, heads.key.shape[1]
        for begin in range(0, num_tokens, length):
            memories[begin] = list(entries)
            for t in range(begin, min(begin + length, num_tokens)):
                feature, mass = self.written_key(heads, n, t), 1.0
                is_cache = self.params.update_rule == "neural_cache"
                if is_cache and not feature.any():  # no slot for a token that has no key
                    continue
                value = heads.value[n, t]
                if self.params.update_rule == "gated_delta":
                    entries.append(self.gated_entry(heads, entries, n, t))
                    continue
                if self.params.update_rule in ("delta", "delta_gamma"):
                    numerator, denominator = self.read(feature, memories[begin], n, begin)
                    if denominator > 0:
                        value = value - numerator / denominator
                        if self.params.update_rule == "delta_gamma":
                            mass = (1 - denominator / (feature @ feature)).clamp(0, 1)
                entries.append(Entry(feature, value, mass, t))
        return {begin: memories[max(begin - self.late, 0)] for begin in memories}

    def written_key(self, heads: Heads, n: int, t: int) -> Tensor:
        """Return the feature under which a token's value is written."""
        if self.params.memory_key == "own":
            return self.feature(heads.key[n, t], n, "key")
        before = self.feature(heads.key[n, max(t - 1, 0)], n, "key")
        return before if t % self.params.segment_length else torch.zeros_like(before)

    def gated_entry(self, heads: Heads, entries: list[Entry], n: int, t: int) -> Entry:
        """Return what one token writes under the gated delta rule, given all before it."""
        gates = self.memory.write_gate(heads.key[:, t].flatten())
        strength, log_decay = torch.sigmoid(gates[n]), -F.softplus(gates[self.num_kv_heads + n])
        feature = self.written_key(heads, n, t)
        known = self.read(feature, entries, n, t)[0] * log_decay.exp()
        return Entry(feature, strength * (heads.value[n, t] - known), 1.0, t, log_decay)

    def read(self, feature: Tensor, entries: list[Entry], n: int, at: int) -> Tables:
        """Return numerator (V) and denominator of eq. 7 for one feature at a position."""
        if self.params.update_rule == "neural_cache":
            return self.match(feature, entries[-self.params.num_slots :], n)
        numerator = feature.new_zeros(self.layer.shape.head_dim)
        denominator = feature.new_zeros(())
        age = feature.new_zeros(())  # of entries, from the last to the first
        for entry in reversed(entries):
            likeness = feature * entry.feature
            likeness, age = likeness * torch.exp(age), age + entry.log_decay
            if self.memory.decay_logit is not None:
                rate = self.memory.decay_logit[n].exp()
                likeness = likeness * torch.exp(-rate * (at - 1 - entry.token))
            likeness = likeness.sum()
            numerator = numerator + likeness * entry.value
            denominator = denominator + likeness * entry.mass
        return numerator, denominator

    def match(self, feature: Tensor, entries: list[Entry], n: int) -> Tables:
        """Return the softmax over a neural cache's tokens, and the sum of its weights."""
        numerator = feature.new_zeros(self.layer.shape.head_dim)
        denominator = self.memory.floor[n].exp()
        for entry in entries:
            likeness = torch.exp(self.memory.sharpness[n] * (feature @ entry.feature))
            numerator, denominator = numerator + likeness * entry.value, denominator + likeness
        return numerator / denominator, 1 - self.memory.floor[n].exp() / denominator

    def attend_locally(
        self, heads: Heads, tables: Tables | None, h: int, t: int, begin: int
    ) -> Tensor:
        """Attend with one query to its segment up to itself, and to the carried context."""
        if self.params.local == "none":
            return torch.zeros_like(heads.query[h, t])
        key, value, distance = self.visible(heads, tables, h // self.group, begin, t)
        query = place_at(heads.query[h, t], t, tables)
        if self.params.local == "linear":
            query = self.feature(query, h, "query")
            weights = [query @ self.feature(k, h // self.group, "key") for k in key]
            return naive_average(torch.stack(weights), value)
        scaling = self.layer.shape.scaling or len(query) ** -0.5
        scores = (key @ query) * scaling
        if self.params.positions == "alibi":
            scores = scores - 2.0 ** (-8 * (h + 1) / len(heads.query)) * distance
        return naive_average(scores.exp(), value)

    def visible(
        self, heads: Heads, tables: Tables | None, n: int, begin: int, t: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return keys, values and distances of the tokens that a query attends to.

        Carried are the last tokens before the segment; the first of them gives its place to the
        document's first token.
        """
        context = self.params.local_context
        token_at = {position: position for position in range(max(begin - context, 0), t + 1)}
        if context and begin >= context:
            token_at[begin - context] = 0
        key = [place_at(heads.key[n, token], at, tables) for at, token in token_at.items()]
        distance = torch.tensor([t - at for at in token_at]).double()
        window = slice(-(self.layer.shape.window or len(key)), None)
        value = heads.value[n, list(token_at.values())]
        return torch.stack(key)[window], value[window], distance[window]

    def feature(self, x: Tensor, head: int, of: str) -> Tensor:
        """Map one query or key (K) of a head to features (F)."""
        weight = getattr(self.layer.feature_maps, f"{of}_weight")
        if weight is None:
            return F.elu(x) + 1
        projected = sum(x[k] * weight[head, k] for k in range(len(x)))
        if self.params.feature_map == "unit":
            return projected / projected.norm()
        return torch.cat([projected.exp(), (-projected).exp()])

    def project(
        self, hidden_states: Tensor, embeddings: Tensor | None = None, seen: Tensor | None = None
    ) -> Heads:
        """Project hidden states (T D), one head after another."""
        size, shape = self.layer.shape.head_dim, self.layer.shape

        def heads_of(linear: torch.nn.Linear, x: Tensor, num_heads: int) -> Tensor:
            heads = []
            for h in range(num_heads):
                rows = slice(h * size, (h + 1) * size)
                bias = 0 if linear.bias is None else linear.bias[rows]
                heads.append(x @ linear.weight[rows].T + bias)
            return torch.stack(heads)

        of_embedding = self.params.memory_value == "embedding"
        valued = embeddings if of_embedding else hidden_states
        seen = hidden_states if seen is None else seen
        query = heads_of(self.layer.q_proj, seen, shape.num_heads)
        key = heads_of(self.layer.k_proj, seen, shape.num_kv_heads)
        value = heads_of(self.layer.v_proj, valued, shape.num_kv_heads)
        if (limit := shape.clip) is not None:
            query, key, value = (x.clamp(-limit, limit) for x in (query, key, value))
        query, key = self.normed(self.layer.q_norm, query), self.normed(self.layer.k_norm, key)
        return Heads(query, key, value)

    def normed(self, norm: torch.nn.Module | None, heads: Tensor) -> Tensor:
        """Norm queries or keys (H T K): each head alone, or all of a token."""
        if norm is None or self.layer.shape.norms == "head":
            return heads if norm is None else norm(heads)
        tokens = [norm(torch.cat(list(token))) for token in heads.transpose(0, 1)]
        return torch.stack([token.view(len(heads), -1) for token in tokens], dim=1)


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
