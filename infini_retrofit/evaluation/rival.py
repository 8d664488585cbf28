"""The equal-bytes rival: a model that carries keys and values instead of a memory.

Knows nothing of how models are scored.
"""

import copy
from dataclasses import dataclass

from transformers import PreTrainedModel

from infini_retrofit.layer.attention import InfiniAttention
from infini_retrofit.layer.form import InfiniParams
from infini_retrofit.model.families import decoder_layers
from infini_retrofit.model.retrofit import (
    BRANCH,
    attention_modules,
    attention_shape,
    infini_modules,
    insert_infini,
    state_bytes,
)


@dataclass(frozen=True, kw_only=True)
class Rival:
    """How many tokens' keys and values a rival carries from segment to segment."""

    segment_length: int  # tokens
    num_tokens: int  # carried in all layers; 0: the retrofit carries nothing


def rival_of(model: PreTrainedModel, infini: InfiniParams) -> Rival:
    """Return the rival that takes the bytes of a retrofit, rounded up to whole tokens.

    The model is a base or a retrofit of the form `infini`.
    """
    modules = attention_modules(model)
    base_shape = attention_shape(model.config)
    shapes = [m.shape if isinstance(m, InfiniAttention) else base_shape for m in modules]
    token_bytes = sum(shape.context_token_bytes() for shape in shapes)
    num_tokens = -(-state_bytes(model, infini) // token_bytes)
    return Rival(segment_length=infini.segment_length, num_tokens=num_tokens)


def make_rival(model: PreTrainedModel, rival: Rival) -> PreTrainedModel:
    """Return a model's rival; the base or retrofitted model itself stays as it is.

    The rival has no memory and no branch. Every layer carries keys and values into the
    next segment; its attention stays what it is. The two models share their weights, but the
    base's own attention is copied.
    """
    weights = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    made = copy.deepcopy(model, weights)
    modules = attention_modules(made)
    for module in (*modules, *decoder_layers(made)):
        if hasattr(module, BRANCH):
            delattr(module, BRANCH)
    others = [i for i, m in enumerate(modules) if not isinstance(m, InfiniAttention)]
    plain = InfiniParams(layers=others, memory="off", segment_length=rival.segment_length)
    insert_infini(made, plain)
    for module in infini_modules(made).values():
        module.drop_memory()
        module.local_context = rival.num_tokens
    return made
