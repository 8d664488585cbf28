"""Put Infini layers into a pretrained model.

Knows nothing of training, files, texts or protocols.
"""

import contextlib
import copy
import inspect
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from infini_retrofit.layer.attention import InfiniAttention, Noted
from infini_retrofit.layer.cut import Cut
from infini_retrofit.layer.form import AttentionShape, InfiniParams
from infini_retrofit.layer.state import State
from infini_retrofit.model.families import PROJECTIONS, Family, decoder_layers, family_of
from infini_retrofit.model.rotary import hold_tables

# What holds a branch: an attention beside the base's, or an adapter beside its decoder layer.
BRANCH = "infini"
# A retrofit is compared with its base on so many tokens, or a segment.
PROOF_TOKENS = 16
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


def attention_shapes(model: PreTrainedModel) -> list[AttentionShape]:
    """Return the sizes of each layer's attention: the base's or an Infini one."""
    family = family_of(model.config)
    return [
        module.shape if isinstance(module, InfiniAttention) else family.shape(module)
        for module in attention_modules(model)
    ]


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


def key_layer(params: InfiniParams, memory_layers: list[int], num_layers: int) -> int | None:
    """Turn `infini.key_layer` into an index from 0, not after a layer with a memory.

    None: each memory's own, or there is no memory.
    """
    if params.key_layer == "own" or not memory_layers:
        return None
    index = int(round(params.key_layer * num_layers, 6))  # 0.29 of 100 is 29
    if index > min(memory_layers):
        raise ValueError(
            "infini.key_layer must not come after a layer of infini.memory_layers, got layer "
            f"{index} for a memory in layer {min(memory_layers)}"
        )
    return index


def check_form(params: InfiniParams, base: PreTrainedModel) -> None:
    """Refuse layers and sizes that do not fit a base."""
    shapes = attention_shapes(base)
    layers = resolve_layers(params.layers, len(shapes))
    key_layer(params, memory_layers(params, layers, len(shapes)), len(shapes))
    params.count_features(shapes[0].of_heads(params.heads).head_dim)
    hold_tables(base, params, len(layers))


def state_bytes(model: PreTrainedModel, params: InfiniParams | None = None) -> int:
    """Count the bytes that cross a segment border, for one document.

    With `params`, count those of a base in which this form would be inserted.
    """
    if params is not None:
        model = _sizes_of(model, params)
    return sum(m.state_bytes for m in model.modules() if isinstance(m, InfiniAttention))


def branch_token_bytes(model: PreTrainedModel, params: InfiniParams | None = None) -> int:
    """Count the bytes that branches keep of each token until its segment ends.

    These are keys and values in 16 bits, or a token's id; the base's own are not among them.
    `params` as in `state_bytes`.
    """
    if params is not None:
        model = _sizes_of(model, params)
    return sum(
        module.open_token_bytes
        for name, module in model.named_modules()
        if isinstance(module, InfiniAttention) and BRANCH in name.split(".")
    )


def _sizes_of(model: PreTrainedModel, params: InfiniParams) -> PreTrainedModel:
    """Return a model without numbers, of a base's sizes and with a form inserted."""
    with torch.device("meta"):
        made = type(model)(copy.deepcopy(model.config))
        insert_infini(made, params)
    return made


def insert_infini(model: PreTrainedModel, params: InfiniParams, seed: int = 0) -> None:
    """Replace the attention of chosen layers by `InfiniAttention`, or add a branch beside.

    `model.generate` recomputes the prompt at each step until `enable_generation` adds a cache.
    The seed is that of weights that start at random.

    Raises:
        ValueError: if `params.layers` or a size does not fit the model, or the model's family has
            no retrofit, or a retrofit that should start as its base does not.
    """
    family, layers = family_of(model.config), decoder_layers(model)
    chosen = resolve_layers(params.layers, len(layers))
    with_memory = memory_layers(params, chosen, len(layers))
    noting = key_layer(params, with_memory, len(layers))
    hold_tables(model, params, len(chosen))
    want = _short_run(model, params, State())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for index in chosen:
            own = layers[index]
            source = getattr(own, family.attention)
            has_branch = params.local != "none" or index in with_memory
            if params.insertion == "parallel" and params.local_context:
                window = without_memory(params, params.local_context)
                confine(model, index, window, is_beside=has_branch)
            if not has_branch:
                continue
            layer = copy.deepcopy(own) if params.insertion == "adapter" else own
            base = getattr(layer, family.attention)
            memory = params.memory if index in with_memory else "off"
            infini = _like(source, family, replace(params, memory=memory), index)
            if params.init == "random_layer":
                layer.apply(_randomise)
            if params.insertion == "parallel":
                put_beside(base, infini)
            family.put(layer, base if params.insertion == "parallel" else infini)
            if layer is not own:
                put_beside(own, layer)
            own.train(model.training)
    if with_memory:
        _hand_over(model, params, noting)
    if want is not None:
        state = State()
        _compare(_short_run(model, params, state), want, model)
        modules = [m for m in model.modules() if isinstance(m, InfiniAttention)]
        assert state.after.keys() >= {m.layer_index for m in modules}, "keywords were dropped"
    # The caches of `transformers` hold no memory; `enable_generation` adds one that does.
    model.generation_config.use_cache = False


def _hand_over(model: PreTrainedModel, params: InfiniParams, noting: int | None) -> None:
    """Give memories what their own layer is not given: states of the layer `noting`, tokens."""
    family, body = family_of(model.config), model.base_model
    if noting is not None:
        layer = decoder_layers(model)[noting]
        attention = getattr(layer, family.attention)
        family.put(layer, attention)
        attention.register_forward_pre_hook(_note, with_kwargs=True)
        body.register_forward_pre_hook(_give_noted, with_kwargs=True)
    if params.update_rule == "neural_cache":
        body.register_forward_pre_hook(_give_tokens, with_kwargs=True)
    elif params.memory_value == "embedding":
        body.register_forward_pre_hook(_give_embeddings, with_kwargs=True)


def _like(base: nn.Module, family: Family, params: InfiniParams, index: int) -> InfiniAttention:
    """Make an Infini attention of a base's sizes, and with `init: base` of all its weights."""
    infini, weights = InfiniAttention(family.shape(base), params, index), family.split(base)
    own = [x for name, x in base.state_dict().items() if not name.startswith(f"{BRANCH}.")]
    found, wanted = (sum(x.numel() for x in tensors) for tensors in (weights.values(), own))
    if found != wanted:
        raise ValueError(
            f"the base's attention must have {found:,} weights, which a retrofit takes over, got "
            f"{wanted:,}: its family does other things in this version of transformers"
        )
    if infini.shape.norms != "none":
        for name, norm in family.norms(base).items():
            setattr(infini, name, copy.deepcopy(norm))
    if params.init == "base":
        strange = infini.load_state_dict(weights, strict=False).unexpected_keys
        assert not strange, strange
    elif infini.q_norm is not None:
        infini.q_norm.apply(_randomise)
        infini.k_norm.apply(_randomise)
    parameter = next(base.parameters())
    infini.to(device=parameter.device)
    for name in PROJECTIONS:
        getattr(infini, name).to(dtype=parameter.dtype)
    return infini


@torch.no_grad()
def _short_run(model: PreTrainedModel, params: InfiniParams, state: State) -> Tensor | None:
    """Return a model's hidden states of a segment's first tokens.

    None where a retrofit may start otherwise than its base, and where there are no weights.
    """
    is_the_base = (params.init, params.local, params.positions) == ("base", "softmax", "rope")
    starts_equal = is_the_base or params.insertion != "replace"
    if not starts_equal or any(x.is_meta for x in model.parameters()):
        return None
    modes = {module: module.training for module in model.modules()}
    num_tokens = min(params.segment_length, PROOF_TOKENS)
    ids = torch.arange(num_tokens, device=model.device) * 7919 % model.config.vocab_size
    body, how = model.eval().base_model, {"use_cache": False, "cut": Cut(), "state": state}
    hidden_states = body(ids[None], **how)[0]
    for module, mode in modes.items():
        module.training = mode
    return hidden_states.float()


def _compare(got: Tensor, want: Tensor, model: PreTrainedModel) -> None:
    """Refuse a retrofit that does not start as its base."""
    is_narrow = any(x.element_size() < 4 for x in model.parameters())
    most = 0.1 if is_narrow else 1e-3
    difference = ((got - want).norm() / want.norm()).item()
    if not difference <= most:
        raise ValueError(
            "a retrofit must start as its base, got hidden states that differ by "
            f"{difference:.1g} of their size in one segment: this {model.config.model_type} does "
            "something that its family does not do"
        )


def confine(
    model: PreTrainedModel, index: int, params: InfiniParams, *, is_beside: bool
) -> InfiniAttention:
    """Make a layer's own attention an `InfiniAttention` of the same weights, without a memory.

    Beside a branch, which has the layer's index, its index is that plus the number of layers.
    """
    family, layers = family_of(model.config), decoder_layers(model)
    base = getattr(layers[index], family.attention)
    with torch.random.fork_rng(devices=[]):
        own = _like(base, family, params, index + is_beside * len(layers))
    family.put(layers[index], own.train(base.training))
    if _note in base._forward_pre_hooks.values():
        own.register_forward_pre_hook(_note, with_kwargs=True)
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


def _give_noted(
    body: nn.Module, args: tuple, kwargs: dict[str, Any]
) -> tuple[tuple, dict[str, Any]]:
    """Hand every layer of a forward pass the place where one of them notes its states."""
    return args, kwargs | {"noted": Noted()}


def _note(attention: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Note what a layer attends with, for the keys of a later one."""
    noted = kwargs["noted"]
    noted.hidden_states = args[0] if args else kwargs["hidden_states"]
    noted.has_graph = torch.is_grad_enabled()


def _give_embeddings(
    body: nn.Module, args: tuple, kwargs: dict[str, Any]
) -> tuple[tuple, dict[str, Any]]:
    """Hand the embeddings of a forward pass's tokens to every layer, normed like its states."""
    given = inspect.signature(body.forward).bind_partial(*args, **kwargs).arguments
    embeddings = given.get("inputs_embeds")
    if embeddings is None:
        embeddings = body.get_input_embeddings()(given["input_ids"])
    return args, kwargs | {"embeddings": _normed(embeddings)}


def _give_tokens(
    body: nn.Module, args: tuple, kwargs: dict[str, Any]
) -> tuple[tuple, dict[str, Any]]:
    """Hand the ids of a forward pass's tokens to every layer, and what embeds ids."""
    given = inspect.signature(body.forward).bind_partial(*args, **kwargs).arguments
    if (ids := given.get("input_ids")) is None:
        raise ValueError(
            "input_ids must be given to a model whose memory keeps them (infini.update_rule: "
            "neural_cache), got embeddings alone"
        )
    return args, kwargs | {"token_ids": ids, "embed": partial(_embed, body)}


def _embed(body: nn.Module, ids: Int[Tensor, "*B"]) -> Float[Tensor, "*B D"]:
    return _normed(body.get_input_embeddings()(ids))


def _normed(embeddings: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
    return F.rms_norm(embeddings, embeddings.shape[-1:])


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
