"""The form of Infini-attention: section `infini` of params.yaml, and sizes.

Knows nothing of how any of it is computed.
"""

from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args, get_origin

from infini_retrofit.layer.feature_maps import FEATURES_PER_CHANNEL, FeatureMapName
from infini_retrofit.layer.memory import UNIT_RULES, UpdateRule

# A deployed model keeps keys and values in a 16-bit type.
BYTES_PER_CONTEXT_VALUE = 2
BYTES_PER_ID = 4  # of a token
_MOST_TOKENS = 2**24  # of a segment: the keys of a layer then fill gigabytes
StateDtype = Literal["float32", "bfloat16"]
BYTES_PER_STATE_VALUE: dict[StateDtype, int] = {"float32": 4, "bfloat16": 2}


def slot_bytes(num_features: int, state_dtype: StateDtype) -> int:
    """Count the bytes of one slot of a neural cache: a key, and an id as int32."""
    return num_features * BYTES_PER_STATE_VALUE[state_dtype] + BYTES_PER_ID


@dataclass(frozen=True, kw_only=True)
class InfiniParams:
    """Section `infini` of params.yaml: which layers, and in what form.

    The defaults are Infini-attention as published, on the base's weights, in every layer.
    """

    layers: list[int] | Literal["all"] = "all"  # decoder layers, negative from the end; []: none
    # replace the base's attention; or add alpha * an attention, alpha * a whole decoder layer
    insertion: Literal["replace", "parallel", "adapter"] = "replace"
    init: Literal["base", "random_attention", "random_layer"] = "base"  # what starts at random
    # attention inside a segment; none: of a parallel branch that is a memory and nothing else
    local: Literal["softmax", "linear", "none"] = "softmax"
    positions: Literal["rope", "alibi", "none"] = "rope"  # encoding of the local attention
    heads: Literal["base", "single"] = "base"  # as many as the base has, or one of full width
    memory: Literal["on", "off"] = "on"
    memory_layers: list[int] | Literal["all"] = "all"  # of `layers`: those with a memory
    update_rule: UpdateRule = "linear"
    # The key that a value is written under: its token's, or that of the token before it, so that
    # a query like that key recalls what came next.
    memory_key: Literal["own", "before"] = "own"
    # The decoder layer whose attention's input queries and keys are projections of, as a share of
    # all layers; own: the memory's. The last ones know what comes next, and little of the words
    # that it follows.
    key_layer: float | Literal["own"] = "own"
    # What is written: a projection of the layer's hidden state, or of the token's embedding.
    memory_value: Literal["hidden", "embedding"] = "hidden"
    num_slots: int = 0  # tokens that a neural_cache keeps: a key and an id each
    feature_map: FeatureMapName = "elu1"
    # of a learnable map, a head; base: hedgehog has two a channel, unit one
    num_features: int | Literal["base"] = "base"
    seed_scaling: bool = False  # the seeds' mistake: recalled / segment_length
    gate: Literal["head", "query"] = "head"  # query: each query moves its head's share, learnable
    decay: Literal["none", "feature"] = "none"  # feature: each forgets at a learnable rate
    state_dtype: StateDtype = "float32"  # in which the memory crosses a border
    bptt_segments: int | Literal["all"] = "all"  # segments between borders that stop gradients
    segment_length: int = 256  # tokens
    # Tokens of keys and values carried over, the document's first included. Whole segments among
    # them are written to the memory when they leave: nothing is counted twice.
    local_context: int = 0

    @classmethod
    def read(cls, values: Any, file: str, advice: str) -> "InfiniParams":
        """Build the form that a file holds: every field, and no other.

        `advice` is the way out, for errors.

        Raises:
            ValueError: if a field is missing, unknown or of another type, or has a wrong value.
        """
        if not isinstance(values, dict):
            raise ValueError(f"infini of {file} must be a mapping, got {values!r}: {advice}")
        for name in sorted({field.name for field in fields(cls)} ^ values.keys()):
            fault = "unknown" if name in values else "missing"
            raise ValueError(f"infini.{name} of {file} is {fault}: {advice}")
        try:
            return cls(**values)
        except ValueError as error:
            raise ValueError(f"{file}: {error}: {advice}") from error

    def __post_init__(self) -> None:
        """Refuse values that no base model could make sense of."""
        for field in fields(self):
            value = getattr(self, field.name)
            if not _is_of(value, field.type):
                wanted = _in_words(field.type)
                raise ValueError(f"infini.{field.name} must be {wanted}, got {value!r}")
        self._check_sizes()
        self._check_combinations()
        self._check_rule()

    def _check_sizes(self) -> None:
        length = self.segment_length
        if length < 3:
            raise ValueError(
                "infini.segment_length must be at least 3 tokens, or the protocol t2 has none to "
                f"score, got {length}"
            )
        if length > _MOST_TOKENS:
            raise ValueError(
                f"infini.segment_length must be at most {_MOST_TOKENS:,} tokens, got {length:,}"
            )
        is_cache = self.update_rule == "neural_cache"
        if not is_cache <= self.num_slots <= _MOST_TOKENS * is_cache:
            raise ValueError(
                f"infini.num_slots must be in 1..{_MOST_TOKENS:,} when infini.update_rule is "
                f"neural_cache, and else 0, got {self.num_slots:,} with {self.update_rule}"
            )
        if not 0 <= self.local_context <= _MOST_TOKENS:
            raise ValueError(
                f"infini.local_context must be in 0..{_MOST_TOKENS:,} tokens, "
                f"got {self.local_context:,}"
            )
        if self.num_features != "base" and (self.num_features < 2 or self.num_features % 2):
            raise ValueError(
                "infini.num_features must be base or an even number from 2 on, "
                f"got {self.num_features}"
            )
        if self.key_layer != "own" and not 0 <= self.key_layer < 1:
            raise ValueError(
                "infini.key_layer must be own or a share of the layers in 0..1, below 1, "
                f"got {self.key_layer}"
            )
        if self.bptt_segments != "all" and self.bptt_segments < 1:
            raise ValueError(
                f"infini.bptt_segments must be all or at least 1, got {self.bptt_segments}"
            )

    def _check_combinations(self) -> None:
        if self.heads == "single" and (self.init == "base" or self.positions == "rope"):
            raise ValueError(
                "infini.heads must be base when infini.init is base or infini.positions is rope "
                "(neither the base's weights nor its rotations fit a single head), got single"
            )
        if self.insertion == "parallel" and self.init == "random_layer":
            raise ValueError(
                "infini.init must be base or random_attention when infini.insertion is parallel, "
                "which adds an attention and no layer, got random_layer"
            )
        if self.num_features != "base" and self.feature_map == "elu1":
            raise ValueError(
                "infini.num_features must be base when infini.feature_map is elu1, which has one "
                f"feature a channel, got {self.num_features}"
            )
        if self.local == "none" and (self.insertion, self.memory) != ("parallel", "on"):
            raise ValueError(
                "infini.local must be softmax or linear unless infini.insertion is parallel and "
                f"infini.memory is on, got none with {self.insertion} and {self.memory}"
            )
        chosen = (self.memory_key, self.key_layer, self.memory_value)
        what_came_next = chosen != ("own", "own", "hidden")
        if what_came_next and (self.local, self.heads) != ("none", "single"):
            raise ValueError(
                "infini.memory_key and infini.key_layer must be own and infini.memory_value hidden "
                "unless infini.local is none and infini.heads single: other projections are those "
                f"of the local attention too, got {', '.join(map(str, chosen))}"
            )
        if self.local == "linear" and self.positions == "alibi":
            raise ValueError(
                "infini.positions must be rope or none when infini.local is linear, which has no "
                "scores for ALiBi to add to, got alibi"
            )

    def _check_rule(self) -> None:
        if (self.update_rule in UNIT_RULES) != (self.feature_map == "unit"):
            raise ValueError(
                "infini.feature_map must be unit when infini.update_rule is gated_delta or "
                f"neural_cache, and then only, got {self.feature_map} with {self.update_rule}"
            )
        if self.update_rule == "neural_cache" and self.memory_value != "embedding":
            raise ValueError(
                "infini.memory_value must be embedding when infini.update_rule is neural_cache, "
                f"which keeps ids of tokens, got {self.memory_value}"
            )
        if self.local == "linear" and self.feature_map == "unit":
            raise ValueError(
                "infini.local must be softmax when infini.feature_map is unit, whose products may "
                "be negative, got linear"
            )
        if self.update_rule != "linear" and self.decay != "none":
            raise ValueError(
                "infini.decay must be none unless infini.update_rule is linear: a delta rule must "
                "read back exactly what it wrote, and a neural_cache forgets by slots, got "
                f"{self.decay}"
            )
        if self.update_rule != "linear" and self.seed_scaling:
            raise ValueError(
                f"infini.seed_scaling must be false when infini.update_rule is {self.update_rule}: "
                "only a plain read of sums can be too small by the segment length, got true"
            )

    def count_features(self, head_dim: int) -> int:
        """Return the number of features of a query or key, if heads have so many."""
        most = FEATURES_PER_CHANNEL[self.feature_map] * head_dim
        if self.num_features == "base":
            return most
        if self.num_features > most:
            raise ValueError(
                f"infini.num_features must be at most {most} for heads of {head_dim} channels, "
                f"got {self.num_features}"
            )
        return self.num_features

    @property
    def whole_layers(self) -> bool:
        """Whether the base's own MLP and norms start at random, and must train too."""
        return self.init == "random_layer" and self.insertion == "replace"

    @property
    def stop_gradient_every(self) -> int | None:
        """Segments between two borders that stop gradients; None: no border does."""
        return None if self.bptt_segments == "all" else self.bptt_segments

    @property
    def has_memory(self) -> bool:
        """Whether any layer has a memory."""
        return self.memory == "on" and [] not in (self.layers, self.memory_layers)


def _is_of(value: Any, kind: Any) -> bool:
    """Return whether a value is of the type of a field of `InfiniParams`."""
    if get_origin(kind) is Literal:
        return isinstance(value, str) and value in get_args(kind)
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_is_of(x, *get_args(kind)) for x in value)
    if isinstance(kind, type):
        return type(value) is kind  # a bool is an int, but no number of tokens
    return any(_is_of(value, choice) for choice in get_args(kind))


def _in_words(kind: Any) -> str:
    """Return the values of the type of a field of `InfiniParams`."""
    names: dict[Any, str] = {int: "a whole number", float: "a share", bool: "true or false"}
    names[list[int]] = "a list of whole numbers"
    if kind in names or isinstance(kind, str):
        return names.get(kind, kind)
    return " or ".join(_in_words(choice) for choice in get_args(kind))


@dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """Sizes of one attention module, and what it does beside projecting and attending."""

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    qkv_bias: bool
    o_bias: bool
    scaling: float | None = None  # of scores; None: 1 / sqrt(head_dim)
    norms: Literal["none", "head", "all"] = "none"  # of queries and keys: by head, or all heads
    clip: float | None = None  # largest size of a projected value; None: any
    window: int | None = None  # tokens that a query sees, its own among them; None: all
    rotates: bool = True  # whether RoPE turns queries and keys

    def of_heads(self, heads: Literal["base", "single"]) -> "AttentionShape":
        """Return this shape, or the seeds' form: one head of full width, no biases."""
        if heads == "base":
            return self
        one = {"num_heads": 1, "num_kv_heads": 1, "head_dim": self.hidden_size}
        return replace(self, **one, qkv_bias=False, o_bias=False, scaling=None, norms="none")

    def context_token_bytes(self) -> int:
        """Count the bytes of one carried token's keys and values."""
        return 2 * self.num_kv_heads * self.head_dim * BYTES_PER_CONTEXT_VALUE
