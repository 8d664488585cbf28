"""Time a token, and bytes kept, of the readers of `eval_longcontext`.

`python -m benchmarks.readers --tokens 8192` scores random tokens with each and prints a table;
writes nothing. They take turns, so that the ratios mean something on a shared machine. Models,
their form and the window are those of the workspace.
"""

import argparse
import statistics
from dataclasses import replace
from functools import partial

import pandas as pd
import torch
from tqdm import tqdm

from benchmarks.measuring import seconds_of
from infini_retrofit.layer.form import InfiniParams
from infini_retrofit.longcontext.params import LongcontextParams
from infini_retrofit.pipeline.device import start_run
from infini_retrofit.pipeline.guard import run_stage
from infini_retrofit.pipeline.params import load_section
from stages.eval_longcontext import readers

ROUNDS = 3
BASELINES = ["window", "streaming", "equal_bytes", "yarn"]


def main() -> None:
    """Measure every reader, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.readers", description=__doc__)
    about = "of the document that is scored (default: %(default)s)"
    parser.add_argument("--tokens", type=int, default=8192, help=about)
    num_tokens = parser.parse_args().tokens
    if num_tokens < 128:
        parser.error(f"--tokens must be at least 128, got {num_tokens}")
    params = load_section(LongcontextParams, "longcontext")
    others = {"lengths": [], "needles": [], "document_tokens": [num_tokens]}
    params = replace(params, baselines=BASELINES, **others)
    device, dtype = start_run()
    every = list(readers(params, load_section(InfiniParams, "infini"), num_tokens, device, dtype))
    every = [r for r in every if num_tokens <= (r.most_tokens or num_tokens)]
    ids = torch.randint(every[0].model.config.vocab_size, (num_tokens,))
    times = {reader.name: [] for reader in every}
    for _ in tqdm(range(ROUNDS), desc="rounds"):
        for reader in every:
            times[reader.name].append(seconds_of(partial(reader.nlls, ids), device))
    rows = [
        {
            "reader": reader.name,
            "ms a token": 1000 * statistics.median(times[reader.name]) / num_tokens,
            "MB kept": reader.num_bytes(num_tokens) / 1e6,
        }
        for reader in every
    ]
    print(pd.DataFrame(rows).to_markdown(index=False, floatfmt=("", ".2f", ",.1f")))


if __name__ == "__main__":
    run_stage(main)
