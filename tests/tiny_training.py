"""Training runs that take a second: parameters, a model that trains, and the run itself."""

from dataclasses import replace
from pathlib import Path

import torch

from infini_retrofit.model.retrofit import insert_infini
from infini_retrofit.training.control import make_control
from infini_retrofit.training.distillation import Distillation, DistillParams
from infini_retrofit.training.finetuning import FinetuneParams, Finetuning, LrScale
from infini_retrofit.training.loop import train
from infini_retrofit.training.parameters import LoraParams
from infini_retrofit.training.task import TrainingTask
from tests.reference import infini_params
from tests.tiny import Family, random_ids, tiny_model

SEGMENT, NUM_SEGMENTS = 8, 4
TOKENS = NUM_SEGMENTS * SEGMENT
INFINI = infini_params(
    layers=[0], init="random_attention", local="linear", positions="none", segment_length=SEGMENT
)
SCHEDULE = {"epochs": 3, "lr": 1e-2, "patience": 3, "seed": 0}
FINETUNE = SCHEDULE | {
    "trainable": "infini",
    "lora": LoraParams(rank=2, alpha=4.0),
    "kl_weight": 0.0,
    "train_documents": 4,
    "memory_documents": 0,
    "val_documents": 3,
    "batch_size": 1,
    "lr_scale": LrScale(memory=1.0, infini=1.0, rest=0.5),
}
DISTILL = SCHEDULE | {
    "objective": "layer_output",
    "trainable": "infini",
    "samples": 6,
    "val_samples": 2,
    "tokens_per_sample": TOKENS,
    "batch_size": 2,
}


def finetune_params(**over: object) -> FinetuneParams:
    return FinetuneParams(**FINETUNE | over)


def finetuning(
    family: Family = "llama",
    form: dict | None = None,
    is_control: bool = False,
    dtype: torch.dtype = torch.float32,
    **over: object,
) -> Finetuning:
    """Make a tiny retrofit, or its control, with changes to its form and section `finetune`."""
    model, infini = tiny_model(family), replace(INFINI, **form or {})
    params = finetune_params(**over)
    (make_control if is_control else insert_infini)(model, infini)
    base = tiny_model(family) if params.kl_weight else None
    return Finetuning(model, infini, params, dtype, base)


def distillation(
    family: Family = "llama", form: dict | None = None, **over: object
) -> Distillation:
    """Make a tiny base whose Infini layers are to be distilled; arguments as for `finetuning`."""
    infini = replace(INFINI, **form or {})
    return Distillation(tiny_model(family), infini, DistillParams(**DISTILL | over), torch.float32)


def run(task: TrainingTask, folder: Path, **over: object) -> dict:
    """Train on random documents with changes to the section; the folder gets run and tables."""
    vocab_size = task.model.config.vocab_size
    if isinstance(task, Finetuning):
        params = finetune_params(**over)
    else:
        params = DistillParams(**DISTILL | over)
    return train(
        [(task, random_ids(vocab_size, 4, TOKENS))],
        random_ids(vocab_size, 3, TOKENS, seed=1),
        params,
        folder / "run",
        folder / "history.tsv",
        folder / "memory.tsv",
    )
