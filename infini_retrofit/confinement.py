"""Let the base's own attention see its segment only, as it did in training and scoring.

What is left to grow with a prompt is then nothing. Knows nothing of caches.
"""

import torch
from transformers import PreTrainedModel

from infini_retrofit.attention import InfiniAttention
from infini_retrofit.families import decoder_layers, family_of
from infini_retrofit.infini_params import InfiniParams
from infini_retrofit.retrofit import (
    BRANCH,
    attention_modules,
    attention_shape,
    put_beside,
    without_memory,
)


def confine_others(model: PreTrainedModel, params: InfiniParams) -> None:
    """Confine the attention of layers that are no Infini layers, and what stands beside a branch.

    It becomes an Infini attention without a memory: of the same weights, carrying nothing. Beside
    a branch its index is its layer's plus the number of layers, because the branch has that.

    Args:
        model: a retrofitted model, changed in place.
        params: how its layers were inserted.
    """
    family, shape = family_of(model.config), attention_shape(model.config)
    confined, layers = without_memory(params), decoder_layers(model)
    for index, base in enumerate(attention_modules(model)):
        if isinstance(base, InfiniAttention):
            continue
        branch, parameter = getattr(base, BRANCH, None), next(base.parameters())
        with torch.random.fork_rng(devices=[]):
            own = InfiniAttention(shape, confined, index + (branch is not None) * len(layers))
        own.load_state_dict(family.split(base))
        own.to(device=parameter.device, dtype=parameter.dtype)
        if branch is not None:
            put_beside(own, branch)
        setattr(layers[index], family.attention, own.train(base.training))
