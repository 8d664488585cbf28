"""How much a finished model's neural cache wins with fewer slots, beside rivals of equal bytes.

The model was trained with all slots; the rivals are its control's. Prints a table.

Reads:  data/longdocs, models/base, models/control, models/finetuned
Writes: results/slots.tsv
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from analysis.programs import BASE, DOCUMENTS, make_parser, open_documents, print_growing
from infini_retrofit.evaluation.bootstrap import paired_bootstrap
from infini_retrofit.evaluation.rival import make_rival, make_selected, rival_of
from infini_retrofit.layer.attention import InfiniAttention
from infini_retrofit.layer.form import InfiniParams
from infini_retrofit.layer.probe import Probe, Read
from infini_retrofit.model.checkpoints import load_retrofit
from infini_retrofit.model.retrofit import infini_modules
from infini_retrofit.model.running import run_folded
from infini_retrofit.pipeline.device import start_run
from infini_retrofit.pipeline.files import verify_manifest, write_text
from infini_retrofit.pipeline.tokens import read_sources
from infini_retrofit.scoring.score import next_token_nlls

FINETUNED, CONTROL = Path("models/finetuned"), Path("models/control")
BYTES = (50_000, 100_000, 200_000)  # at most; then all that the model has
RIVALS = {"recent keys": make_rival, "selected keys": make_selected}
ROWS = Path("results/slots.tsv")


def main(arguments: Sequence[str] | None = None) -> None:
    """Score the model with each size, and print a row of the table as soon as it is there."""
    about = "Score models/finetuned, a neural cache, with fewer slots, and rivals as large."
    options = make_parser("slots", about, least_documents=2).parse_args(arguments)
    documents = open_documents(options.documents)
    sources = read_sources(DOCUMENTS, options.documents)
    verify_manifest(FINETUNED, made_by="dvc repro finetune")
    verify_manifest(CONTROL, made_by="dvc repro finetune_control")
    device, dtype = start_run()
    model, form = load_retrofit(BASE, FINETUNED, dtype)
    control, _ = load_retrofit(BASE, CONTROL, dtype)
    model, control, length = model.to(device), control.to(device), form.segment_length
    caches = [m for m in infini_modules(model).values() if m.memory and m.memory.num_slots]
    if len(caches) != 1:
        raise ValueError(f"models/finetuned must have one neural cache, got {len(caches)}")
    documents, found = documents.to(device), []
    against = {
        "itself off": score(model, documents, length, "off"),
        "control": score(control, documents, length),
    }

    def rows() -> Iterator[list[str]]:
        for num_slots in slots_of(caches[0]):
            caches[0].memory.num_slots = num_slots
            own, size = score(model, documents, length), caches[0].state_bytes
            others = against | score_rivals(control, documents, replace(form, num_slots=num_slots))
            gains = pd.DataFrame({name: (nll - own).tolist() for name, nll in others.items()})
            found.append(gains.assign(slots=num_slots, bytes=size, source=sources))
            intervals = (paired_bootstrap(gains[name].to_numpy(), sources) for name in gains)
            yield [
                f"{num_slots:,}",
                f"{size:,}",
                *(f"{gain:.3f} [{low:.3f}, {high:.3f}]" for gain, low, high in intervals),
            ]

    over = [f"over {name}" for name in (*against, *RIVALS)]
    print_growing(["tokens kept", "bytes", *over], rows())
    write_text(ROWS, pd.concat(found).to_csv(sep="\t", index=False, float_format="%.6f"))


def score_rivals(
    control: PreTrainedModel, documents: Int[Tensor, "B T"], form: InfiniParams
) -> dict[str, Float[Tensor, "B"]]:
    """Score a control that carries as many bytes of keys and values as a form's state has."""
    rival = rival_of(control, form)
    return {
        name: score(make(control, rival), documents, form.segment_length)
        for name, make in RIVALS.items()
    }


def slots_of(cache: InfiniAttention) -> list[int]:
    """Return how many slots fit each of `BYTES`, and all that the memory has."""
    most = cache.memory.num_slots
    per_slot = cache.state_bytes // most
    return [*(size // per_slot for size in BYTES if size < cache.state_bytes), most]


@torch.inference_mode()
def score(
    model: PreTrainedModel, documents: Int[Tensor, "B T"], segment_length: int, read: Read = "own"
) -> Float[Tensor, "B"]:
    """Return the mean NLL of each document that reads its own memory, or none."""
    nlls = []
    for ids in tqdm(documents, desc="documents", leave=False):
        hidden = run_folded(model, ids[None], segment_length, Probe(read=read))[0]
        nlls.append(next_token_nlls(model, ids, hidden).double().mean())
    return torch.stack(nlls)
