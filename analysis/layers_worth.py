"""In which layers far sight is worth what: the base sees far in some layers, a window in others.

A window of 256 to 512 tokens, the document's first token with it, confines the other layers. Prints
a table and the rows of results/layers_worth.tsv.

Reads: params.yaml (corpora), models/base
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd
import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from analysis.context_worth import corpus_options, draw_documents
from analysis.programs import BASE, open_model, print_growing
from infini_retrofit.evaluation.bootstrap import paired_bootstrap
from infini_retrofit.evaluation.rival import Rival, make_windowed
from infini_retrofit.model.running import run_in_layer
from infini_retrofit.pipeline.files import verify_manifest, write_text
from infini_retrofit.scoring.score import next_token_nlls
from infini_retrofit.texts.splits import Document, group_of

SEGMENT, WINDOW = 256, 256  # tokens; a segment sees its own and the window before it
TOKENS = 4096  # of a document
BEGIN = 2 * SEGMENT  # the first token that has anything behind its window
ROWS = Path("results/layers_worth.tsv")
NOWHERE, EVERYWHERE = "none", "all"  # groups of layers that see far


def main(arguments: Sequence[str] | None = None) -> None:
    """Score the base with far sight in each group of layers, a row as soon as it is there."""
    about = "Score the untouched base with far sight in some of its layers only."
    options = corpus_options("layers_worth", about, arguments)
    verify_manifest(BASE, made_by="dvc repro prepare_base")
    model, _ = open_model(BASE)
    documents = draw_documents(options.corpus, options.documents, TOKENS)
    groups = layer_groups(model.config.num_hidden_layers)
    scores: dict[str, pd.Series] = {}

    def rows() -> Iterator[list[str]]:
        for name, far in groups.items():
            scores[name] = score_documents(model, documents, far, name)
            if name != NOWHERE:
                yield cells(name, scores)

    print_growing(["far sight in layers", "nats a token won", "95% interval", "of all"], rows())
    table = pd.DataFrame(scores).melt(var_name="layers", value_name="nll", ignore_index=False)
    write_text(ROWS, table.to_csv(sep="\t", index_label="source", float_format="%.6f"))


def layer_groups(num_layers: int) -> dict[str, list[int]]:
    """Return the groups of layers that see far: none, all, the thirds and pairs of thirds."""
    first, second = num_layers // 3, 2 * num_layers // 3
    ranges = [(0, first), (first, second), (second, num_layers), (0, second), (first, num_layers)]
    groups = {f"{begin} to {end - 1}": list(range(begin, end)) for begin, end in ranges}
    last = {f"{num_layers - 1}": [num_layers - 1]}
    return {NOWHERE: [], EVERYWHERE: list(range(num_layers)), **groups, **last}


@torch.inference_mode()
def score_documents(
    model: PreTrainedModel, documents: Sequence[Document], far: Sequence[int], name: str
) -> pd.Series:
    """Return the mean NLL of each document's tokens from `BEGIN` on, by its source."""
    confined = [i for i in range(model.config.num_hidden_layers) if i not in far]
    form = Rival(segment_length=SEGMENT, num_tokens=0, local_context=WINDOW, layers=confined)
    windowed, nlls = make_windowed(model, form), []
    for document in tqdm(documents, desc=f"far sight: {name}", leave=False):
        ids = torch.from_numpy(document.input_ids).long().to(model.device)
        hidden = run_in_layer(windowed, ids[None], segment_length=SEGMENT)[0]
        found = next_token_nlls(model, ids[BEGIN - 1 :], hidden[BEGIN - 1 :])
        nlls.append(found.double().mean().item())
    return pd.Series(nlls, [group_of(document) for document in documents])


def cells(name: str, scores: dict[str, pd.Series]) -> list[str]:
    """Write what far sight in some layers wins, and the share of what it wins in all."""
    sources = list(scores[NOWHERE].index)
    gain, low, high = paired_bootstrap((scores[NOWHERE] - scores[name]).to_numpy(), sources)
    whole = (scores[NOWHERE] - scores[EVERYWHERE]).mean()
    return [name, f"{gain:.4f}", f"{low:.4f} to {high:.4f}", f"{gain / whole:.0%}"]
