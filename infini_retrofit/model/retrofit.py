"""Put Infini layers into a pretrained model.

Knows nothing of training, files, texts or protocols.
"""

import contextlib
import copy
import inspect
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from infini_retrofit.layer.attention import InfiniAttention
from infini_retrofit.layer.form import AttentionShape, InfiniParams
from infini_retrofit.model.families import PROJECTIONS, decoder_layers, family_of

# What holds a branch: an attention beside the base's, or an adapter beside its decoder layer.
BRANCH = "infini"
# Of a decoder layer or of an attention, which returns weights or None as well.
Output = Tensor | tuple


def attention_modules(model: PreTrainedModel) -> list[nn.Module]:
    """Return the attention module of each layer: the base's or an Infini one."""
    name = family_of(model.config).attention
    return [getattr(layer, name) for layer in decoder_layers(model)]


def infini_modules(model: PreTrainedModel) -> dict[int, InfiniAttention]:
    """Return the Infini attention modules by layer index, those of branches included."""
    name, found = family_of(model.config).attention, {}
    for index, layer in enumerate(decoder_layers(model)):
        module = getattr(getattr(layer, BRANCH, layer), name)
        module = getattr(module, BRANCH, module)
        if isinstance(module, InfiniAttention):
            found[index] = module
    return found


def alphas(model: PreTrainedModel) -> list[nn.Parameter]:
    """Return the factor of each branch."""
    return [p for name, p in model.named_parameters() if name.endswith(f".{BRANCH}.alpha")]


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


def resolve_layers(
    layers: list[int] | str, num_layers: int, name: str = "infini.layers"
) -> list[int]:
    """Turn `infini.layers` into sorted indices from 0."""
    if layers == "all":
        return list(range(num_layers))
    for index in layers:
        if not -num_layers <= index < num_layers:
            raise ValueError(
                f"{name} must be in {-num_layers}..{num_layers - 1} "
                f"for a base of {num_layers} layers, got {index}"
            )
    resolved = sorted(index % num_layers for index in layers)
    if len(set(resolved)) < len(resolved):
        raise ValueError(f"{name} must name each layer once, got {list(layers)}")
    return resolved


def memory_layers(params: InfiniParams, layers: list[int], num_layers: int) -> list[int]:
    """Turn `infini.memory_layers` into sorted indices from 0, all of them among `layers`."""
    if params.memory_layers == "all":
        return layers
    chosen = resolve_layers(params.memory_layers, num_layers, "infini.memory_layers")
    if others := set(chosen) - set(layers):
        raise ValueError(f"infini.memory_layers must be of infini.layers, got {min(others)}")
    return chosen


def check_form(params: InfiniParams, config: PretrainedConfig) -> None:
    """Refuse layers and sizes that do not fit a base."""
    layers = resolve_layers(params.layers, config.num_hidden_layers)
    memory_layers(params, layers, config.num_hidden_layers)
    params.count_features(attention_shape(config).of_heads(params.heads).head_dim)


def state_bytes(model: PreTrainedModel, params: InfiniParams | None = None) -> int:
    """Count the bytes that cross a segment border, for one document.

    With `params`, count those of a base in which this form would be inserted.
    """
    if params is not None:
        with torch.device("meta"):
            model = type(model)(copy.deepcopy(model.config))
            insert_infini(model, params)
    return sum(m.state_bytes for m in model.modules() if isinstance(m, InfiniAttention))


def insert_infini(model: PreTrainedModel, params: InfiniParams, seed: int = 0) -> None:
    """Replace the attention of chosen layers by `InfiniAttention`, or add a branch beside.

    `model.generate` recomputes the prompt at each step until `enable_generation` adds a cache.
    The seed is that of weights that start at random.

    Raises:
        ValueError: if `params.layers` or a size does not fit the model.
    """
    family, shape = family_of(model.config), attention_shape(model.config)
    layers = decoder_layers(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        chosen = resolve_layers(params.layers, len(layers))
        with_memory = memory_layers(params, chosen, len(layers))
        for index in chosen:
            own = layers[index]
            weights = family.split(getattr(own, family.attention))
            has_branch = params.local != "none" or index in with_memory
            if params.insertion == "parallel" and params.local_context:
                window = without_memory(params, params.local_context)
                confine(model, index, window, is_beside=has_branch)
            if not has_branch:
                continue
            layer = copy.deepcopy(own) if params.insertion == "adapter" else own
            base = getattr(layer, family.attention)
            memory = params.memory if index in with_memory else "off"
            infini = InfiniAttention(shape, replace(params, memory=memory), index)
            if params.init == "base":
                infini.load_state_dict(weights, strict=False)
            if params.init == "random_layer":
                layer.apply(_randomise)
            parameter = next(base.parameters())
            infini.to(device=parameter.device)
            for name in PROJECTIONS:
                getattr(infini, name).to(dtype=parameter.dtype)
            if params.insertion == "parallel":
                put_beside(base, infini)
            else:
                setattr(layer, family.attention, infini)
            if layer is not own:
                put_beside(own, layer)
            own.train(model.training)
    if params.memory_value == "embedding":
        model.base_model.register_forward_pre_hook(_give_embeddings, with_kwargs=True)
    # The caches of `transformers` hold no memory; `enable_generation` adds one that does.
    model.generation_config.use_cache = False


def confine(
    model: PreTrainedModel, index: int, params: InfiniParams, *, is_beside: bool
) -> InfiniAttention:
    """Make a layer's own attention an `InfiniAttention` of the same weights, without a memory.

    Beside a branch, which has the layer's index, its index is that plus the number of layers.
    """
    family, layers = family_of(model.config), decoder_layers(model)
    base = getattr(layers[index], family.attention)
    with torch.random.fork_rng(devices=[]):
        shape = attention_shape(model.config)
        own = InfiniAttention(shape, params, index + is_beside * len(layers))
    own.load_state_dict(family.split(base))
    parameter = next(base.parameters())
    own.to(device=parameter.device, dtype=parameter.dtype)
    setattr(layers[index], family.attention, own.train(base.training))
    return own


def put_beside(base: nn.Module, branch: nn.Module) -> None:
    """Add alpha * branch to the output of an attention or a decoder layer, in place.

    A branch that has no alpha yet gets one in float32, from zero.
    """
    if not hasattr(branch, "alpha"):
        branch.alpha = nn.Parameter(torch.zeros(1, device=next(branch.parameters()).device))
    base.add_module(BRANCH, branch)
    base.register_forward_hook(_add_branch, with_kwargs=True)


def _add_branch(base: nn.Module, args: tuple, kwargs: dict, output: Output) -> Output:
    """Add the output of the branch, if it is still there."""
    branch = getattr(base, BRANCH, None)
    if branch is None:
        return output
    added = branch(*args, **kwargs)
    with _in_place(branch):
        if isinstance(output, Tensor):
            return output + (branch.alpha.to(added.dtype) * added).to(output.dtype)
        added = branch.alpha.to(added[0].dtype) * added[0]
        return (output[0] + added.to(output[0].dtype), *output[1:])


def _in_place(module: nn.Module) -> contextlib.AbstractContextManager:
    """Bring the parameters of a module that accelerate has offloaded."""
    if not hasattr(module, "_hf_hook"):
        return contextlib.nullcontext()
    from accelerate.utils import align_module_device

    return align_module_device(module)


def _give_embeddings(
    body: nn.Module, args: tuple, kwargs: dict[str, Any]
) -> tuple[tuple, dict[str, Any]]:
    """Hand the embeddings of a forward pass's tokens to every layer, normed like its states."""
    given = inspect.signature(body.forward).bind_partial(*args, **kwargs).arguments
    embeddings = given.get("inputs_embeds")
    if embeddings is None:
        embeddings = body.get_input_embeddings()(given["input_ids"])
    return args, kwargs | {"embeddings": F.rms_norm(embeddings, embeddings.shape[-1:])}


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
