"""The model families that can be retrofitted: their layers and their weights.

Add a family: one entry of `FAMILIES`. Knows nothing of Infini layers.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
# Prefix of the model type of an exported model.
EXPORTED = "infini_"


@dataclass(frozen=True)
class Family:
    """How one family of models differs from another."""

    attention: str  # name of the attention module in a decoder layer
    split: Callable[[nn.Module], dict[str, Tensor]]  # its weights by the names of `PROJECTIONS`


def _split_llama(attention: nn.Module) -> dict[str, Tensor]:
    return {k: v for k, v in attention.state_dict().items() if k.split(".")[0] in PROJECTIONS}


def _split_neox(attention: nn.Module) -> dict[str, Tensor]:
    """Split GPT-NeoX's fused projection: rows by head, in each q, then k, then v."""
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
    """Return the decoder layers of a model, or of its body."""
    return model.base_model.layers
