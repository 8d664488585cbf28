"""One process at a time in a folder that its holder may remove.

Knows nothing of what the folder holds.
"""

import contextlib
import fcntl
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

LOCK = "lock"


@contextlib.contextmanager
def locked(folder: Path, what: str, *, waits: bool) -> Iterator[None]:
    """Hold the folder's lock; the system lets go of it however the process ends.

    Args:
        folder: is made where it is missing.
        what: is done there, for the message.
        waits: for the process that holds the lock, or refuse.

    Raises:
        BlockingIOError: if another process holds the lock and is not waited for.
    """
    with _lock(folder, what, waits):
        yield


def _lock(folder: Path, what: str, waits: bool) -> TextIO:
    """Lock the file that stands in the folder when the lock is ours."""
    path, has_waited = folder / LOCK, False
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as closing:
            lock = closing.enter_context(path.open("w"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                told = f"{what} is under way in another process, which holds {path}"
                if not waits:
                    raise BlockingIOError(f"{told}: wait for it or end it") from error
                if not has_waited:
                    print(f"waiting: {told}", file=sys.stderr, flush=True)
                has_waited = True
                fcntl.flock(lock, fcntl.LOCK_EX)
            if _stands_at(lock, path):
                closing.pop_all()
                return lock


def _stands_at(file: TextIO, path: Path) -> bool:
    """Tell whether an open file is still the one at a path."""
    return path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())
