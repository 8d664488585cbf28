"""Keywords of a forward pass for the attention of families whose decoder layers drop them.

They travel with the rotation tables, which every decoder layer hands on.
"""

from typing import Any

from torch import nn

# Of `InfiniAttention.forward`.
_OURS = ("cut", "state", "probe", "embeddings", "token_ids", "embed", "noted")
_TABLES = "position_embeddings"


class _Tables(tuple):
    """Cosines and sines, and keywords beside them."""

    keywords: dict[str, Any]


def hand_on(layer: nn.Module, attention: nn.Module) -> None:
    """Make a decoder layer hand our keywords on to its attention, in place."""
    for module, hook in ((layer, _pack), (attention, _unpack)):
        if hook not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(hook, with_kwargs=True)


def _pack(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    tables = _Tables(kwargs[_TABLES])
    tables.keywords = {name: kwargs[name] for name in _OURS if name in kwargs}
    return args, kwargs | {_TABLES: tables}


def _unpack(
    attention: nn.Module, args: tuple, kwargs: dict[str, Any]
) -> tuple[tuple, dict[str, Any]]:
    return args, kwargs | getattr(kwargs.get(_TABLES), "keywords", {})
