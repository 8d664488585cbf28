"""Packed rows: documents one after another in a row, told apart by positions that start again.

They become the rows of a padded batch on the way into a model's body, and a packed row again on
the way out, so that no layer sees two documents at once. Knows nothing of memory.

Axes:
    R  packed row
    T  token of a packed row
    B  document
    L  token of a document, padded to the longest
"""

import itertools
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

# What `DataCollatorWithFlattening` may give beside positions.
_BORDERS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
_BY_TOKEN = ("input_ids", "inputs_embeds", "embeddings", "token_ids", "position_ids")


@dataclass(frozen=True)
class Packing:
    """Where the documents of packed rows stand."""

    num_rows: int  # R
    num_tokens: list[int]  # of each document, row after row
    is_token: Bool[Tensor, "B L"]

    @classmethod
    def of(cls, positions: Int[Tensor, "R T"]) -> "Packing | None":
        """Find the documents; None: each row is one."""
        starts = torch.ones_like(positions, dtype=torch.bool)
        starts[:, 1:] = positions[:, 1:] <= positions[:, :-1]
        if int(starts.sum()) == len(starts):
            return None
        borders = [*starts.flatten().nonzero().flatten().tolist(), starts.numel()]
        num_tokens = [end - begin for begin, end in itertools.pairwise(borders)]
        columns = torch.arange(max(num_tokens), device=positions.device)
        is_token = columns < torch.tensor(num_tokens, device=positions.device)[:, None]
        return cls(len(starts), num_tokens, is_token)

    def unpack(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Lay the arguments of a forward pass out as (B, L, ...), padded at the end."""
        found = {name: x for name in _BY_TOKEN if (x := kwargs.get(name)) is not None}
        for name, x in found.items():
            tokens = x.expand(self.num_rows, *x.shape[1:]).flatten(0, 1)
            found[name] = pad_sequence(tokens.split(self.num_tokens), batch_first=True)
        return kwargs | found | {"attention_mask": self.is_token.long(), "use_cache": False}

    def pack(self, x: Any) -> Any:
        """Undo `unpack` for a model's output, or for each tensor (B, L, ...) in it."""
        if isinstance(x, Tensor):
            return x[self.is_token].unflatten(0, (self.num_rows, -1))
        if isinstance(x, tuple):
            return tuple(map(self.pack, x))
        if is_dataclass(x):
            return type(x)(**{field.name: self.pack(getattr(x, field.name)) for field in fields(x)})
        return x


def find_documents(
    kwargs: dict[str, Any], is_token: Tensor | None, shape: tuple[int, int], has_cache: bool
) -> Packing | None:
    """Find the documents in the rows of a forward pass; None: each row is one.

    Raises:
        ValueError: if rows of several documents are padded, continue a cache, or come without
            positions.
    """
    borders = [name for name in _BORDERS if kwargs.pop(name, None) is not None]
    if (positions := kwargs.get("position_ids")) is None:
        if borders:
            raise ValueError(
                "position_ids must start again where a document of a packed row begins, got none "
                f"beside {borders[0]}"
            )
        return None
    positions = positions.expand(shape)
    if is_token is None:
        packing = Packing.of(positions) if shape[1] > 1 else None
        if packing is None or not has_cache:
            return packing
    else:
        largest = positions.where(is_token, -1).cummax(dim=1).values[:, :-1]
        if not (is_token[:, 1:] & (positions[:, 1:] <= largest)).any():
            return None
    raise ValueError(
        "position_ids must grow along a row that is padded or has a cache, got some that start "
        "again: pass packed documents without padding and without a cache"
    )
