"""Put Infini layers into a pretrained model.

Knows nothing of training, files, texts or protocols.
"""

import copy

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from infini_retrofit.layer.attention import InfiniAttention
from infini_retrofit.layer.form import AttentionShape, InfiniParams
from infini_retrofit.model.families import PROJECTIONS, decoder_layers, family_of

# The attribute of the base's attention that holds a parallel branch.
BRANCH = "infini"


def attention_modules(model: PreTrainedModel) -> list[nn.Module]:
    """Return the attention module of each layer: the base's or an Infini one."""
    name = family_of(model.config).attention
    return [getattr(layer, name) for layer in decoder_layers(model)]


def infini_modules(model: PreTrainedModel) -> dict[int, InfiniAttention]:
    """Return the Infini attention modules by layer index, branches included."""
    found = {}
    for index, module in enumerate(attention_modules(model)):
        module = getattr(module, BRANCH, module)
        if isinstance(module, InfiniAttention):
            found[index] = module
    return found


def has_memory(model: PreTrainedModel) -> bool:
    """Return whether any layer of a base or retrofitted model has a memory."""
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
    """Turn `infini.layers` into sorted indices from 0."""
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
    """Refuse layers and sizes that do not fit a base."""
    resolve_layers(params.layers, config.num_hidden_layers)
    params.count_features(attention_shape(config).of_heads(params.heads).head_dim)


def state_bytes(model: PreTrainedModel, params: InfiniParams | None = None) -> int:
    """Count the bytes that cross a segment border, for one document.

    With `params`, count those of a base in which this form would be inserted.
    """
    if params is not None:
        with torch.device("meta"):
            model = type(model)(copy.deepcopy(model.config))
            insert_infini(model, params)
    return sum(module.state_bytes for module in infini_modules(model).values())


def insert_infini(model: PreTrainedModel, params: InfiniParams, seed: int = 0) -> None:
    """Replace the attention of chosen layers by `InfiniAttention`, or add it beside.

    `model.generate` recomputes the prompt at each step until `enable_generation` adds a cache.
    The seed is that of weights that start at random.

    Raises:
        ValueError: if `params.layers` or a size does not fit the model.
    """
    family, shape = family_of(model.config), attention_shape(model.config)
    layers = decoder_layers(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for index in resolve_layers(params.layers, len(layers)):
            layer = layers[index]
            base = getattr(layer, family.attention)
            infini = InfiniAttention(shape, params, index)
            if params.init == "base":
                infini.load_state_dict(family.split(base), strict=False)
            if params.whole_layers:
                layer.apply(_randomise)
            parameter = next(base.parameters())
            infini.to(device=parameter.device)
            for name in PROJECTIONS:
                getattr(infini, name).to(dtype=parameter.dtype)
            if params.insertion == "parallel":
                put_beside(base, infini)
            else:
                setattr(layer, family.attention, infini)
            layer.train(model.training)
    # The caches of `transformers` hold no memory; `enable_generation` adds one that does.
    model.generation_config.use_cache = False


def put_beside(base: nn.Module, branch: InfiniAttention) -> None:
    """Add a parallel branch to an attention module, in place."""
    base.add_module(BRANCH, branch)
    base.register_forward_hook(_add_branch, with_kwargs=True)


def _add_branch(base: nn.Module, args: tuple, kwargs: dict, output: tuple) -> tuple:
    """Add the output of the branch to that of the base's attention."""
    branch = getattr(base, BRANCH, None)
    if branch is None:
        return output
    return (output[0] + branch(*args, **kwargs)[0].to(output[0].dtype), *output[1:])


def _randomise(module: nn.Module) -> None:
    """Restart a module with torch's own initialisation, norms with ones."""
    if hasattr(module, "reset_parameters"):
        module.reset_parameters()
    elif "weight" in module._parameters:
        nn.init.ones_(module.weight)


def without_memory(params: InfiniParams, local_context: int = 0) -> InfiniParams:
    """Return the form of the base's own attention in the same layers and segments.

    The other fields of `params` are ignored, so that retrofits which differ in their memory share
    a control.
    """
    return InfiniParams(
        layers=params.layers,
        memory="off",
        segment_length=params.segment_length,
        local_context=local_context,
        bptt_segments=params.bptt_segments if local_context else "all",
    )
