"""What inserting costs before any training: the form of each recipe on the base.

Perplexity of test documents with every layer confined to its segment: of the base, and of the
base with the recipe's layers, their memory off and at its starting share. Prints a table and
writes nothing. Recipes of another base are left out.

Reads: recipes, params.yaml, models/base, data/longdocs
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

from analysis.programs import BASE, make_parser, open_documents, print_growing
from infini_retrofit.layer.form import InfiniParams
from infini_retrofit.layer.probe import Read
from infini_retrofit.model.base import load_base
from infini_retrofit.model.retrofit import insert_infini
from infini_retrofit.pipeline.device import start_run
from infini_retrofit.pipeline.params import read_params
from infini_retrofit.scoring.score import score_segments, total
from recipes.overlays import check_recipe, read_overlay, recipe_names

HEADER = ["recipe, untrained", "base", "memory off", "ratio", "memory on", "ratio of memory on"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Score the forms and print the table."""
    options = _options(arguments)
    forms = forms_of(options.names or recipe_names(), read_params())
    documents = open_documents(options.documents)
    device, dtype = start_run()

    def ppls(form: InfiniParams, *reads: Read) -> list[float]:
        """Score the base with a form, once for each memory to read."""
        model = load_base(BASE, dtype).to(device)
        insert_infini(model, form)
        scores = (score_segments(model, documents, form.segment_length, read) for read in reads)
        return [total(score).ppl for score in scores]

    @cache
    def base_ppl(length: int) -> float:
        return ppls(InfiniParams(layers=[], segment_length=length), "own")[0]

    def rows() -> Iterator[list[str]]:
        for name, form in forms.items():
            base = base_ppl(form.segment_length)
            off, own = ppls(form, "off", "own")
            cells = (f"{off:.2f}", f"{off / base:.4f}", f"{own:.2f}", f"{own / base:.4f}")
            yield [name, f"{base:.2f}", *cells]

    print_growing(HEADER, rows())


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
    about = "Score the form of each recipe on the base before any training."
    parser = make_parser("zero_cost", about)
    parser.add_argument("names", nargs="*", metavar="NAME", help="recipes; none: all")
    return parser.parse_args(arguments)
