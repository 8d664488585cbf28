"""What all training stages share: their parameters' doors, and the history they write."""

import math

import pytest

from infini_retrofit.distillation import DistillParams
from infini_retrofit.finetuning import FinetuneParams, LrScale
from infini_retrofit.history import history, ppl_of_nll

SCHEDULE = {
    "batch_size": 1,
    "epochs": 1,
    "lr": 1e-2,
    "patience": 1,
    "min_delta": 0.0,
    "seed": 0,
}
SECTIONS = {
    "distill": (
        DistillParams,
        {"objective": "layer_output", "samples": 1, "val_samples": 1, "tokens_per_sample": 2},
    ),
    "finetune": (
        FinetuneParams,
        {
            "trainable": "all",
            "train_documents": 1,
            "val_documents": 1,
            "lr_scale": LrScale(infini=0.0, rest=0.0),
        },
    ),
}


def test_history_is_one_row_an_epoch_and_split():
    log = [
        {"epoch": 0, "eval_val_loss": 3.0, "eval_val_ppl": 20.0},
        {"epoch": 1.0, "loss": 2.0, "learning_rate": 0.1},
        {"epoch": 1.0, "eval_val_loss": 2.5, "eval_val_ppl": 12.0},
        {"epoch": 1.0, "train_runtime": 3.0},
    ]
    assert history(log, ppl_of_nll) == [
        {"epoch": 0, "split": "val", "loss": 3.0, "ppl": 20.0},
        {"epoch": 1, "split": "train", "loss": 2.0, "ppl": pytest.approx(math.exp(2))},
        {"epoch": 1, "split": "val", "loss": 2.5, "ppl": 12.0},
    ]


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("distill", {"epochs": 0}, r"distill\.epochs must be at least 1, got 0"),
        ("distill", {"lr": 0.0}, r"distill\.lr must be greater than 0, got 0\.0"),
        ("distill", {"samples": 0}, r"distill\.samples must be at least 1, got 0"),
        ("distill", {"val_samples": 0}, r"distill\.val_samples must be at least 1, got 0"),
        ("distill", {"tokens_per_sample": 1}, r"distill\.tokens_per_sample must be at least 2"),
        ("finetune", {"batch_size": 0}, r"finetune\.batch_size must be at least 1, got 0"),
        ("finetune", {"patience": 0}, r"finetune\.patience must be at least 1, got 0"),
        ("finetune", {"min_delta": -1.0}, r"finetune\.min_delta must be at least 0, got -1\.0"),
        ("finetune", {"seed": -1}, r"finetune\.seed must be at least 0, got -1"),
        ("finetune", {"seed": 2**32}, r"finetune\.seed must be below 2\*\*32, got 4294967296"),
        ("finetune", {"train_documents": 0}, r"finetune\.train_documents must be at least 1"),
        ("finetune", {"val_documents": 0}, r"finetune\.val_documents must be at least 1, got 0"),
    ],
)
def test_bad_parameters_are_refused_by_name_and_the_least_good_ones_are_not(
    section, change, message
):
    cls, own = SECTIONS[section]
    assert cls(**SCHEDULE, **own)
    with pytest.raises(ValueError, match=message):
        cls(**SCHEDULE | own | change)


def test_a_negative_learning_rate_scale_is_refused():
    with pytest.raises(ValueError, match=r"finetune\.lr_scale\.rest must be at least 0, got -1"):
        LrScale(infini=1.0, rest=-1.0)
