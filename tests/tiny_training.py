"""Training runs that take a second: parameters, a model that trains, and the run itself."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from infini_retrofit.model.retrofit import insert_infini
from infini_retrofit.training.distillation import DistillParams
from infini_retrofit.training.finetuning import FinetuneParams, Finetuning
from infini_retrofit.training.loop import train
from infini_retrofit.training.parameters import LoraParams
from infini_retrofit.training.schedule import FullLrScale, LrScale
from tests.reference import infini_params
from tests.tiny import Family, random_ids, tiny_model

SEGMENT, NUM_SEGMENTS = 8, 4
TOKENS = NUM_SEGMENTS * SEGMENT
INFINI = infini_params(
    layers=[0],
    init="random_attention",
    local="linear",
    positions="none",
    segment_length=SEGMENT,
)
SCHEDULE = {"epochs": 3, "lr": 1e-2, "patience": 3, "min_delta": 0.0, "seed": 0}
FINETUNE = SCHEDULE | {
    "trainable": "infini",
    "lora": LoraParams(rank=2, alpha=4.0),
    "kl_weight": 0.0,
    "kl_context": "segment",
    "num_segments": "all",
    "train_documents": 4,
    "val_documents": 3,
    "batch_size": 1,
    "lr_scale": FullLrScale(memory=1.0, infini=1.0, rest=0.5),
}
DISTILL = SCHEDULE | {
    "objective": "layer_output",
    "trainable": "infini",
    "lr_scale": LrScale(memory=1.0, infini=1.0),
    "samples": 6,
    "val_samples": 2,
    "tokens_per_sample": TOKENS,
    "batch_size": 2,
}


def finetune_params(**over: object) -> FinetuneParams:
    """Return section `finetune` with some fields changed."""
    return FinetuneParams(**FINETUNE | over)


def distill_params(**over: object) -> DistillParams:
    """Return section `distill` with some fields changed."""
    return DistillParams(**DISTILL | over)


def finetuning(family: Family = "llama", form: dict | None = None, **over: object) -> Finetuning:
    """Make a tiny retrofit that is to be fine-tuned.

    Args:
        family: of the base.
        form: changes to the retrofit's form.
        over: changes to section `finetune`.
    """
    model, infini = tiny_model(family), replace(INFINI, **form or {})
    insert_infini(model, infini)
    params = finetune_params(**over)
    base = tiny_model(family) if params.kl_weight else None
    return Finetuning(model, infini, params, torch.float32, base)


def run(trainee: Finetuning, folder: Path, **over: object) -> dict:
    """Fine-tune on random documents; the folder gets the run and its curves."""
    vocab_size = trainee.model.config.vocab_size
    return train(
        trainee,
        random_ids(vocab_size, 4, TOKENS),
        random_ids(vocab_size, 3, TOKENS, seed=1),
        finetune_params(**over),
        folder / "run",
        folder / "history.tsv",
        folder / "memory.tsv",
    )


def die_in_the_third_validation(trainee: Finetuning, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a run end as if it had been killed, its first epoch saved."""
    validate, calls = trainee.validate, []

    def count_and_die(val: torch.Tensor) -> dict[str, float]:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return validate(val)

    monkeypatch.setattr(trainee, "validate", count_and_die)
