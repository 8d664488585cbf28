"""What the processes of one run (torchrun) agree on: a mean, a value, and whose rows are whose.

A process that is alone agrees with itself. Knows no model and no Trainer.
"""

from typing import TypeVar

import torch.distributed as dist
from torch import Tensor

Value = TypeVar("Value")


def num_processes() -> int:
    """Return how many processes compute together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def mean(value: Tensor) -> Tensor:
    """Return the mean over processes, a constant to gradients if there are several."""
    if num_processes() == 1:
        return value
    total = value.detach().clone()
    dist.all_reduce(total)
    return total / num_processes()


def value_of_first(value: Value) -> Value:
    """Return the first process's value in every process."""
    if num_processes() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def share_rows(
    num_rows: int, batch_size: int, step: int, process: int, processes: int
) -> tuple[int, int]:
    """Return how many rows of a step are one process's, and how many the step has.

    In the last step of an epoch there may be fewer than `batch_size`, or none.

    Args:
        num_rows: of an epoch.
        batch_size: rows a step and process.
        step: of the epoch.
        process: which one.
        processes: how many there are.
    """
    num_left = num_rows - step * batch_size * processes
    num_own = min(max(num_left - process * batch_size, 0), batch_size)
    return num_own, min(num_left, batch_size * processes)
