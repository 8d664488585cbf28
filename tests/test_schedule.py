"""What all training stages share: their parameters' doors, and the history they write."""

import math

import pytest

from infini_retrofit.training.distillation import DistillParams
from infini_retrofit.training.finetuning import FinetuneParams
from infini_retrofit.training.parameters import LoraParams
from infini_retrofit.training.schedule import FullLrScale, LrScale
from infini_retrofit.training.trainee import history, memory_history, ppl_of_nll, results

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
        {
            "epochs": 0,
            "objective": "layer_output",
            "trainable": "infini",
            "samples": 1,
            "val_samples": 1,
            "tokens_per_sample": 2,
            "lr_scale": LrScale(memory=0.0, infini=0.0),
        },
    ),
    "finetune": (
        FinetuneParams,
        {
            "trainable": "all",
            "lora": LoraParams(rank=1, alpha=0.1),
            "kl_weight": 1.0,
            "kl_context": "segment",
            "num_segments": "all",
            "train_documents": 1,
            "val_documents": 1,
            "lr_scale": FullLrScale(memory=0.0, infini=0.0, rest=0.0),
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


MEMORY_LOG = [
    {"epoch": 0, "eval_val_loss": 1.0, "eval_val_ppl": 2.7, "eval_memory_share_mean": 0.1},
    {"epoch": 1.0, "loss": 2.0, "grad_norm": 3.0},
    {"epoch": 1.0, "eval_val_loss": 2.5, "eval_val_ppl": 12.0, "eval_memory_share_mean": 0.2},
    {"epoch": 2.0, "eval_val_loss": 2.9, "eval_val_ppl": 18.0, "eval_memory_share_mean": 0.3},
    {"epoch": 2.0, "train_runtime": 3.0, "total_flos": 0.0},
]


def test_what_else_was_validated_is_a_row_for_each_epoch_and_number():
    assert memory_history(MEMORY_LOG) == [
        {"epoch": epoch, "quantity": "memory_share_mean", "value": value}
        for epoch, value in enumerate((0.1, 0.2, 0.3))
    ]


def test_results_are_those_of_the_best_epoch_but_not_of_the_start():
    assert results(MEMORY_LOG, num_tokens=7) == {
        "val_loss": 2.5,
        "val_ppl": 12.0,
        "best_epoch": 1,
        "epochs_run": 2,
        "num_trained_tokens": 14,
        "memory_share_mean": 0.2,
    }


def test_a_run_that_trained_nothing_has_the_start_for_its_result():
    assert results(MEMORY_LOG[:1], num_tokens=7) == {
        "val_loss": 1.0,
        "val_ppl": 2.7,
        "best_epoch": 0,
        "epochs_run": 0,
        "num_trained_tokens": 0,
        "memory_share_mean": 0.1,
    }


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("distill", {"epochs": -1}, r"distill\.epochs must be at least 0, got -1"),
        ("finetune", {"epochs": 0}, r"finetune\.epochs must be at least 1, got 0"),
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
        ("finetune", {"kl_weight": -0.1}, r"finetune\.kl_weight must be in 0\.\.1, got -0\.1"),
        ("finetune", {"kl_weight": 1.1}, r"finetune\.kl_weight must be in 0\.\.1, got 1\.1"),
        (
            "finetune",
            {"label_shift": 2},
            r"finetune\.kl_weight must be 0 when finetune\.label_shift is 2, .*, got 1\.0",
        ),
    ],
)
def test_bad_parameters_are_refused_by_name_and_the_least_good_ones_are_not(
    section, change, message
):
    cls, own = SECTIONS[section]
    assert cls(**SCHEDULE | own)
    with pytest.raises(ValueError, match=message):
        cls(**SCHEDULE | own | change)


@pytest.mark.parametrize(
    ("section", "scale", "name"),
    [
        ("distill", LrScale(memory=-1.0, infini=1.0), "memory"),
        ("distill", LrScale(memory=1.0, infini=-1.0), "infini"),
        ("finetune", FullLrScale(memory=1.0, infini=1.0, rest=-1.0), "rest"),
    ],
)
def test_a_negative_learning_rate_scale_is_refused(section, scale, name):
    cls, own = SECTIONS[section]
    message = rf"{section}\.lr_scale\.{name} must be at least 0, got -1\.0"
    with pytest.raises(ValueError, match=message):
        cls(**SCHEDULE | own | {"lr_scale": scale})


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ({"rank": 0, "alpha": 1.0}, r"finetune\.lora\.rank must be at least 1, got 0"),
        ({"rank": 1, "alpha": 0.0}, r"finetune\.lora\.alpha must be greater than 0, got 0\.0"),
    ],
)
def test_adapters_that_could_change_nothing_are_refused(size, message):
    with pytest.raises(ValueError, match=message):
        LoraParams(**size)
