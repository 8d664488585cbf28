"""The names of jaxtyping without jaxtyping: `Float[Tensor, "B T"]` means `Tensor`.

Nothing in this library imports it. It takes the place of jaxtyping in exported folders, which must
open where that is not installed.
"""

from typing import Any


class _Array:
    """An annotation that forgets its axes."""

    def __class_getitem__(cls, item: tuple[Any, str]) -> Any:
        return item[0]


class Bool(_Array):
    """Truth values."""


class Float(_Array):
    """Floating-point numbers of any width."""


class Int(_Array):
    """Whole numbers of any width."""
