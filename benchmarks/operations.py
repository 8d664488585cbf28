"""How many operations a computation needs.

2 x tokens x (weights + weights that need input gradients + weights that need weight gradients). The
head is included; attention, norms and memory are not.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook


@dataclass
class OperationCount:
    """Operations of the linear layers that were called."""

    total: int = 0

    def add(self, x: Tensor, weight: Tensor) -> None:
        """Count x @ weight.T, and the gradients that a backward pass computes for it."""
        num_tokens = x.numel() // weight.shape[1]
        records = torch.is_grad_enabled()
        products = 1 + (records and x.requires_grad) + (records and weight.requires_grad)
        self.total += 2 * num_tokens * weight.numel() * products


@contextmanager
def count_operations() -> Iterator[OperationCount]:
    """Count the operations of every `nn.Linear` that is called inside the block."""
    count = OperationCount()

    def on_call(module: nn.Module, args: tuple) -> None:
        if isinstance(module, nn.Linear):
            count.add(args[0], module.weight)

    handle = register_module_forward_pre_hook(on_call)
    try:
        yield count
    finally:
        handle.remove()
