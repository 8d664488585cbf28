"""The families of models that can be retrofitted: where their layers are, how they keep weights.

Knows nothing of Infini layers.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
# What the model type of an exported model has before that of its base.
EXPORTED = "infini_"


@dataclass(frozen=True)
class Family:
    """What differs between families of models.

    Attributes:
        attention: name of the attention module in a decoder layer.
        split: its weights and biases as those of q_proj, k_proj, v_proj and o_proj.
    """

    attention: str
    split: Callable[[nn.Module], dict[str, Tensor]]


def _split_llama(attention: nn.Module) -> dict[str, Tensor]:
    return {k: v for k, v in attention.state_dict().items() if k.split(".")[0] in PROJECTIONS}


def _split_neox(attention: nn.Module) -> dict[str, Tensor]:
    """Take apart GPT-NeoX's fused projection, whose rows run head by head, then q, k, v."""
    parts = {}
    for name, fused in attention.query_key_value.state_dict().items():
        by_head = fused.unflatten(0, (-1, 3, attention.head_size))
        for index, projection in enumerate(PROJECTIONS[:3]):
            parts[f"{projection}.{name}"] = by_head[:, index].flatten(0, 1)
    dense = attention.dense.state_dict()
    return parts | {f"o_proj.{name}": value for name, value in dense.items()}


FAMILIES = {
    "gpt_neox": Family("attention", _split_neox),
    "llama": Family("self_attn", _split_llama),
}


def family_of(config: PretrainedConfig) -> Family:
    """Return the family of a base, or of the exported form of a model made from one."""
    return FAMILIES[config.model_type.removeprefix(EXPORTED)]


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """Return the model's decoder layers."""
    return model.base_model.layers
