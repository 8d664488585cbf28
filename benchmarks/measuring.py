"""Time and memory of cases, each in a process of its own, in turns with matrix products.

The speed of a shared machine changes from minute to minute. So a case is compared with matrix
products right before and after it, and with its rivals in turns. Only these ratios mean anything.
"""

import contextlib
import io
import multiprocessing
import os
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from benchmarks.cases import GROUPS, Setting, Sizes
from infini_retrofit.pipeline.device import start_run


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of one run, until the device has finished."""
    _finish(device)
    begin = time.perf_counter()
    run()
    _finish(device)
    return time.perf_counter() - begin


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class ProductRate:
    """The machine's matrix-product rate, measured whenever it is called.

    Args:
        device: computes the products.
        dtype: the matrices' number type.
        size: rows and columns of a matrix.
        repeats: number of products; their median counts.
    """

    def __init__(
        self, device: torch.device, dtype: torch.dtype, size: int = 4096, repeats: int = 5
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        self.device, self.repeats = device, repeats
        self.matrix = torch.randn(size, size, generator=generator).to(device, dtype)
        self.operations = 2 * size**3
        self.measured: list[float] = []

    def __call__(self) -> float:
        """Return operations a second."""
        times = [
            seconds_of(lambda: self.matrix @ self.matrix, self.device) for _ in range(self.repeats)
        ]
        self.measured.append(self.operations / statistics.median(times))
        return self.measured[-1]


@dataclass
class Measured:
    """What was measured of one case.

    Attributes:
        name: the case's.
        found: the loss, in nats a token.
        num_tokens: how many tokens it takes.
        operations: how many a run needs.
        peak_bytes: largest memory of its process, or on its GPU.
        seconds: one for each run.
        rates: operations a second of the matrix products around each run.
    """

    name: str
    found: float
    num_tokens: int
    operations: int
    peak_bytes: int = 0
    seconds: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)

    @property
    def share(self) -> float:
        """The case's rate as a share of the matrix products' rate."""
        pairs = zip(self.seconds, self.rates, strict=True)
        return statistics.median(self.operations / s / rate for s, rate in pairs)

    def times(self, other: "Measured") -> float:
        """Return its time over the time of another case, measured in turns with it."""
        pairs = zip(self.seconds, other.seconds, strict=True)
        return statistics.median(own / others for own, others in pairs)


def measure_group(
    group: str, base_dir: Path, sizes: Sizes, rounds: int, rate: ProductRate
) -> list[Measured]:
    """Measure all cases of a group in turns, A B A B, with the machine's rate between them."""
    cases = []
    for name in GROUPS[group]:
        worker, connection = _start(group, name, base_dir, sizes)
        cases.append((Measured(name, *connection.recv()), worker, connection))
    before = rate()
    for _ in range(rounds):
        for measured, _, connection in cases:
            connection.send("run")
            measured.seconds.append(connection.recv())
            after = rate()
            measured.rates.append((before + after) / 2)
            before = after
    for measured, worker, connection in cases:
        connection.send("end")
        measured.peak_bytes = connection.recv()
        worker.join()
    return [measured for measured, _, _ in cases]


def _start(
    group: str, name: str, base_dir: Path, sizes: Sizes
) -> tuple[multiprocessing.Process, Connection]:
    os.environ["TQDM_DISABLE"] = "1"
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    worker = context.Process(
        target=_serve, args=(theirs, group, name, base_dir, sizes), daemon=True
    )
    worker.start()
    theirs.close()
    return worker, ours


def _serve(connection: Connection, group: str, name: str, base_dir: Path, sizes: Sizes) -> None:
    """Run a case once for each message; the first run counts the operations and warms up."""
    with contextlib.redirect_stderr(io.StringIO()):  # the parent process has printed the same
        device, dtype = start_run()
    job = GROUPS[group][name](Setting(base_dir, device, dtype, sizes))
    found, operations = job.count()
    connection.send((found, job.num_tokens, operations))
    while connection.recv() == "run":
        connection.send(seconds_of(job.run, device))
    connection.send(_peak_bytes(device))


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
