"""What an untrained memory wins: perplexity by its fixed share of the attention's output.

The memory is that of section `infini`, as inserted, in the base or in a control whose attention
was trained without one. A trained memory has to beat the best of these. Prints a table and
writes nothing.

Reads: params.yaml (infini), models, data/longdocs
"""

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from analysis.programs import BASE, make_parser, open_documents, print_growing
from infini_retrofit.layer.form import InfiniParams
from infini_retrofit.model.base import load_base
from infini_retrofit.model.checkpoints import load_retrofit
from infini_retrofit.model.retrofit import infini_modules, insert_infini, resolve_layers
from infini_retrofit.pipeline.device import start_run
from infini_retrofit.pipeline.params import load_section
from infini_retrofit.scoring.score import MemoryRead, Score, memory_runs, next_token_nlls, total

HEADER = ["share", "PPL", "nats a token won", "another document's memory", "its nats a token won"]

# The base or control must have the form but for its memory: the base's attention, confined.
ALIKE = ("layers", "segment_length", "local_context")
PLAIN = {
    "insertion": "replace",
    "init": "base",
    "heads": "base",
    "local": "softmax",
    "positions": "rope",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Score one model with an untrained memory of each share and print the table."""
    options = _options(arguments)
    form = load_section(InfiniParams, "infini")
    if not form.has_memory:
        raise ValueError("infini.memory must be on and infini.layers not empty, got no memory")
    documents = open_documents(options.documents)
    device, dtype = start_run()

    def score(share: float, reads: Sequence[MemoryRead]) -> dict[MemoryRead, Score]:
        model = insert_memory(options.model, form, dtype).to(device)
        for module in infini_modules(model).values():
            torch.nn.init.constant_(module.gate_logit, math.log(share / (1 - share)))
        return score_reads(model, documents, form.segment_length, reads)

    def rows() -> Iterator[list[str]]:
        off = score(0.5, ["off"])["off"]
        yield ["off", f"{off.ppl:.2f}", "", "", ""]
        for share in options.shares:
            found = score(share, ["own", "swapped"])
            cells = ((f"{s.ppl:.2f}", f"{off.nll - s.nll:+.4f}") for s in found.values())
            yield [f"{share:g}", *(text for pair in cells for text in pair)]

    print_growing(HEADER, rows())


def score_reads(
    model: PreTrainedModel, documents: Int[Tensor, "B T"], length: int, reads: Sequence[MemoryRead]
) -> dict[MemoryRead, Score]:
    """Score documents in segments, once for each memory to read."""
    scores: dict[MemoryRead, list[Score]] = {read: [] for read in reads}
    for runs in memory_runs(model, documents, length, reads):
        for read, run in runs.items():
            scores[read].append(Score.of(next_token_nlls(model, *run)))
    return {read: total(found) for read, found in scores.items()}


def insert_memory(folder: Path, form: InfiniParams, dtype: torch.dtype) -> PreTrainedModel:
    """Insert a form into the base, or into the base with the weights of a control.

    Raises:
        ValueError: if the form differs from the base or the control in more than a memory.
    """
    model = load_base(BASE, dtype)
    form = replace(form, layers=resolve_layers(form.layers, model.config.num_hidden_layers))
    needed = {name: (value, "so that the base stays as it is") for name, value in PLAIN.items()}
    if folder != BASE:
        trained, plain = load_retrofit(BASE, folder, dtype, "dvc repro finetune_control")
        if plain.has_memory:
            raise ValueError(f"{folder} must be a model without a memory, got one that has one")
        needed |= {name: (getattr(plain, name), f"as {folder} has it") for name in ALIKE}
    for name, (value, why) in needed.items():
        if (own := getattr(form, name)) != value:
            raise ValueError(f"infini.{name} must be {value}, {why}, got {own}")
    insert_infini(model, form)
    if folder != BASE:
        result = model.load_state_dict(trained.state_dict(), strict=False)
        assert not result.unexpected_keys, result.unexpected_keys
    return model.eval()


def _share(text: str) -> float:
    """Read a share of the memory, above 0 and below 1."""
    if not 0 < (value := float(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and below 1, got {value}")
    return value


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    # At least two documents, because memories are swapped between them.
    about = "Score a model with an untrained memory of fixed shares."
    parser = make_parser("fixed_share", about, least_documents=2)
    model = "the base, or a model trained without a memory such as models/control"
    parser.add_argument("model", nargs="?", type=Path, default=BASE, help=model)
    shares, about = [0.02, 0.05, 0.1, 0.2], "of the memory"
    parser.add_argument("--shares", type=_share, nargs="+", default=shares, help=about)
    return parser.parse_args(arguments)
