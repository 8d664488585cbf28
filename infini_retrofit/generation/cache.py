"""`InfiniCache`: the memory as a cache of `transformers`.

Each Infini layer keeps its memory, the context carried over the last segment border, and the keys
and values of the segment that has not ended, while it generates also rotated: as many bytes after a
book as after a page.
`enable_generation` makes a model use it, in `generate` and in forward passes with
`use_cache=True`. Knows nothing of how layers attend.

Axes:
    B  row of the batch
    T  token of a prompt
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DummyLayer, DynamicLayer

from infini_retrofit.generation.versions import CACHE
from infini_retrofit.layer.attention import InfiniAttention
from infini_retrofit.layer.cut import Cut
from infini_retrofit.layer.form import InfiniParams
from infini_retrofit.layer.memory import MemoryState
from infini_retrofit.layer.state import LayerState, State
from infini_retrofit.layer.tokens import Tokens
from infini_retrofit.model.families import decoder_layers
from infini_retrofit.model.retrofit import attention_modules, infini_modules, resolve_layers
from infini_retrofit.model.weights import check_kinds, kind_of, read_tensors

# The method of transformers' GenerationMixin that `enable_generation` replaces.
PREPARE = "_prepare_cache_for_generation"
_KINDS = {"memory": MemoryState, "context": Tokens, "sink": Tokens, "unfinished": Tokens}
FORMAT = "5"  # of a saved file
_VALUES_AT_ONCE = 2**22  # of a parameter, for its digest
_DIGEST = "sha256"  # of a saved file's tensors; the first files have none
_ADVICE = "delete it and read the text again"


class InfiniCache(Cache):
    """The state of every Infini layer, for each row of a batch.

    With `other_layers: full` the base's own layers keep all keys and values here as well, in a
    `DynamicLayer`: then the cache grows with the prompt.
    """

    num_seen: int  # columns read, padding included
    num_tokens: Int[Tensor, "B"] | None  # read, without padding; None: none yet
    # False in columns that were padding. For a bounded cache the number of tokens is enough.
    is_token: Bool[Tensor, "B _"] | None
    # Of the last `generate`: columns before the first generated token, and tokens that end a row.
    num_prompt: int | None
    ends: Int[Tensor, "_"] | None
    # By index; a confined layer beside a parallel branch has an index of its own.
    layer_states: dict[int, LayerState]

    is_compileable = False  # a segment grows until it ends
    is_croppable = False  # see `crop`

    def __init__(self, model: PreTrainedModel) -> None:
        is_infini = [isinstance(m, InfiniAttention) for m in attention_modules(model)]
        super().__init__(
            layers=[DummyLayer() if bounded else DynamicLayer() for bounded in is_infini]
        )
        self.reset()

    @property
    def is_bounded(self) -> bool:
        """Whether the cache stops growing after the first segment."""
        return all(isinstance(layer, DummyLayer) for layer in self.layers)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors in the cache, those of no file included."""
        keys = (x for s in self.layer_states.values() if s.keys for x in vars(s.keys).values())
        return sum(x.nbytes for x in (*self._tensors().values(), *keys))

    @property
    def batch_size(self) -> int:
        """Number of rows; -1 while there are none."""
        return -1 if self.num_tokens is None else len(self.num_tokens)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of columns read."""
        return self.num_seen

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Return the number of keys of layers that are not confined, and their offset."""
        return self.num_seen + query_length, 0

    def keep(self, state: State, cut: Cut, num_rows: int, num_columns: int) -> None:
        """Store the state after a forward pass, without gradients."""
        new = torch.ones(num_rows, num_columns, dtype=torch.bool)
        if cut.is_token is not None:
            new = cut.is_token.cpu()
        added = new.sum(dim=1)
        self.num_tokens = added if self.num_tokens is None else self.num_tokens + added
        if not self.is_bounded:
            self.is_token = new if self.is_token is None else torch.cat([self.is_token, new], dim=1)
        self.num_seen += num_columns
        self.layer_states = state.after
        if torch.is_grad_enabled():
            self._change(torch.Tensor.detach)

    def mask_for(
        self, input_ids: Int[Tensor, "B T"], attention_mask: Int[Tensor, "B T"] | None = None
    ) -> Int[Tensor, "B _"]:
        """Return the `attention_mask` with which `generate` continues this cache.

        Without one `generate` takes the new tokens for the whole text, and skips them.
        `attention_mask` says which of the new columns are tokens; None: they all are.
        """
        self.check_rows(len(input_ids))
        new = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if self.num_tokens is None:
            return new
        seen = self.is_token
        if seen is None:
            seen = torch.arange(self.num_seen).flip(0) < self.num_tokens[:, None]
        return torch.cat([seen.to(new), new], dim=1)

    def check_rows(self, num_rows: int) -> None:
        """Refuse a batch of another number of rows."""
        if self.batch_size not in (-1, num_rows):
            raise ValueError(
                f"{CACHE} must have a row for each of the {num_rows} of the batch, got "
                f"{self.batch_size}: repeat them with batch_repeat_interleave"
            )

    def reset(self) -> None:
        """Empty the cache."""
        super().reset()
        self.layer_states, self.num_seen = {}, 0
        self.num_tokens = self.is_token = self.num_prompt = self.ends = None

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse to remove tokens."""
        raise ValueError(f"a memory cannot remove tokens, got {tokens_to_remove=}: keep a copy")

    def reorder_cache(self, beam_idx: Int[Tensor, "_"]) -> None:
        """Replace row i by row beam_idx[i]."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows, in the order given."""
        super().batch_select_indices(indices)
        self._change(lambda x: x[indices.to(x.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        super().batch_repeat_interleave(repeats)
        self._change(lambda x: x.repeat_interleave(repeats, dim=0))

    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        """Change every tensor of the Infini layers, and the rows' counts and masks."""
        self.layer_states = {k: _map(state, change) for k, state in self.layer_states.items()}
        self.num_tokens, self.is_token = (
            None if x is None else change(x) for x in (self.num_tokens, self.is_token)
        )

    def _tensors(self) -> dict[str, Tensor]:
        """Return every tensor by a unique name."""
        found = {}
        for key, state in self.layer_states.items():
            for part in _KINDS:
                if (value := getattr(state, part)) is not None:
                    found |= {f"carried.{key}.{part}.{name}": x for name, x in vars(value).items()}
        for index, layer in enumerate(self.layers):
            if layer.keys is not None:
                found[f"full.{index}.update.key_states"] = layer.keys
                found[f"full.{index}.update.value_states"] = layer.values
        return found

    def save(self, path: Path, model: PreTrainedModel) -> None:
        """Write the cache and its model's identity to one file, whole or not at all."""
        check_enabled(model)
        about = describe(model) | {"num_seen": str(self.num_seen)}
        rows = {"num_tokens": self.num_tokens, "is_token": self.is_token}
        tensors = self._tensors() | {name: x for name, x in rows.items() if x is not None}
        about[_DIGEST] = _digest_of(tensors, about["num_seen"])
        path.parent.mkdir(parents=True, exist_ok=True)
        # Not by `whole_file`: an exported folder holds this file, and none of the pipeline.
        partial = path.with_name(path.name + ".partial")
        save_file({name: x.detach().contiguous() for name, x in tensors.items()}, partial, about)
        partial.replace(path)

    @classmethod
    def load(cls, path: Path, model: PreTrainedModel) -> "InfiniCache":
        """Read a cache that `save` wrote.

        Raises:
            ValueError: if the file is damaged or no cache of this model, or the model uses none.
                The device and the number type (float32, bfloat16) may differ.
        """
        check_enabled(model)
        about = check_file(path)
        for name, expected in describe(model).items():
            if (found := about.get(name)) != expected:
                raise ValueError(
                    f"{name} of {path} must be {expected}, as this model and version write "
                    f"it, got {found}: read the text again"
                )
        cache, tensors = cls(model), read_tensors(path, _ADVICE)[0]
        if about.get(_DIGEST) not in (None, _digest_of(tensors, about["num_seen"])):
            raise ValueError(f"{path} differs from its own digest (sha256): {_ADVICE}")
        cache.num_seen = int(about["num_seen"])
        _check_tensors(tensors, cache.num_seen, model, path)
        cache.num_tokens = tensors.pop("num_tokens", None)
        cache.is_token = tensors.pop("is_token", None)
        layers: dict[tuple[str, str], dict[str, dict[str, Tensor]]] = {}
        for name, x in tensors.items():
            kind, key, part, field = name.split(".")
            if part != "memory" and x.is_floating_point():
                x = x.to(model.dtype)
            layers.setdefault((kind, key), {}).setdefault(part, {})[field] = x.to(model.device)
        for (kind, key), parts in layers.items():
            if kind == "full":
                cache.layers[int(key)].update(**parts["update"])
            else:
                values = {part: _KINDS[part](**named) for part, named in parts.items()}
                cache.layer_states[int(key)] = LayerState(**values)
        return cache


def check_enabled(model: PreTrainedModel) -> None:
    """Refuse a model for which `enable_generation` was not called."""
    if PREPARE not in vars(model):
        raise ValueError("model has no InfiniCache: call enable_generation(model, params) first")


def _map(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Change every tensor inside nested dataclasses."""
    if is_dataclass(value):
        return type(value)(**{name: _map(x, change) for name, x in vars(value).items()})
    return change(value) if isinstance(value, Tensor) else value


def check_file(path: Path) -> dict[str, str]:
    """Refuse a file that is no saved cache; return what it says."""
    made_by = "InfiniCache.save and infini_retrofit.generation.chat write one"
    if not path.exists():
        raise FileNotFoundError(f"{path.absolute()} is missing: {made_by}")
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        told = f"{path} must be a cache, got something else: {made_by} ({error})"
        raise ValueError(told) from error
    if "num_seen" not in about:
        raise ValueError(f"{path} must be a cache, got something else: {made_by}")
    if not re.fullmatch("[0-9]{1,15}", found := about["num_seen"]):
        raise ValueError(f"num_seen of {path} must be a count, got {found}: {_ADVICE}")
    return about


def _check_tensors(
    tensors: Mapping[str, Tensor], num_seen: int, model: PreTrainedModel, path: Path
) -> None:
    """Refuse tensors that a model does not keep after `num_seen` columns."""
    num_tokens, wanted = tensors.get("num_tokens"), {}
    if num_seen:
        if num_tokens is None or num_tokens.dtype != torch.long or num_tokens.dim() != 1:
            raise ValueError(f"num_tokens of {path} must be a count for each row: {_ADVICE}")
        if not len(num_tokens) or not ((num_tokens >= 1) & (num_tokens <= num_seen)).all():
            raise ValueError(
                f"num_tokens of {path} must be in 1..num_seen={num_seen} for each row, got "
                f"{num_tokens.tolist()[:9]}: {_ADVICE}"
            )
        wanted = _expected_kinds(num_seen, num_tokens, model)
    found = {name: _kind_of(name, x) for name, x in tensors.items()}
    check_kinds(found, wanted, path, _ADVICE)
    length = model.config.infini["segment_length"]
    # The memory of a branch does not wait for a window.
    context = next((m.local_context for m in infini_modules(model).values() if m.memory), 0)
    for name, x in tensors.items():
        counts, expected = num_tokens, num_tokens
        if name.endswith(".unfinished.is_token"):
            counts, expected = x.sum(dim=1), num_tokens % length
        elif ".memory." in name and x.shape[-1]:  # gated_delta has no normalizer
            # Whole segments are written once they have left the window.
            counts, expected = x.flatten(1).any(dim=1), num_tokens // length > context // length
        elif name == "is_token":
            counts = x.sum(dim=1)
        if not torch.equal(counts, expected):
            raise ValueError(f"{name} of {path} must fit num_tokens of its rows: {_ADVICE}")


def _expected_kinds(
    num_seen: int, num_tokens: Int[Tensor, "B"], model: PreTrainedModel
) -> dict[str, str]:
    """Return the kind of every tensor that the model keeps, learned from one token."""
    probe, ids = InfiniCache(model), torch.zeros(1, 1, dtype=torch.long, device=model.device)
    with torch.no_grad():
        model.base_model(input_ids=ids, use_cache=True, **{CACHE: probe})
    shapes = probe._tensors() | {"num_tokens": num_tokens}
    if not probe.is_bounded:
        shapes["is_token"] = torch.empty(1, num_seen, dtype=torch.bool, device="meta")
    num_unfinished = int((num_tokens % model.config.infini["segment_length"]).max())
    found = {}
    for name, x in shapes.items():
        shape = [len(num_tokens), *x.shape[1:]]
        if ".unfinished." in name:
            shape[1] = num_unfinished
        if name.startswith("full."):
            shape[2] = num_seen
        found[name] = _kind_of(name, torch.empty(shape, dtype=x.dtype, device="meta"))
    return found


def _kind_of(name: str, x: Tensor) -> str:
    """Return a tensor's type and shape; outside the memory all types of a model are one."""
    of_model = (torch.float32, torch.bfloat16, torch.float16)
    if ".memory." not in name and x.dtype in of_model:
        return f"floats {list(x.shape)}"
    return kind_of(x)


def describe(model: PreTrainedModel) -> dict[str, str]:
    """Return the format, and all that must be equal for a model to continue from a cache.

    That is every choice of form and every weight, rounded to bfloat16. So models loaded in float32
    and in bfloat16 are equal. Weights that differ by less than a rounding are taken for equal.
    """
    form = asdict(InfiniParams(**model.config.infini))
    del form["init"], form["bptt_segments"]  # of training alone: they change no output
    for name in ("layers", "memory_layers"):
        form[name] = resolve_layers(form[name], len(decoder_layers(model)))
    choices = {f"infini.{name}": x for name, x in form.items()}
    choices["rope_parameters"] = getattr(model.config, "rope_parameters", None)
    about = {"format": FORMAT, "other_layers": model.config.other_layers}
    about |= {name: json.dumps(x, sort_keys=True) for name, x in choices.items()}
    return about | {"model": _digest(model)}


def _digest_of(tensors: Mapping[str, Tensor], num_seen: str) -> str:
    """Hash everything in a saved cache but what `describe` says."""
    digest = hashlib.sha256(num_seen.encode())
    for name, x in sorted(tensors.items()):
        digest.update(f"{name} {kind_of(x)}".encode())
        digest.update(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _digest(model: PreTrainedModel) -> str:
    """Hash the name, shape and bfloat16 values of every parameter."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if parameter.is_meta:
            raise ValueError(
                f"the weights of a model whose cache is saved or loaded must be in memory, got "
                f"{name} offloaded: load the model without a device_map"
            )
        digest.update(f"{name} {list(parameter.shape)}".encode())
        for part in parameter.detach().flatten().split(_VALUES_AT_ONCE):
            digest.update(part.to(torch.bfloat16).view(torch.int16).cpu().numpy())
    return digest.hexdigest()
