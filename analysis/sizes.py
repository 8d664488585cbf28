"""What a neural cache wins by its size: keys of fewer or more numbers, each memory trained anew.

The attention is that of models/finetuned. Each memory trains on the last documents, as the second
part of the stage finetune does (`finetune.memory_documents`). Beside it stand the control and the
control's rivals of as many bytes. Prints a table.

Reads:  params.yaml (finetune), data/longdocs, models/base, models/control, models/finetuned
Writes: results/sizes.tsv
"""

import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from analysis.programs import BASE, DOCUMENTS, at_least, make_parser, open_documents, print_growing
from infini_retrofit.evaluation.bootstrap import paired_bootstrap
from infini_retrofit.evaluation.rival import make_rival, make_selected, rival_of
from infini_retrofit.layer.form import InfiniParams
from infini_retrofit.layer.probe import Probe, Read
from infini_retrofit.model.base import load_base, vocab_size
from infini_retrofit.model.checkpoints import load_retrofit, save_retrofit
from infini_retrofit.model.retrofit import BRANCH, infini_modules, insert_infini
from infini_retrofit.model.running import run_folded
from infini_retrofit.pipeline.device import start_run
from infini_retrofit.pipeline.files import verify_manifest, write_text
from infini_retrofit.pipeline.params import load_section
from infini_retrofit.pipeline.tokens import read_documents, read_sources
from infini_retrofit.scoring.score import next_token_nlls
from infini_retrofit.training.finetuning import FinetuneParams, finetuning_parts
from infini_retrofit.training.loop import train

FINETUNED, CONTROL = Path("models/finetuned"), Path("models/control")
TRAIN, VAL = (DOCUMENTS.with_stem(name) for name in ("train", "val"))
NUM_FEATURES = (8, 16, 32)  # numbers of a key
RIVALS = {"recent keys": make_rival, "selected keys": make_selected}
ROWS = Path("results/sizes.tsv")


def main(arguments: Sequence[str] | None = None) -> None:
    """Train and score each size, and print a row of the table as soon as it is there."""
    about = "Train the neural cache of models/finetuned anew with keys of other sizes."
    parser = make_parser("sizes", about, least_documents=2)
    parser.add_argument(
        "--features",
        type=at_least(2, "numbers"),
        nargs="+",
        default=NUM_FEATURES,
        help="numbers of a key",
    )
    options = parser.parse_args(arguments)
    params = load_section(FinetuneParams, "finetune")
    documents = open_documents(options.documents)
    sources = read_sources(DOCUMENTS, options.documents)
    verify_manifest(FINETUNED, made_by="dvc repro finetune")
    verify_manifest(CONTROL, made_by="dvc repro finetune_control")
    device, dtype = start_run()
    model, form = load_retrofit(BASE, FINETUNED, dtype)
    if form.update_rule != "neural_cache" or not params.memory_documents:
        raise ValueError(
            "models/finetuned must have a neural cache that trained last, as after the recipe "
            f"code-neural-cache, got {form.update_rule} and finetune.memory_documents "
            f"{params.memory_documents}"
        )
    control = load_retrofit(BASE, CONTROL, dtype)[0].to(device)
    documents, length, found = documents.to(device), form.segment_length, []
    against = {
        "itself off": score(model.to(device), documents, length, "off"),
        "the control": score(control, documents, length),
    }

    def rows() -> Iterator[list[str]]:
        for num_features in options.features:
            own_form = replace(form, num_features=num_features)
            # What training says stays out of the table.
            with TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
                own = train_memory(own_form, params, device, dtype, Path(folder))
            rival = rival_of(control, own_form)
            others = against | {
                name: score(make(control, rival), documents, length)
                for name, make in RIVALS.items()
            }
            nlls = score(own, documents, length)
            gains = pd.DataFrame({name: (nll - nlls).tolist() for name, nll in others.items()})
            size = sum(m.state_bytes for m in infini_modules(own).values() if m.memory is not None)
            found.append(gains.assign(numbers=num_features, bytes=size, source=sources))
            intervals = (paired_bootstrap(gains[name].to_numpy(), sources) for name in gains)
            yield [
                str(num_features),
                f"{size:,}",
                *(f"{gain:.3f} [{low:.3f}, {high:.3f}]" for gain, low, high in intervals),
            ]

    over = [f"over {name}" for name in (*against, *RIVALS)]
    print_growing(["numbers of a key", "bytes", *over], rows())
    write_text(ROWS, pd.concat(found).to_csv(sep="\t", index=False, float_format="%.6f"))


def train_memory(
    form: InfiniParams,
    params: FinetuneParams,
    device: torch.device,
    dtype: torch.dtype,
    folder: Path,
) -> PreTrainedModel:
    """Train a memory of a form beside the attention of models/finetuned; return the model."""
    model = with_attention_of(FINETUNED, form).to(device)
    num_ids = vocab_size(BASE)
    train_documents = read_documents(TRAIN, num_ids, params.train_documents)
    val_documents = read_documents(VAL, num_ids, params.val_documents)
    *_, last = finetuning_parts(model, form, params, train_documents, dtype)
    train([last], val_documents, params, folder / "run", folder / "history.tsv")
    save_retrofit(model, form, BASE, folder / "model")
    return load_retrofit(BASE, folder / "model", dtype)[0].to(device)


def with_attention_of(folder: Path, form: InfiniParams) -> PreTrainedModel:
    """Return a retrofit of a form whose branches start anew and whose other weights are trained."""
    trained, _ = load_retrofit(BASE, folder, torch.float32)
    model = load_base(BASE, torch.float32)
    insert_infini(model, form)
    own = {k: x for k, x in trained.state_dict().items() if f".{BRANCH}." not in k}
    strange = model.load_state_dict(own, strict=False)
    assert not strange.unexpected_keys, strange
    assert all(f".{BRANCH}." in name for name in strange.missing_keys), strange
    return model


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
