"""Put Infini layers into a pretrained model.

Knows nothing of training, files, texts or protocols.
"""

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from infini_retrofit.layer.attention import InfiniAttention
from infini_retrofit.layer.form import AttentionShape, InfiniParams
from infini_retrofit.model.families import PROJECTIONS, decoder_layers, family_of

# Name under which a parallel branch hangs below the base's attention, whose own names stay.
BRANCH = "infini"


def attention_modules(model: PreTrainedModel) -> list[nn.Module]:
    """Return each layer's attention module: the base's, maybe with a branch, or an Infini one."""
    name = family_of(model.config).attention
    return [getattr(layer, name) for layer in decoder_layers(model)]


def infini_modules(model: PreTrainedModel) -> dict[int, InfiniAttention]:
    """Return the Infini attention modules by layer index; none for a base model."""
    found = {}
    for index, module in enumerate(attention_modules(model)):
        module = getattr(module, BRANCH, module)
        if isinstance(module, InfiniAttention):
            found[index] = module
    return found


def has_memory(model: PreTrainedModel) -> bool:
    """Tell whether any layer of a base or retrofitted model remembers across segments."""
    return any(module.memory is not None for module in infini_modules(model).values())


def attention_shape(config: PretrainedConfig) -> AttentionShape:
    """Read the sizes of the base's attention."""
    head_dim = getattr(config, "head_dim", None)
    return AttentionShape(
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=getattr(config, "num_key_value_heads", config.num_attention_heads),
        head_dim=head_dim or config.hidden_size // config.num_attention_heads,
        qkv_bias=config.attention_bias,
        o_bias=config.attention_bias,
    )


def resolve_layers(layers: list[int] | str, num_layers: int) -> list[int]:
    """Turn `infini.layers` into sorted indices from 0.

    Raises:
        ValueError: if an index is out of range or named twice.
    """
    if layers == "all":
        return list(range(num_layers))
    for index in layers:
        if not -num_layers <= index < num_layers:
            raise ValueError(
                f"infini.layers must be in {-num_layers}..{num_layers - 1} "
                f"for a base of {num_layers} layers, got {index}"
            )
    resolved = sorted(index % num_layers for index in layers)
    if len(set(resolved)) < len(resolved):
        raise ValueError(f"infini.layers must name each layer once, got {list(layers)}")
    return resolved


def check_form(params: InfiniParams, config: PretrainedConfig) -> None:
    """Refuse layers and sizes that do not fit a base.

    Raises:
        ValueError: if there are any.
    """
    resolve_layers(params.layers, config.num_hidden_layers)
    params.count_features(attention_shape(config).of_heads(params.heads).head_dim)


def border_bytes(model: PreTrainedModel) -> int:
    """Count the bytes that cross a segment border in a retrofitted model, for one document."""
    return sum(module.border_bytes for module in infini_modules(model).values())


def state_bytes(model: PreTrainedModel, params: InfiniParams) -> int:
    """Count the bytes that would cross a segment border in a base with such layers in it."""
    num_layers = len(resolve_layers(params.layers, len(decoder_layers(model))))
    shape = attention_shape(model.config).of_heads(params.heads)
    num_features = params.count_features(shape.head_dim) if params.has_memory else 0
    return num_layers * shape.border_bytes(params.local_context, num_features, params.state_dtype)


def insert_infini(model: PreTrainedModel, params: InfiniParams, seed: int = 0) -> None:
    """Put `InfiniAttention` in the place of the chosen layers' attention, or beside it.

    `model.generate` then computes every step anew, until `enable_generation` gives it a cache.

    Args:
        model: a base model, changed in place.
        params: which layers, and in what form.
        seed: of the weights that start at random.

    Raises:
        ValueError: if a layer index is out of range.
    """
    family = family_of(model.config)
    shape = attention_shape(model.config)
    layers = decoder_layers(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for index in resolve_layers(params.layers, len(layers)):
            layer = layers[index]
            base = getattr(layer, family.attention)
            infini = InfiniAttention(shape, params, index)
            if params.init == "base":
                infini.load_state_dict(family.split(base), strict=False)
            infini.start_memory()
            if params.whole_layers:
                layer.apply(_randomise)
            parameter = next(base.parameters())
            infini.to(device=parameter.device)
            for projection in (getattr(infini, name) for name in PROJECTIONS):
                projection.to(dtype=parameter.dtype)
            if params.insertion == "parallel":
                put_beside(base, infini)
            else:
                setattr(layer, family.attention, infini)
            layer.train(model.training)
    # The caches of `transformers` know no segments; `enable_generation` brings one that does.
    model.generation_config.use_cache = False


def put_beside(base: nn.Module, branch: InfiniAttention) -> None:
    """Let a branch's output be added to that of an attention module."""
    base.add_module(BRANCH, branch)
    base.register_forward_hook(_add_branch, with_kwargs=True)


def _add_branch(base: nn.Module, args: tuple, kwargs: dict, output: tuple) -> tuple:
    """Add the branch's output to that of the base's attention, below which it hangs."""
    branch = getattr(base, BRANCH, None)
    if branch is None:
        return output
    return (output[0] + branch(*args, **kwargs)[0].to(output[0].dtype), *output[1:])


def _randomise(module: nn.Module) -> None:
    """Restart a module: torch's own initialisation; norms of either kind from ones."""
    if hasattr(module, "reset_parameters"):
        module.reset_parameters()
    elif "weight" in module._parameters:
        nn.init.ones_(module.weight)


def without_memory(params: InfiniParams, local_context: int = 0) -> InfiniParams:
    """Return the form in which the same layers are the base's own attention, confined.

    What else a form may be makes no difference to it: those of two retrofits of the same layers,
    segments and `local_context` are equal, unless gradients cross other borders.
    """
    return InfiniParams(
        layers=params.layers,
        memory="off",
        segment_length=params.segment_length,
        local_context=local_context,
        bptt_segments=params.bptt_segments if local_context else "all",
    )
