"""Generate with an `InfiniCache`, and read long texts into one.

Call `enable_generation` once, after the weights are loaded (a model class calls it at the end of
its constructor). Then `generate` and forward passes with `use_cache=True` work as with any model
of `transformers`, and padding (a 2-D `attention_mask`) reaches the memory with or without a cache.
A forward pass that is given a `cut` stays as it is. Rows that hold several documents, whose
positions start again at each, run as one row a document, without a cache. For beams, or several
answers to one prompt, `generate` repeats the rows of a filled cache in place.

Axes:
    B  row of the batch
    T  token
"""

import functools
import inspect
from collections.abc import Iterator
from dataclasses import asdict
from types import MethodType
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import Cache, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.generation import GenerationMode

from infini_retrofit.generation.cache import PREPARE, InfiniCache, check_enabled
from infini_retrofit.generation.packing import find_documents
from infini_retrofit.generation.versions import CACHE, CACHE_NAMES, unproven
from infini_retrofit.layer.attention import InfiniAttention
from infini_retrofit.layer.cut import Cut
from infini_retrofit.layer.form import InfiniParams
from infini_retrofit.layer.probe import Probe
from infini_retrofit.layer.state import State
from infini_retrofit.model.families import decoder_layers
from infini_retrofit.model.retrofit import (
    BRANCH,
    attention_modules,
    confine,
    infini_modules,
    put_beside,
    without_memory,
)

# Of transformers' GenerationMixin.
_MAKE_MASK = "_prepare_attention_mask_for_generation"
_MAKE_INPUTS = "prepare_inputs_for_generation"


def enable_generation(
    model: PreTrainedModel, params: InfiniParams, other_layers: str | None = None
) -> None:
    """Make a model generate with an `InfiniCache`, in place.

    `other_layers` is the reach of the base's own attention. `segment`: its segment, as in training
    and scoring; the cache is bounded for any prompt. `full`: everything; the cache grows. None:
    `model.config.other_layers`, or `segment`.

    With `segment` the names of confined attention's weights change where a base fuses its
    projections (GPT-NeoX): save a retrofit before this, or the whole model after it.

    Raises:
        ValueError: if `other_layers` is neither, or `full` and the layers are confined already or
            none is an Infini layer, or this version of `transformers` would lose the cache.
    """
    has_name = CACHE in inspect.signature(model.base_model.forward).parameters
    methods = (PREPARE, _MAKE_MASK, _MAKE_INPUTS)
    if not has_name or not all(hasattr(model, name) for name in methods):
        raise ValueError(unproven("would not hand a cache from one token to the next"))
    if other_layers is None:
        other_layers = getattr(model.config, "other_layers", "segment")
    if other_layers not in ("segment", "full"):
        raise ValueError(f"other_layers must be full or segment, got {other_layers!r}")
    is_enabled = PREPARE in vars(model)
    is_confined = is_enabled and model.config.other_layers == "segment"
    if other_layers == "full" and (is_confined or not infini_modules(model)):
        raise ValueError(
            "other_layers must be segment for a model that is confined already (load it again) or "
            "has no Infini layers (use the base), got 'full'"
        )
    model.config.other_layers, model.config.infini = other_layers, asdict(params)
    if other_layers == "segment":
        _confine_others(model, params)
    if not is_enabled:
        model.generation_config.use_cache = True
        setattr(model, PREPARE, MethodType(_prepare_cache, model))
        setattr(model, _MAKE_MASK, MethodType(_make_mask, model))
        setattr(model, _MAKE_INPUTS, MethodType(_make_inputs, model))
        model.base_model.register_forward_pre_hook(_open, with_kwargs=True)
        model.base_model.register_forward_hook(_close, with_kwargs=True)


def read(
    model: PreTrainedModel, input_ids: Int[Tensor, "B T"], cache: InfiniCache, num_segments: int = 4
) -> Iterator[int]:
    """Read texts of equal length into a cache, a few segments in each forward pass.

    Yields:
        The number of tokens of each text in the last forward pass; it runs when asked for.
    """
    check_enabled(model)
    probe = writing_only(model)
    for part in input_ids.split(num_segments * segment_length(model), dim=1):
        with torch.no_grad():
            if model.device.type != "meta":  # offloaded: accelerate moves what is read
                part = part.to(model.device)
            model.base_model(input_ids=part, use_cache=True, probe=probe, **{CACHE: cache})
        yield part.shape[1]


def writing_only(model: PreTrainedModel) -> Probe:
    """Return what spares a forward pass the last layer's attention, where only a cache is filled.

    A memory beside the last layer is then not read either; what is written is the same.
    """
    last = decoder_layers(model)[-1].modules()
    return Probe(unread=[m.layer_index for m in last if isinstance(m, InfiniAttention)])


def segment_length(model: PreTrainedModel) -> int:
    """Return the segment length of a model that generates with an `InfiniCache`."""
    return next(iter(infini_modules(model).values())).segment_length


def _open(body: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Add `cut` and `state` to a forward pass of the model's body."""
    if kwargs.get("cut") is not None:
        return args, kwargs
    if args:
        kwargs = dict(**inspect.signature(body.forward).bind_partial(*args).arguments, **kwargs)
    ids = kwargs.get("input_ids")
    num_rows, num_columns = (kwargs["inputs_embeds"] if ids is None else ids).shape[:2]
    cache, uses_cache, state = _take_cache(kwargs), kwargs.get("use_cache"), None
    num_seen = 0 if cache is None else cache.num_seen
    is_token = _padding(kwargs.get("attention_mask"), num_seen, num_columns)
    if (has_ended := kwargs.pop("has_ended", None)) is not None:
        is_token = ~has_ended[:, None] if is_token is None else is_token & ~has_ended[:, None]
    packing = find_documents(kwargs, is_token, (num_rows, num_columns), cache is not None)
    if packing is not None:
        kwargs, is_token = packing.unpack(kwargs), packing.is_token
    elif cache is not None or (body.config.use_cache if uses_cache is None else uses_cache):
        if kwargs.get("position_ids") is not None:
            _check_positions(kwargs, is_token, cache)
        cache = InfiniCache(body) if cache is None else cache
        cache.check_rows(num_rows)
        state = State(before=cache.layer_states)
    cut = Cut(is_open=cache is not None, is_token=is_token)
    if all(isinstance(module, InfiniAttention) for module in attention_modules(body)):
        # transformers takes a mask of four axes as it is, and builds none.
        kwargs["attention_mask"] = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    return (), kwargs | {CACHE: cache, "cut": cut, "state": state, "packing": packing}


def _close(body: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    """Keep the state in the cache, which must be the one that the body returns."""
    cache, state = kwargs.get(CACHE), kwargs.get("state")
    if kwargs.get("packing") is not None:
        return kwargs["packing"].pack(output)
    if isinstance(cache, InfiniCache) and state.before is cache.layer_states:
        values = output if isinstance(output, tuple) else output.values()
        if [x for x in values if isinstance(x, Cache)] != [cache]:
            raise ValueError(unproven("returns another cache than the one that was filled"))
        cache.keep(state, kwargs["cut"], *output[0].shape[:2])  # of a tuple as well
    return output


def _take_cache(kwargs: dict[str, Any]) -> InfiniCache | None:
    """Remove the cache from a pass's arguments; versions of `transformers` differ in its name."""
    found = [name for name, x in kwargs.items() if name in CACHE_NAMES or isinstance(x, Cache)]
    caches = [x for x in map(kwargs.pop, found) if x is not None]
    if len(caches) > 1:
        raise ValueError(f"{CACHE} must be one cache, got {len(caches)}: {', '.join(found)}")
    if caches and not isinstance(caches[0], InfiniCache):
        raise ValueError(f"{CACHE} must be an InfiniCache, got {type(caches[0]).__name__}")
    return caches[0] if caches else None


def _check_positions(
    kwargs: dict[str, Any], is_token: Tensor | None, cache: InfiniCache | None
) -> None:
    """Refuse positions that a text cannot have after what the cache has seen."""
    positions = kwargs["position_ids"]
    if cache is None:
        # A mask would have covered the tokens before these.
        if kwargs.get("attention_mask") is None and positions[:, 0].any():
            raise ValueError(
                f"position_ids must start at 0 without a cache, got {int(positions[:, 0].max())}: "
                f"pass the {CACHE} of the tokens before these, or use_cache=False"
            )
    elif cache.num_tokens is not None:
        if is_token is not None:
            positions = positions.where(is_token, torch.iinfo(positions.dtype).max)
        if (positions.amin(dim=1) < cache.num_tokens.to(positions.device)).any():
            raise ValueError(
                f"position_ids must go on after the {cache.num_tokens.tolist()} tokens that the "
                f"rows of {CACHE} have seen, got {positions.amin(dim=1).tolist()}: start a new "
                "text with a new cache"
            )


def _padding(mask: Tensor | None, num_seen: int, num_columns: int) -> Tensor | None:
    """Return True where a new column is a token; None: all are."""
    if mask is None:
        return None
    if mask.dim() != 2 or mask.shape[1] != num_seen + num_columns:
        raise ValueError(
            f"attention_mask must have 2 axes (row, token) and cover the {num_seen} tokens of the "
            f"cache and the {num_columns} new ones, got shape {tuple(mask.shape)}"
        )
    is_token = mask[:, -num_columns:].bool()
    return None if is_token.all() else is_token


def _prepare_cache(
    model: PreTrainedModel,
    config: GenerationConfig,
    model_kwargs: dict[str, Any],
    generation_mode: GenerationMode,
    batch_size: int,
    *args: Any,
) -> None:
    """Give `generate` an `InfiniCache`, or the caller's with a row for each beam."""
    chunk, length = config.prefill_chunk_size, segment_length(model)
    if chunk is not None and chunk % length:
        raise ValueError(
            f"prefill_chunk_size must be a multiple of segment_length={length} tokens, got {chunk}"
        )
    if generation_mode == GenerationMode.ASSISTED_GENERATION:
        raise ValueError("generate must run without an assistant: a memory takes no token back")
    cache, mask = _take_cache(model_kwargs), model_kwargs.get("attention_mask")
    if mask is not None and not mask[:, -1].all():
        raise ValueError(
            "attention_mask must end with a token in each row, got padding there: pad on the left"
        )
    if cache is not None:
        num_columns = config._mask_length if mask is None else mask.shape[1]
        if num_columns <= cache.num_seen:  # transformers would skip the whole prompt
            raise ValueError(
                f"attention_mask must cover the {cache.num_seen} tokens that the cache has seen "
                f"and the prompt, got {num_columns}: pass cache.mask_for(input_ids)"
            )
        num_copies = max(config.num_beams, config.num_return_sequences)
        if num_copies > 1 and cache.batch_size == batch_size:
            cache.batch_repeat_interleave(num_copies)
    is_kept = cache is not None or config.return_dict_in_generate
    if cache is None and config.use_cache:
        cache = InfiniCache(model)
    if cache is not None:
        model_kwargs[CACHE] = cache
        cache.num_prompt, cache.ends = None, config._eos_token_tensor if is_kept else None
    prepare = getattr(type(model), PREPARE)
    prepare(model, config, model_kwargs, generation_mode, batch_size, *args)


def _make_mask(model: PreTrainedModel, *args: Any) -> Tensor:
    """Make the mask that a caller of `generate` left out, if that is unambiguous."""
    cache = args[-1].get(CACHE)  # args end with model_kwargs
    if isinstance(cache, InfiniCache) and cache.num_seen:
        raise ValueError(
            f"attention_mask must come with a cache that has seen {cache.num_seen} tokens, got "
            "none: pass cache.mask_for(input_ids) if no input_ids were seen, else torch.ones_like"
        )
    return getattr(type(model), _MAKE_MASK)(model, *args)


@functools.wraps(GenerationMixin.prepare_inputs_for_generation)  # `generate` reads its signature
def _make_inputs(
    model: PreTrainedModel, input_ids: Tensor, *args: Any, **kwargs: Any
) -> dict[str, Any]:
    """Tell a step which rows have ended, of a cache that is kept: no memory reads padding."""
    # Not the class's own: Phi-3's drops a cache where its rotations would change.
    inputs = getattr(GenerationMixin, _MAKE_INPUTS)(model, input_ids, *args, **kwargs)
    cache = inputs.get(CACHE)
    if isinstance(cache, InfiniCache) and not kwargs.get("is_first_iteration"):
        if cache.num_prompt is None:
            cache.num_prompt = input_ids.shape[1] - 1
        before = input_ids[:, cache.num_prompt : -1]
        if cache.ends is not None and len(before) > 1:
            has_ended = torch.isin(before, cache.ends).any(dim=1)
            if has_ended.any():
                inputs["has_ended"] = has_ended
    return inputs


def _confine_others(model: PreTrainedModel, params: InfiniParams) -> None:
    """Confine the base's own attention to its segment, in place."""
    confined, layers = without_memory(params), decoder_layers(model)
    for index, base in enumerate(attention_modules(model)):
        if isinstance(base, InfiniAttention):
            continue
        branch = getattr(base, BRANCH, None)
        is_beside = branch is not None or hasattr(layers[index], BRANCH)
        own = confine(model, index, confined, is_beside=is_beside)
        if branch is not None:
            put_beside(own, branch)
