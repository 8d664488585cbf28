"""Stream random tokens through a model: memory and time a token, from the start to the end.

`python -m benchmarks.streaming models/finetuned` prints a table. Writes nothing.

Resident memory is measured twice, because `start_run` lets glibc keep freed memory, sometimes more
and sometimes less. After glibc has given it back, the rest is what the stream needs.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from infini_retrofit.generation.cache import InfiniCache
from infini_retrofit.generation.generation import enable_generation, read, segment_length
from infini_retrofit.layer.form import InfiniParams
from infini_retrofit.model.base import load_base
from infini_retrofit.model.checkpoints import load_retrofit
from infini_retrofit.model.retrofit import insert_infini
from infini_retrofit.pipeline.device import return_freed_memory, start_run
from infini_retrofit.pipeline.guard import run_stage

BASE = Path("models/base")
SEGMENTS_PER_CALL = 4
NUM_PARTS, NUM_TURNS = 10, 25


@dataclass(frozen=True)
class Part:
    """One of equal parts of a stream.

    Attributes:
        num_tokens: from the stream's start to the part's end.
        seconds: time a token, the median of the part's calls.
        resident_bytes: memory of this process at the part's end, or allocated on its GPU.
        needed_bytes: the same, after freed memory was given back.
        cache_bytes: size of the cache at the part's end.
    """

    num_tokens: int
    seconds: float
    resident_bytes: int
    needed_bytes: int
    cache_bytes: int


class Stream:
    """Random tokens that a model reads into one cache, some segments at each call.

    Args:
        model: generates with an `InfiniCache`.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.cache = model, InfiniCache(model)
        self.per_call = SEGMENTS_PER_CALL * segment_length(model)
        self.generator = torch.Generator().manual_seed(0)
        self()  # warms up

    def __call__(self) -> float:
        """Read some segments; return the seconds a token."""
        size = (1, self.per_call)
        ids = torch.randint(self.model.config.vocab_size, size, generator=self.generator)
        begin = time.perf_counter()
        list(read(self.model, ids, self.cache, SEGMENTS_PER_CALL))
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - begin) / self.per_call


def measure_stream(stream: Stream, num_tokens: int, num_parts: int = NUM_PARTS) -> Iterator[Part]:
    """Read a stream and measure each part.

    Args:
        stream: a new one.
        num_tokens: how many to read, rounded up to equal parts of whole calls.
        num_parts: how many parts.

    Raises:
        ValueError: if a part would have fewer than two calls.
    """
    if num_tokens < (least := 2 * num_parts * stream.per_call):
        raise ValueError(
            f"tokens must be at least {least}, two calls of {stream.per_call} in each of "
            f"{num_parts} parts, got {num_tokens}"
        )
    calls_per_part = -(-(num_tokens - stream.per_call) // (stream.per_call * num_parts))
    for _ in range(num_parts):
        seconds = statistics.median(stream() for _ in range(calls_per_part))
        cache, device = stream.cache, stream.model.device
        resident = resident_bytes(device)
        return_freed_memory()
        yield Part(cache.num_seen, seconds, resident, resident_bytes(device), cache.num_bytes)


def late_over_early(late: Stream, num_turns: int = NUM_TURNS) -> float:
    """Return the time a token of a long stream over that of a new one, measured in turns.

    The speed of a shared machine changes while a stream lasts, but hardly between two turns.
    """
    early = Stream(late.model)
    return statistics.median(late() / early() for _ in range(num_turns))


def resident_bytes(device: torch.device) -> int:
    """Return how many bytes this process holds: on its GPU, or in memory (Linux)."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    """Stream through the model that the command line names, and print the table."""
    options = _options()
    device, dtype = start_run()
    if options.model is None:
        params = InfiniParams(segment_length=options.segment_length)
        model = load_base(options.base, dtype)
        insert_infini(model, params)
    else:
        model, params = load_retrofit(options.base, options.model, dtype)
    enable_generation(model.to(device), params, options.other_layers)
    stream = Stream(model)
    found = measure_stream(stream, options.tokens)
    parts = list(tqdm(found, total=NUM_PARTS, desc="tenths of the stream"))
    print(table(parts) + "\n")
    first, last = parts[0], parts[-1]
    ratio = last.resident_bytes / first.resident_bytes
    print(f"Resident memory, last tenth over first: {ratio:.4f};", end=" ")
    ratio = last.needed_bytes / first.needed_bytes
    print(f"after freed memory was given back: {ratio:.4f}.")
    print(f"Time a token, end over a new stream in turns with it: {late_over_early(stream):.3f}.")
    if not stream.cache.is_bounded:
        print("other_layers is full: the cache grows with the stream", file=sys.stderr)


def table(parts: list[Part]) -> str:
    """Return the parts as Markdown."""
    rows = [
        {
            "tokens": part.num_tokens,
            "us a token": part.seconds * 1e6,
            "resident MiB": part.resident_bytes / 2**20,
            "freed given back, MiB": part.needed_bytes / 2**20,
            "cache KiB": part.cache_bytes / 2**10,
        }
        for part in parts
    ]
    return pd.DataFrame(rows).to_markdown(index=False, floatfmt=(",.0f", *4 * [",.1f"]))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.streaming", description=__doc__)
    add = parser.add_argument
    add("model", type=Path, nargs="?", help="a retrofit; none: Infini-attention in all layers")
    add("--base", type=Path, default=BASE, help="folder of its base (default: %(default)s)")
    add("--tokens", type=int, default=200_000, help="how many (default: %(default)s)")
    add("--segment-length", type=int, default=256, help="without a retrofit (default: %(default)s)")
    add("--other-layers", choices=["segment", "full"], help="default: as the retrofit says")
    return parser.parse_args()


if __name__ == "__main__":
    run_stage(main)
