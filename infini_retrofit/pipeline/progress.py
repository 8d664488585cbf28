"""What a run tells while it runs; of several processes, only the first speaks.

Knows no stage.
"""

import sys
from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

from infini_retrofit.pipeline.guard import is_first_process

Item = TypeVar("Item")
LOG_SECONDS = 30  # between two lines where stderr is no terminal


def progress(
    items: Iterable[Item] | None, name: str, unit: str = "it", total: int | None = None
) -> "tqdm[Item]":
    """Show a bar on stderr while items are taken, unless that takes less than a moment."""
    seconds = 0.5 if sys.stderr.isatty() else LOG_SECONDS
    return tqdm(
        items,
        name,
        total,
        leave=False,
        mininterval=seconds,
        delay=seconds,
        unit=f" {unit}",
        disable=not is_first_process(),
    )


def say(line: str) -> None:
    """Print a line at once, also where output is kept in a file."""
    if is_first_process():
        print(line, flush=True)


def note(line: str) -> None:
    """Tell on stderr what a user may want to mend, and need not."""
    if is_first_process():
        print(f"note: {line}", file=sys.stderr, flush=True)
