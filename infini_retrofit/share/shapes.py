"""The names of jaxtyping without jaxtyping: `Float[Tensor, "B T"]` means `Tensor`.

It replaces jaxtyping in exported folders, which open where jaxtyping is not installed. Nothing in
this library imports it.
"""

from typing import Any


class _Array:
    """An annotation without its axes."""

    def __class_getitem__(cls, item: tuple[Any, str]) -> Any:
        return item[0]


Bool = Float = Int = Num = _Array
