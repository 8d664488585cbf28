"""The model families that can be retrofitted: their layers and their weights.

Sizes, biases, scale, norms, window and rotations are read from a base's own attention. Add a
family: one entry of `FAMILIES`. Knows nothing of Infini layers.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from infini_retrofit.layer.form import AttentionShape
from infini_retrofit.model.keywords import hand_on

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
NORMS = ("q_norm", "k_norm")
# Prefix of the model type of an exported model.
EXPORTED = "infini_"
_OTHER_NAMES = {"dense": "o_proj", "q_layernorm": "q_norm", "k_layernorm": "k_norm"}


def _split_by_name(attention: nn.Module) -> dict[str, Tensor]:
    """Name the weights of a module that keeps its projections apart."""
    weights = {}
    for name, value in attention.state_dict().items():
        first, dot, rest = name.partition(".")
        ours = _OTHER_NAMES.get(first, first)
        if ours in (*PROJECTIONS, *NORMS):
            weights[ours + dot + rest] = value
    return weights


def _split_neox(attention: nn.Module) -> dict[str, Tensor]:
    """Split GPT-NeoX's fused projection: rows by head, in each q, then k, then v."""
    parts = {}
    for name, fused in attention.query_key_value.state_dict().items():
        by_head = fused.unflatten(0, (-1, 3, attention.head_size))
        for index, projection in enumerate(PROJECTIONS[:3]):
            parts[f"{projection}.{name}"] = by_head[:, index].flatten(0, 1)
    dense = attention.dense.state_dict()
    return parts | {f"o_proj.{name}": value for name, value in dense.items()}


def _split_phi3(attention: nn.Module) -> dict[str, Tensor]:
    """Split Phi-3's fused projection: the rows of all q, then all k, then all v."""
    size, fused = attention.head_dim, attention.qkv_proj.weight.detach()
    num_kv = attention.num_key_value_heads * size
    parts = fused.split([len(fused) - 2 * num_kv, num_kv, num_kv])
    weights = {f"{name}.weight": part for name, part in zip(PROJECTIONS, parts, strict=False)}
    return weights | {"o_proj.weight": attention.o_proj.weight.detach()}


@dataclass(frozen=True)
class Family:
    """How one family of models differs from another."""

    attention: str = "self_attn"  # name of the attention module in a decoder layer
    # Its weights by the names of `PROJECTIONS` and `NORMS`.
    split: Callable[[nn.Module], dict[str, Tensor]] = _split_by_name
    has_window: bool = False  # whether its attention heeds `sliding_window`
    clips: bool = False  # whether its attention heeds `clip_qkv`
    drops_keywords: bool = False  # whether a decoder layer keeps keywords from its attention
    scales_logits: bool = False  # whether its head divides by `logits_scaling`

    def put(self, layer: nn.Module, attention: nn.Module) -> None:
        """Make a module the attention of a decoder layer, in place."""
        setattr(layer, self.attention, attention)
        if self.drops_keywords:
            hand_on(layer, attention)

    def norms(self, attention: nn.Module) -> dict[str, nn.Module]:
        """Return the modules that norm queries and keys, by the names of `NORMS`."""
        named = {_OTHER_NAMES.get(name, name): x for name, x in attention.named_children()}
        return {name: named[name] for name in NORMS if name in named}

    def shape(self, attention: nn.Module) -> AttentionShape:
        """Read sizes and all else that a base's attention does from the module."""
        weights, config = self.split(attention), attention.config
        query, key = weights["q_proj.weight"], weights["k_proj.weight"]
        head_dim = getattr(attention, "head_dim", None) or attention.head_size
        widths = [len(x) for name, x in weights.items() if name.startswith("q_norm.")]
        norms = "all" if len(query) in widths else "head" if widths else "none"
        window = None
        if self.has_window:
            of_all_layers = getattr(config, "sliding_window", None)
            window = getattr(attention, "sliding_window", of_all_layers)
        return AttentionShape(
            hidden_size=query.shape[1],
            num_heads=len(query) // head_dim,
            num_kv_heads=len(key) // head_dim,
            head_dim=head_dim,
            qkv_bias="q_proj.bias" in weights,
            o_bias="o_proj.bias" in weights,
            scaling=attention.scaling,
            norms=norms,
            clip=config.clip_qkv if self.clips else None,
            window=window,
            rotates=bool(getattr(attention, "use_rope", True)),
        )


FAMILIES = {
    "gemma": Family(),
    "gpt_neox": Family("attention", _split_neox),
    "granite": Family(scales_logits=True),
    "llama": Family(),
    "mistral": Family(has_window=True),
    "olmo": Family(clips=True),
    "olmo2": Family(),
    "phi": Family(),
    "phi3": Family(split=_split_phi3, has_window=True),
    "qwen2": Family(has_window=True),
    "qwen3": Family(has_window=True),
    "smollm3": Family(has_window=True),
    "stablelm": Family(drops_keywords=True),
    "starcoder2": Family(has_window=True),
}


def check_family(family: object, source: object, advice: str = "") -> None:
    """Refuse a family without a retrofit; `advice` is the way out, for errors.

    Raises:
        ValueError: names the families that there are.
    """
    if family not in list(FAMILIES):  # a list, for what a file holds may have no hash
        choices = ", ".join(sorted(FAMILIES))
        raise ValueError(f"the family of {source} must be one of {choices}, got {family!r}{advice}")


def family_of(config: PretrainedConfig) -> Family:
    """Return the family of a base, or of the exported form of a model made from one.

    Raises:
        ValueError: if it has no retrofit.
    """
    name = config.model_type.removeprefix(EXPORTED)
    check_family(name, "the model")
    return FAMILIES[name]


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """Return the decoder layers of a model, or of its body."""
    return model.base_model.layers
