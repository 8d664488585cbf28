"""What inserting costs before any training: the form of every recipe, on the real base and text.

Perplexity of test documents whose every layer is confined to its segment: of the base, and of
the base with each recipe's layers in it, the memory off and at its starting share. Prints a
table and writes nothing. Recipes of another base are left out.

Reads: recipes, params.yaml, models/base, data/longdocs
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from infini_retrofit.layer.form import InfiniParams
from infini_retrofit.layer.state import Read
from infini_retrofit.model.base import load_base
from infini_retrofit.model.retrofit import insert_infini
from infini_retrofit.pipeline.device import start_run
from infini_retrofit.pipeline.files import render, verify_manifest
from infini_retrofit.pipeline.guard import run_stage
from infini_retrofit.pipeline.params import read_params
from infini_retrofit.pipeline.tokens import read_documents
from infini_retrofit.scoring.score import score_segments, total
from recipes.overlays import check_recipe, read_overlay, recipe_names

BASE, DOCUMENTS = Path("models/base"), Path("data/longdocs/test.parquet")
HEADER = ["recipe, untrained", "base", "memory off", "ratio", "memory on", "ratio"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Score the forms and print the table."""
    options = _options(arguments)
    verify_manifest(BASE, made_by="dvc repro prepare_base")
    documents = read_documents(DOCUMENTS, options.documents)
    place = start_run()
    plain: dict[int, float] = {}
    rows = []
    for name, form in forms_of(options.names, read_params()).items():
        length = form.segment_length
        if length not in plain:
            base = InfiniParams(layers=[], segment_length=length)
            plain[length] = perplexities(base, documents, ["own"], place)[0]
        rows.append([name, f"{plain[length]:.2f}"])
        for ppl in perplexities(form, documents, ["off", "own"], place):
            rows[-1] += [f"{ppl:.2f}", f"{ppl / plain[length]:.4f}"]
        print(render(HEADER, rows), file=sys.stderr)
    print(render(HEADER, rows))


def perplexities(
    form: InfiniParams,
    documents: Int[Tensor, "B T"],
    reads: Sequence[Read],
    place: tuple[torch.device, torch.dtype],
) -> list[float]:
    """Insert a form into the base and score documents, once for each memory read."""
    device, dtype = place
    model = load_base(BASE, dtype).to(device)
    insert_infini(model, form)
    scores = (score_segments(model, documents, form.segment_length, read) for read in reads)
    return [total(score).ppl for score in scores]


def forms_of(names: Sequence[str], params: Mapping[str, Any]) -> dict[str, InfiniParams]:
    """Return the form of each recipe that starts from the base in params.yaml."""
    forms = {}
    for name in names:
        check_recipe(name)
        overlay = read_overlay(name)
        if overlay.get("model", params["model"]) == params["model"]:
            own = {
                k.removeprefix("infini."): v for k, v in overlay.items() if k.startswith("infini.")
            }
            forms[name] = InfiniParams(**params["infini"] | own)
    return forms


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    about = "Score the form of every recipe on the base before any training."
    parser = argparse.ArgumentParser(prog="python -m analysis.zero_cost", description=about)
    parser.add_argument("names", nargs="*", help="recipes; all of them if none is named")
    parser.add_argument("--documents", type=int, default=2, help="test documents to score")
    options = parser.parse_args(arguments)
    if options.documents < 1:
        parser.error(f"--documents must be at least 1 document, got {options.documents}")
    options.names = options.names or recipe_names()
    return options


if __name__ == "__main__":
    run_stage(main)
