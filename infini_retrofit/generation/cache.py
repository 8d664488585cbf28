"""`InfiniCache`: what generation keeps of a prompt in the place of all its keys and values.

In each Infini layer that is the memory, what is carried over the last segment border, and the
keys and values of the segment that has not ended: as many bytes after a book as after a page.
`enable_generation(model, params, other_layers)` makes a model use it, in `generate` and in forward
passes with `use_cache=True`. Knows nothing of how layers attend.

Axes:
    B  row of the batch
    T  token of a prompt
"""

from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DummyLayer, DynamicLayer

from infini_retrofit.generation.cache_file import check_file, check_model, describe
from infini_retrofit.layer.attention import InfiniAttention
from infini_retrofit.layer.local_context import LocalContext
from infini_retrofit.layer.memory import MemoryState
from infini_retrofit.layer.state import Carried, Carrier, Tokens
from infini_retrofit.model.retrofit import attention_modules

# The method of transformers' GenerationMixin that `enable_generation` replaces.
PREPARE = "_prepare_cache_for_generation"
_KINDS = {"memory": MemoryState, "context": LocalContext, "unfinished": Tokens}


class InfiniCache(Cache):
    """Memory, carried context and current segment of every Infini layer, for each row of a batch.

    A layer of the base that is not confined to segments (`other_layers: full`) keeps all keys and
    values here as well, in a `DynamicLayer`: then the cache grows with the prompt.

    Attributes:
        carried: by layer; a confined layer beside a parallel branch has an index of its own.
        num_seen: columns that went in, padding included.
        num_tokens: that went in, without padding; None: nothing did.
        is_token: False in columns that were padding; None: nothing went in, or the cache is
            bounded. Then how many tokens went in is all that counts, wherever they stood.
    """

    num_tokens: Int[Tensor, "B"] | None
    is_token: Bool[Tensor, "B _"] | None

    def __init__(self, model: PreTrainedModel) -> None:
        is_infini = [isinstance(m, InfiniAttention) for m in attention_modules(model)]
        super().__init__(
            layers=[DummyLayer() if bounded else DynamicLayer() for bounded in is_infini]
        )
        self.carried: dict[int, Carried] = {}
        self.num_seen = 0
        self.num_tokens = self.is_token = None

    @property
    def is_bounded(self) -> bool:
        """Whether the cache stops growing after the first segment."""
        return all(isinstance(layer, DummyLayer) for layer in self.layers)

    @property
    def num_bytes(self) -> int:
        """Bytes of all that layers keep."""
        return sum(x.numel() * x.element_size() for x in self._tensors().values())

    @property
    def is_compileable(self) -> bool:
        """Never: a segment grows until it ends."""
        return False

    @property
    def is_croppable(self) -> bool:
        """Never: see `crop`."""
        return False

    @property
    def batch_size(self) -> int:
        """Return the number of rows; -1 while there are none."""
        return -1 if self.num_tokens is None else len(self.num_tokens)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return how many columns went in."""
        return self.num_seen

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Return the keys that layers see which are not confined, and where these begin."""
        return self.num_seen + query_length, 0

    def keep(self, carrier: Carrier, num_rows: int, num_columns: int) -> None:
        """Take what the layers left after a forward pass, without its gradients."""
        new = torch.ones(num_rows, num_columns, dtype=torch.bool)
        if carrier.is_token is not None:
            new = carrier.is_token.cpu()
        added = new.sum(dim=1)
        self.num_tokens = added if self.num_tokens is None else self.num_tokens + added
        if not self.is_bounded:
            self.is_token = new if self.is_token is None else torch.cat([self.is_token, new], dim=1)
        self.num_seen += num_columns
        self.carried = carrier.after
        self._change(torch.Tensor.detach)

    def mask_for(
        self, input_ids: Int[Tensor, "B T"], attention_mask: Int[Tensor, "B T"] | None = None
    ) -> Int[Tensor, "B _"]:
        """Return the `attention_mask` with which `generate` goes on from here.

        Without one it would take the new tokens for the whole text, and skip as many as are here.

        Args:
            input_ids: the new columns.
            attention_mask: which of them are tokens; None: they all are.

        Raises:
            ValueError: if the cache is one of another batch.
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
        """Refuse to go on with another batch.

        Raises:
            ValueError: if it has another number of rows.
        """
        if self.batch_size not in (-1, num_rows):
            raise ValueError(
                f"past_key_values must have a row for each of the {num_rows} of the batch, got "
                f"{self.batch_size}: repeat them with batch_repeat_interleave (for beams "
                "`generate` does)"
            )

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.carried, self.num_seen, self.num_tokens, self.is_token = {}, 0, None, None

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse to take tokens back.

        Raises:
            ValueError: unless there are none to take back.
        """
        if tokens_to_remove:
            raise ValueError(
                "tokens_to_remove must be 0, because a memory cannot take back what was written to "
                f"it, got {tokens_to_remove}: keep a copy (copy.deepcopy) to return to"
            )

    def reorder_cache(self, beam_idx: Int[Tensor, "_"]) -> None:
        """Let row i go on where row beam_idx[i] is."""
        super().reorder_cache(beam_idx)
        self._change(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows only, in the order given."""
        super().batch_select_indices(indices)
        self._change(lambda x: x[indices.to(x.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        super().batch_repeat_interleave(repeats)
        self._change(lambda x: x.repeat_interleave(repeats, dim=0))

    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        """Change every tensor of the Infini layers, and what belongs to rows beside them."""
        self.carried = {key: _map(carried, change) for key, carried in self.carried.items()}
        self.num_tokens, self.is_token = (
            None if x is None else change(x) for x in (self.num_tokens, self.is_token)
        )

    def _tensors(self) -> dict[str, Tensor]:
        """Return every tensor under a name of its own."""
        found = {}
        for key, carried in self.carried.items():
            for part in _KINDS:
                if (value := getattr(carried, part)) is not None:
                    named = {f.name: getattr(value, f.name) for f in fields(value)}
                    found |= {f"carried.{key}.{part}.{name}": x for name, x in named.items()}
        for index, layer in enumerate(self.layers):
            if layer.keys is not None:
                named = {"key_states": layer.keys, "value_states": layer.values}
                found |= {f"full.{index}.update.{name}": x for name, x in named.items()}
        return found

    def save(self, path: Path, model: PreTrainedModel) -> None:
        """Write the cache, and which model filled it, to one file, whole or not at all.

        Raises:
            ValueError: if the model would not fill a cache.
        """
        check_enabled(model)
        about = describe(model) | {"num_seen": str(self.num_seen)}
        tensors = {name: x.detach().contiguous() for name, x in self._tensors().items()}
        rows = {"num_tokens": self.num_tokens, "is_token": self.is_token}
        tensors |= {name: x.contiguous() for name, x in rows.items() if x is not None}
        path.parent.mkdir(parents=True, exist_ok=True)
        # Not by `whole_file`: an exported folder holds this file, and none of the pipeline.
        partial = path.with_name(path.name + ".partial")
        save_file(tensors, partial, about)
        partial.replace(path)

    @classmethod
    def load(cls, path: Path, model: PreTrainedModel) -> "InfiniCache":
        """Read a cache that `save` wrote.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is no cache, or one of another model, or the model uses none;
                the device may be another, and the number type too, of float32 and bfloat16.
        """
        check_enabled(model)
        about = check_file(path)
        check_model(path, about, model)
        cache = cls(model)
        cache._fill(load_file(path), model)
        cache.num_seen = int(about["num_seen"])
        return cache

    def _fill(self, tensors: dict[str, Tensor], model: PreTrainedModel) -> None:
        """Put loaded tensors in their places."""
        self.num_tokens = tensors.pop("num_tokens", None)
        self.is_token = tensors.pop("is_token", None)
        parts: dict[str, dict[int, dict[str, dict[str, Tensor]]]] = {"carried": {}, "full": {}}
        for name, x in tensors.items():
            kind, key, part, field = name.split(".")
            if part != "memory" and x.is_floating_point():
                x = x.to(model.dtype)
            named = parts[kind].setdefault(int(key), {}).setdefault(part, {})
            named[field] = x.to(model.device)
        for index, by_part in parts["full"].items():
            self.layers[index].update(**by_part["update"])
        self.carried = {
            key: Carried(**{part: _KINDS[part](**named) for part, named in by_part.items()})
            for key, by_part in parts["carried"].items()
        }


def check_enabled(model: PreTrainedModel) -> None:
    """Refuse a model that would not fill a cache.

    Raises:
        ValueError: if `enable_generation` was not called.
    """
    if PREPARE not in vars(model):
        raise ValueError(
            "model must be one that generates with an InfiniCache, got one that does not: call "
            "enable_generation(model, params) first"
        )


def _map(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Change every tensor inside nested dataclasses."""
    if is_dataclass(value):
        changed = {f.name: _map(getattr(value, f.name), change) for f in fields(value)}
        return type(value)(**changed)
    return change(value) if isinstance(value, Tensor) else value
