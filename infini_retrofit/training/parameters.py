"""Which parameters of a model train, in groups that share a learning rate; LoRA adapters.

Knows nothing of rates and losses.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from pydantic import Field
from torch import nn
from transformers import PreTrainedModel

from infini_retrofit.model.families import PROJECTIONS, decoder_layers
from infini_retrofit.model.retrofit import BRANCH, alphas, attention_modules, infini_modules

if TYPE_CHECKING:
    from peft.tuners.lora import LoraModel

Part = Literal["memory", "infini", "attention", "all"]
OF_MEMORY = ("gate", "alpha", "memory")
GROUPS = (*OF_MEMORY, "infini", "rest")
# GPT-NeoX and Phi-3 project to queries, keys and values at once.
ADAPTED = (*PROJECTIONS, "query_key_value", "qkv_proj", "dense")


def set_trainable(
    model: PreTrainedModel,
    part: Part,
    whole_layers: bool = False,
    frozen_dtype: torch.dtype | None = None,
) -> dict[str, list[nn.Parameter]]:
    """Freeze all but one part of a retrofitted model; what trains becomes float32.

    Load the model in float32 and name the dtype of the rest, so that what trains starts from
    unrounded weights.

    Args:
        model: a retrofitted model, a control or a base.
        part: `memory`: what an Infini attention has and a base's has not; `infini`: the whole
            Infini attention or adapter; `attention`: that of every layer too; `all`.
        whole_layers: whether `infini` includes the MLP and norms of the base's Infini layers.
        frozen_dtype: of what does not train; None: as it is.

    Returns:
        The trainable parameters in groups: `gate` (gates, decay rates, the scales of a neural
        cache), `alpha` (of branches), `memory` (what else a base has no counterpart of), `infini`
        and `rest`.
    """
    infini = infini_modules(model)
    layers = decoder_layers(model)
    owners = [getattr(layers[i], BRANCH, layers[i] if whole_layers else infini[i]) for i in infini]
    group_of = {id(p): "infini" for owner in owners for p in owner.parameters()}
    for module in infini.values():
        for name, of_memory in module.memory_parameters().items():
            group_of |= {id(p): name for p in of_memory}
    group_of |= {id(p): "alpha" for p in alphas(model)}
    chosen = {"attention": attention_modules(model) + owners, "all": [model]}.get(part, owners)
    groups: dict[str, list[nn.Parameter]] = {name: [] for name in GROUPS}
    model.requires_grad_(False)
    parameters = {id(p): p for module in chosen for p in module.parameters()}
    for key, parameter in parameters.items():
        group = group_of.get(key, "rest")
        if part != "memory" or group in OF_MEMORY:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
            groups[group].append(parameter)
    _cast_frozen(model, frozen_dtype)
    return groups


@dataclass(frozen=True, kw_only=True)
class LoraParams:
    """Section `finetune.lora` of params.yaml."""

    rank: Annotated[int, Field(gt=0, le=4096)]
    alpha: Annotated[float, Field(ge=1e-6, le=1e6)]  # the adapters' scale is alpha / rank


def add_lora(
    model: PreTrainedModel, params: LoraParams, seed: int, frozen_dtype: torch.dtype | None = None
) -> tuple["LoraModel", dict[str, list[nn.Parameter]]]:
    """Put adapters that start as zero on all attention projections, in place.

    The arguments are those of `set_trainable`. What is adapted stays unrounded, because it is
    saved with the adapters merged. The seed is that of the half of each that starts at random.

    Returns:
        What merges the adapters into the weights, and all that trains, in the groups of
        `set_trainable`: adapters of Infini layers are in `infini`, others in `rest`.
    """
    from peft import LoraConfig  # here, for the other choices need no peft
    from peft.tuners.lora import LoraModel

    groups = set_trainable(model, "memory")
    attentions = [*attention_modules(model), *infini_modules(model).values()]
    inside = {id(m) for attention in attentions for m in attention.modules()}
    projections = {
        name: module
        for name, module in model.named_modules()
        if id(module) in inside and name.rpartition(".")[2] in ADAPTED
    }
    config = LoraConfig(r=params.rank, lora_alpha=params.alpha, target_modules=list(projections))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tuner = LoraModel(model, config, "default")
    for parameter in (p for group in groups.values() for p in group):
        parameter.requires_grad_(True)  # peft freezes all that is not its own
    adapted = {id(p) for module in projections.values() for p in module.parameters()}
    _cast_frozen(model, frozen_dtype, but=adapted)
    of_infini = {id(p) for m in infini_modules(model).values() for p in m.parameters()}
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            groups["infini" if id(parameter) in of_infini else "rest"].append(parameter)
    return tuner, groups


def _cast_frozen(
    model: nn.Module, dtype: torch.dtype | None, but: Iterable[int] = frozenset()
) -> None:
    """Give what does not train its dtype, but for parameters with these ids."""
    for parameter in model.parameters():
        if dtype is not None and not parameter.requires_grad and id(parameter) not in but:
            parameter.data = parameter.data.to(dtype)
