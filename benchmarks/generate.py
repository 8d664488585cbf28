"""Speed of reading and of generating, beside the base in plain transformers with its own cache.

`python -m benchmarks.generate models/finetuned` prints a table; writes nothing. Both models take
their steps in turns, so that only the ratios mean something on a shared machine.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import torch
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedModel

from infini_retrofit.generation.cache import InfiniCache
from infini_retrofit.generation.generation import enable_generation
from infini_retrofit.generation.versions import CACHE
from infini_retrofit.model.base import load_base
from infini_retrofit.model.checkpoints import load_retrofit
from infini_retrofit.pipeline.device import start_run
from infini_retrofit.pipeline.guard import run_stage

BASE = Path("models/base")
LENGTHS = (256, 2048, 8192)  # tokens that are read
NUM_STEPS = 24  # tokens that are generated after them
ROUNDS = 3


class Generation:
    """A model that reads a text at once, and then goes on token by token."""

    def __init__(self, model: PreTrainedModel, make_cache: Callable) -> None:
        self.model, self.make_cache = model, make_cache

    @torch.inference_mode()
    def step(self, ids: torch.Tensor) -> float:
        """Give the model tokens; return the seconds that it took."""
        begin = time.perf_counter()
        self.model(ids, use_cache=True, logits_to_keep=1, **{CACHE: self.cache})
        if ids.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    def read(self, ids: torch.Tensor) -> float:
        """Read a text with a new cache; return the seconds that it took."""
        self.cache = self.make_cache()
        return self.step(ids)

    def cache_bytes(self) -> int:
        """Count the bytes of the cache."""
        if isinstance(self.cache, InfiniCache):
            return self.cache.num_bytes
        return sum(x.nbytes for layer in self.cache.layers for x in (layer.keys, layer.values))


def measure(plain: Generation, own: Generation, lengths: tuple[int, ...]) -> Iterator[dict]:
    """Measure each length: a row of the table."""
    generator = torch.Generator().manual_seed(0)
    size, device = plain.model.config.vocab_size, plain.model.device
    for length in tqdm(lengths, desc="lengths"):
        ids = torch.randint(size, (1, length), generator=generator).to(device)
        read, steps = [], []
        for _ in range(ROUNDS):
            read.append((own.read(ids), plain.read(ids)))
            last = ids[:, -1:]
            steps += [(own.step(last), plain.step(last)) for _ in range(NUM_STEPS)]
        yield {
            "tokens": length,
            "reading, plain, tokens/s": length / statistics.median(x for _, x in read),
            "retrofit's time, times": statistics.median(a / b for a, b in read),
            "generating, plain, tokens/s": 1 / statistics.median(x for _, x in steps),
            "retrofit's time, times ": statistics.median(a / b for a, b in steps),
            "cache, plain, MiB": plain.cache_bytes() / 2**20,
            "retrofit's, MiB": own.cache_bytes() / 2**20,
        }


def main() -> None:
    """Measure the retrofit that the command line names, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.generate", description=__doc__)
    add = parser.add_argument
    add("model", type=Path, help="a retrofit")
    add("--base", type=Path, default=BASE, help="folder of its base (default: %(default)s)")
    about = "tokens to read (default: %(default)s)"
    add("--lengths", type=int, nargs="+", default=LENGTHS, help=about)
    options = parser.parse_args()
    device, dtype = start_run()
    base = load_base(options.base, dtype).to(device)
    base.set_attn_implementation("sdpa")
    model, form = load_retrofit(options.base, options.model, dtype)
    enable_generation(model.to(device), form)
    plain = Generation(base, DynamicCache)
    own = Generation(model, lambda: InfiniCache(model))
    rows = pd.DataFrame(measure(plain, own, tuple(options.lengths)))
    formats = (",.0f", ",.0f", ".2f", ".1f", ".2f", ",.1f", ",.1f")
    print(rows.to_markdown(index=False, floatfmt=formats))


if __name__ == "__main__":
    run_stage(main)
