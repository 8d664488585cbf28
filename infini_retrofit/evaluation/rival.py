"""TODO."""

from dataclasses import dataclass

from transformers import PreTrainedModel

from infini_retrofit.layer.attention import InfiniAttention
from infini_retrofit.layer.form import InfiniParams
from infini_retrofit.model.retrofit import (
    BRANCH,
    attention_modules,
    attention_shape,
    infini_modules,
    insert_infini,
    state_bytes,
)


def carried_tokens(model: PreTrainedModel, params: InfiniParams) -> int:
    """Count the tokens whose keys and values, of all layers, take a retrofit's bytes or just more.

    At most a segment: what is carried comes from the segment before.
    """
    modules = attention_modules(model)
    base_shape = attention_shape(model.config)
    shapes = [m.shape if isinstance(m, InfiniAttention) else base_shape for m in modules]
    token_bytes = sum(shape.context_token_bytes() for shape in shapes)
    return min(-(-state_bytes(model, params) // token_bytes), params.segment_length)


def make_rival(model: PreTrainedModel, num_tokens: int, segment_length: int) -> None:
    """Turn a model into its equal-bytes rival, in place.

    The rival has no memory and no parallel branch. Every layer carries keys and values into the
    next segment; its own attention and weights stay what they are.

    Args:
        model: a base or retrofitted model.
        num_tokens: that are carried, see `carried_tokens`.
        segment_length: tokens.
    """
    modules = attention_modules(model)
    for module in modules:
        if hasattr(module, BRANCH):
            delattr(module, BRANCH)
    others = [i for i, m in enumerate(modules) if not isinstance(m, InfiniAttention)]
    plain = InfiniParams(layers=others, memory="off", segment_length=segment_length)
    insert_infini(model, plain)
    for module in infini_modules(model).values():
        module.drop_memory()
        module.local_context = num_tokens


@dataclass(frozen=True, kw_only=True)
class Rival:
    """What every model is confined to, and what a rival of equal bytes may carry across borders.

    The bytes are a retrofit's; the keys and values they buy are of all layers.
    """

    segment_length: int  # tokens
    num_tokens: int  # carried; 0: the retrofit carries nothing


def rival_of(model: PreTrainedModel, infini: InfiniParams) -> Rival:
    """Say what a model's rival may carry with the bytes of a retrofit.

    Args:
        model: a base or retrofitted model.
        infini: the form of the retrofit.
    """
    return Rival(segment_length=infini.segment_length, num_tokens=carried_tokens(model, infini))
