"""What a memory wins whose share was fixed and never trained: perplexity by that share.

The memory of section `infini`, as inserting makes it, in the base or in a control whose attention
was trained without one. What was trained with a memory has to beat the best of these. Prints a
table and writes nothing.

Reads: params.yaml (infini), models, data/longdocs
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from infini_retrofit.layer.form import InfiniParams
from infini_retrofit.model.base import load_base
from infini_retrofit.model.checkpoints import load_retrofit
from infini_retrofit.model.retrofit import insert_infini, resolve_layers
from infini_retrofit.pipeline.device import start_run
from infini_retrofit.pipeline.files import render, verify_manifest
from infini_retrofit.pipeline.guard import run_stage
from infini_retrofit.pipeline.params import load_section
from infini_retrofit.pipeline.tokens import read_documents
from infini_retrofit.scoring.labels import next_token_nlls
from infini_retrofit.scoring.score import Score, Whose, memory_runs, total

BASE, DOCUMENTS = Path("models/base"), Path("data/longdocs/test.parquet")
HEADER = ["share", "PPL", "nats a token won", "another document's memory", "nats a token won"]

# What a memory is added to must be as in a model without one: the base's attention, confined.
ALIKE = ("layers", "segment_length", "local_context")
PLAIN = {
    "insertion": "replace",
    "init": "base",
    "heads": "base",
    "local": "softmax",
    "positions": "rope",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Score one model with an untrained memory of ever another share and print the table."""
    options = _options(arguments)
    form = load_section(InfiniParams, "infini")
    if not form.has_memory:
        raise ValueError("infini.memory must be on and infini.layers not empty, got no memory")
    verify_manifest(BASE, made_by="dvc repro prepare_base")
    documents = read_documents(DOCUMENTS, options.documents)
    device, dtype = start_run()
    length = form.segment_length
    off = score(put_memory(options.model, form, dtype).to(device), documents, length, ["off"])
    rows = [["off", f"{off['off'].ppl:.2f}", "", "", ""]]
    for share in options.shares:
        model = put_memory(options.model, replace(form, initial_memory_share=share), dtype)
        found = score(model.to(device), documents, length, ["own", "swapped"])
        rows.append([f"{share:g}"])
        for one in found.values():
            rows[-1] += [f"{one.ppl:.2f}", f"{off['off'].nll - one.nll:+.4f}"]
        print(render(HEADER, rows), file=sys.stderr)
    print(render(HEADER, rows))


def score(
    model: PreTrainedModel, documents: Int[Tensor, "B T"], length: int, reads: Sequence[Whose]
) -> dict[Whose, Score]:
    """Score documents in segments, once for each memory that they are to read."""
    scores: dict[Whose, list[Score]] = {read: [] for read in reads}
    for runs in memory_runs(model, documents, length, reads):
        for read, run in runs.items():
            scores[read].append(Score.of(next_token_nlls(model, *run)))
    return {read: total(found) for read, found in scores.items()}


def put_memory(folder: Path, form: InfiniParams, dtype: torch.dtype) -> PreTrainedModel:
    """Insert a form into the base, with the weights of a control if one is asked for.

    Raises:
        ValueError: if the form is more than a memory away from the base or the control.
    """
    model = load_base(BASE, dtype)
    form = replace(form, layers=resolve_layers(form.layers, model.config.num_hidden_layers))
    needed = {name: (value, "of the base") for name, value in PLAIN.items()}
    if folder != BASE:
        trained, plain = load_retrofit(BASE, folder, dtype, "dvc repro finetune_control")
        if plain.has_memory:
            raise ValueError(f"{folder} must be a model without a memory, got one that has one")
        needed |= {name: (getattr(plain, name), f"of {folder}") for name in ALIKE}
    for name, (value, whose) in needed.items():
        if (own := getattr(form, name)) != value:
            raise ValueError(f"infini.{name} must be that {whose}, {value}, got {own}")
    insert_infini(model, form)
    if folder != BASE:
        result = model.load_state_dict(trained.state_dict(), strict=False)
        assert not result.unexpected_keys, result.unexpected_keys
    return model.eval()


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    about = "Score a model with an untrained memory of fixed shares."
    parser = argparse.ArgumentParser(prog="python -m analysis.fixed_share", description=about)
    add = parser.add_argument
    place = "the base (default: %(default)s) or what was trained without a memory: models/control"
    add("model", nargs="?", type=Path, default=BASE, help=place)
    add("--shares", type=float, nargs="+", default=[0.02, 0.05, 0.1, 0.2], help="of the memory")
    add("--documents", type=int, default=2, help="test documents to score")
    options = parser.parse_args(arguments)
    if options.documents < 2:  # swapped memories need another one
        parser.error(f"--documents must be at least 2 documents, got {options.documents}")
    if not all(0 < share < 1 for share in options.shares):
        parser.error(
            "--shares must be above 0 and below 1, got " + " ".join(map(str, options.shares))
        )
    return options


if __name__ == "__main__":
    run_stage(main)
