"""A project in which every stage takes seconds: few short texts and a base trained on them."""

import csv
import hashlib
import json
from importlib import import_module
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from ruamel.yaml import YAML
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from infini_retrofit.pipeline.params import read_params
from infini_retrofit.pipeline.schema import leaves
from tests.tiny import Family, tiny_model, tiny_tokenizer

ROOT = Path(__file__).parent.parent
TOKENS_PER_DOCUMENT, SEGMENT = 64, 16
NUM_TEXTS, TRAINING_STEPS = 40, 150
# A text is A3B3C3...: the digit is the same everywhere in it, but no segment knows it at once.
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
SMALL = dict(leaves(read_params(ROOT / "recipes/budget.yaml"))) | {  # the form as published
    "model": "my-model",
    "models.my-model.path": "own-model",
    "corpus": "my-texts",
    "corpora.my-texts.path": "own-texts",
    "corpora.my-texts.val_share": 0.3,
    "corpora.my-texts.test_share": 0.3,
    "longdocs.tokens_per_document": TOKENS_PER_DOCUMENT,
    "infini.segment_length": SEGMENT,
    "distill.samples": 8,
    "distill.val_samples": 2,
    "distill.tokens_per_sample": 2 * SEGMENT,
    "distill.epochs": 3,
    "distill.patience": 2,
    "finetune.train_documents": 4,
    "finetune.val_documents": 2,
    "finetune.batch_size": 1,
    "finetune.epochs": 2,
    "finetune.patience": 2,
    "finetune.lr": 2e-4,
    "eval.window": 32,
    "eval.stride": 16,
    "eval.sliding_tokens": 200,
    "eval.documents": 3,
    "longcontext.lengths": [352],
    "longcontext.pairs": [1],
    "longcontext.needles": [1],
    "longcontext.compressions": [1, 8],
    "longcontext.distance": 128,
    "longcontext.document_tokens": [128],
    "longcontext.baselines": ["streaming", "equal_bytes", "yarn"],
    "longcontext.window": 32,
}
LINEAR = {
    "infini.layers": [0],
    "infini.init": "random_attention",
    "infini.local": "linear",
    "infini.positions": "none",
    "infini.local_context": 0,
    "distill.objective": "layer_output",
    "finetune.trainable": "infini",
}
PUBLISHED = {
    "infini.layers": "all",
    "infini.init": "base",
    "infini.local": "softmax",
    "infini.positions": "rope",
    "infini.local_context": 4,
    "distill.objective": "attention_output",
    "finetune.trainable": "all",
}
PROJECTS = {"linear": LINEAR, "published": {"family": "gpt_neox", **PUBLISHED}}
both_projects = pytest.mark.parametrize("name", PROJECTS)
STAGES = [*YAML(typ="safe").load(ROOT / "dvc.yaml")["stages"]]


def write_params(folder: Path, changes: dict[str, object]) -> None:
    """Write the project's own parameters; change some by dotted name, or remove them by None."""
    params = YAML(typ="safe").load(ROOT / "params.yaml")
    for name, value in changes.items():
        *sections, key = name.split(".")
        table = params
        for section in sections:
            table = table[section]
        table.pop(key, None)
        if value is not None:
            table[key] = value
    YAML(typ="safe").dump(params, folder / "params.yaml")


def make_project(folder: Path, family: Family = "llama", **changes: object) -> None:
    """Write texts, a base that is trained on them, and params.yaml."""
    write_params(folder, SMALL | changes)
    texts, tokenizer = folder / "own-texts", tiny_tokenizer()
    texts.mkdir()
    for i in range(NUM_TEXTS):
        letters = (ALPHABET[(i + j) % len(ALPHABET)] for j in range(150 + 8 * (i % 7)))
        (texts / f"{i:02}.txt").write_text("".join(f"{letter}{i % 10}" for letter in letters))
    model = tiny_model(family, vocab_size=len(tokenizer))
    _train(model, tokenizer, texts)
    model.save_pretrained(folder / "own-model")
    tokenizer.save_pretrained(folder / "own-model")


def run_stage(stage: str) -> None:
    import_module(f"stages.{stage}").main()


def run_stages(folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("DVC_ROOT", raising=False)
        for stage in STAGES:
            run_stage(stage)


def contents(folder: Path) -> dict[str, str]:
    files = [p for p in folder.rglob("*") if p.is_file()]
    return {str(p.relative_to(folder)): hashlib.md5(p.read_bytes()).hexdigest() for p in files}


def _train(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, texts: Path) -> None:
    text = " ".join(path.read_text() for path in sorted(texts.iterdir()))
    ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False))
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(TRAINING_STEPS):
        begins = torch.randint(len(ids) - TOKENS_PER_DOCUMENT, (8,), generator=generator)
        batch = torch.stack([ids[b : b + TOKENS_PER_DOCUMENT] for b in begins])
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1]
        optimizer.zero_grad()
        F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).backward()
        optimizer.step()


def metrics_of(folder: Path, stage: str) -> dict:
    return json.loads((folder / "metrics" / f"{stage}.json").read_text())


def rows_of(folder: Path, stage: str) -> list[dict[str, str]]:
    with (folder / "plots" / f"{stage}.tsv").open() as file:
        return list(csv.DictReader(file, delimiter="\t"))
