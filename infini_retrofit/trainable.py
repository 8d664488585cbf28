"""Which parameters of a retrofitted model train, and in which groups of a learning rate.

Knows nothing of rates, losses and adapters.
"""

from collections.abc import Iterable
from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from infini_retrofit.attention import InfiniAttention
from infini_retrofit.families import decoder_layers
from infini_retrofit.retrofit import attention_modules, infini_modules

Part = Literal["memory", "infini", "attention", "all"]
OF_MEMORY = ("gate", "alpha", "memory")
GROUPS = (*OF_MEMORY, "infini", "rest")


def set_trainable(
    model: PreTrainedModel,
    part: Part,
    whole_layers: bool = False,
    frozen_dtype: torch.dtype | None = None,
) -> dict[str, list[nn.Parameter]]:
    """Freeze all but one part of the model, whose parameters become float32.

    Load the model in float32 and name the dtype of the rest, so that what trains starts from
    unrounded weights.

    Args:
        model: a retrofitted model.
        part: `memory`: what the Infini attention has and a base's has not; `infini`: all of the
            Infini attention; `attention`: the attention of every layer; `all`.
        whole_layers: let `infini` mean the MLP and norms of the Infini layers as well.
        frozen_dtype: of what does not train; None: as it is.

    Returns:
        The trainable parameters in groups: `gate` (what needs a rate in logits), `alpha`,
        `memory` (what else a base has no counterpart of), `infini` and `rest`.
    """
    infini = infini_modules(model)
    owners = [decoder_layers(model)[i] if whole_layers else infini[i] for i in infini]
    group_of = _groups_by_id(owners, infini.values())
    chosen = {
        "memory": owners,
        "infini": owners,
        "attention": attention_modules(model) + owners,
        "all": [model],
    }[part]
    groups: dict[str, list[nn.Parameter]] = {name: [] for name in GROUPS}
    model.requires_grad_(False)
    parameters = {id(p): p for module in chosen for p in module.parameters()}
    for key, parameter in parameters.items():
        group = group_of.get(key, "rest")
        if part != "memory" or group in OF_MEMORY:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
            groups[group].append(parameter)
    if frozen_dtype is not None:
        for parameter in model.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(frozen_dtype)
    return groups


def _groups_by_id(owners: Iterable[nn.Module], infini: Iterable[InfiniAttention]) -> dict[int, str]:
    """Return the group of every parameter that is not one of the rest, by its id."""
    group_of = {id(p): "infini" for owner in owners for p in owner.parameters()}
    for module in infini:
        for name, parameters in module.memory_parameters().items():
            group_of |= {id(p): name for p in parameters}
    return group_of
