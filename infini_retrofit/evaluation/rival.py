"""Rivals of equal bytes: models that carry keys and values instead of a memory.

Knows nothing of how models are scored.
"""

import copy
from dataclasses import dataclass, field, replace

from transformers import PreTrainedModel

from infini_retrofit.evaluation.selected import SelectedAttention
from infini_retrofit.layer.attention import InfiniAttention
from infini_retrofit.layer.form import InfiniParams
from infini_retrofit.model.families import decoder_layers, family_of
from infini_retrofit.model.retrofit import (
    BRANCH,
    attention_modules,
    attention_shapes,
    infini_modules,
    insert_infini,
    resolve_layers,
    state_bytes,
)


@dataclass(frozen=True, kw_only=True)
class Rival:
    """How many tokens' keys and values a rival carries from segment to segment.

    The retrofit's own window, without its memory, is that of the base.
    """

    segment_length: int  # tokens
    num_tokens: int  # carried in all layers; 0: the retrofit carries nothing
    local_context: int = 0  # tokens that the retrofit carries beside its memory
    layers: list[int] = field(default_factory=list)  # that carry them

    @property
    def num_selected(self) -> int:
        """Count the tokens that a rival with the retrofit's window can keep behind it."""
        return max(self.num_tokens - self.local_context, 0)


def rival_of(model: PreTrainedModel, infini: InfiniParams) -> Rival:
    """Return the rival that takes the bytes of a retrofit, rounded up to whole tokens.

    The model is a base or a retrofit of the form `infini`.
    """
    num_tokens = -(-state_bytes(model, infini) // state_token_bytes(model))
    num_layers = model.config.num_hidden_layers
    layers = resolve_layers(infini.layers, num_layers) if infini.local_context else []
    return Rival(
        segment_length=infini.segment_length,
        num_tokens=num_tokens,
        local_context=infini.local_context,
        layers=layers,
    )


def state_token_bytes(model: PreTrainedModel) -> int:
    """Count the bytes of one token's keys and values in all layers."""
    return sum(shape.context_token_bytes() for shape in attention_shapes(model))


def make_windowed(model: PreTrainedModel, rival: Rival) -> PreTrainedModel:
    """Return a base that carries a retrofit's `local_context`; any other model as it is."""
    if not rival.layers or infini_modules(model):
        return model
    made = _share(model)
    window = InfiniParams(
        layers=rival.layers,
        memory="off",
        segment_length=rival.segment_length,
        local_context=rival.local_context,
    )
    insert_infini(made, window)
    return made


def make_rival(model: PreTrainedModel, rival: Rival) -> PreTrainedModel:
    """Return a model's rival; the base or retrofitted model itself stays as it is.

    The rival has no memory and no branch. Every layer carries keys and values into the
    next segment; its attention stays what it is. The two models share their weights, but the
    base's own attention is copied.
    """
    made = _share(model)
    modules = attention_modules(made)
    for module in (*modules, *decoder_layers(made)):
        if hasattr(module, BRANCH):
            delattr(module, BRANCH)
    others = [i for i, m in enumerate(modules) if not isinstance(m, InfiniAttention)]
    plain = InfiniParams(
        layers=others,
        memory="off",
        segment_length=rival.segment_length,
        local_context=rival.num_tokens,
    )
    insert_infini(made, plain)
    for module in infini_modules(made).values():
        module.drop_memory()
        module.local_context = rival.num_tokens
    return made


def make_selected(model: PreTrainedModel, rival: Rival) -> PreTrainedModel:
    """Return a base's or control's rival that keeps selected tokens behind its window."""
    window = min(rival.local_context, rival.num_tokens)
    made = make_rival(model, replace(rival, num_tokens=window))
    family = family_of(made.config)
    for layer in decoder_layers(made):
        own = getattr(layer, family.attention)
        family.put(layer, SelectedAttention(own, rival.num_selected))
    return made


def _share(model: PreTrainedModel) -> PreTrainedModel:
    """Copy a model's modules, which share its weights."""
    weights = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, weights)
