"""The parameters of training sections, and the tables and results made from a log."""

import math

import pytest

from infini_retrofit.scoring.score import perplexity
from infini_retrofit.training.finetuning import LrScale
from infini_retrofit.training.parameters import LoraParams
from infini_retrofit.training.trainee import history, memory_history, results
from tests.tiny_training import distill_params, finetune_params

LOG = [
    {"epoch": 0, "eval_val_loss": 1.0, "eval_val_ppl": 2.7, "eval_memory_share_mean": 0.1},
    {"epoch": 1.0, "loss": 2.0, "grad_norm": 3.0, "learning_rate": 0.1},
    {"epoch": 1.0, "eval_val_loss": 2.5, "eval_val_ppl": 12.0, "eval_memory_share_mean": 0.2},
    {"epoch": 2.0, "eval_val_loss": 2.9, "eval_val_ppl": 18.0, "eval_memory_share_mean": 0.3},
    {"epoch": 2.0, "train_runtime": 3.0, "total_flos": 0.0},
]


def test_history_is_one_row_an_epoch_and_split():
    assert history(LOG, perplexity) == [
        {"epoch": 0, "split": "val", "loss": 1.0, "ppl": 2.7},
        {"epoch": 1, "split": "train", "loss": 2.0, "ppl": pytest.approx(math.exp(2))},
        {"epoch": 1, "split": "val", "loss": 2.5, "ppl": 12.0},
        {"epoch": 2, "split": "val", "loss": 2.9, "ppl": 18.0},
    ]


def test_what_else_was_validated_is_a_row_for_each_epoch_and_number():
    assert memory_history(LOG) == [
        {"epoch": epoch, "quantity": "memory_share_mean", "value": value}
        for epoch, value in enumerate((0.1, 0.2, 0.3))
    ]


@pytest.mark.parametrize(
    ("log", "loss", "ppl", "best_epoch", "epochs_run", "share"),
    [(LOG, 2.5, 12.0, 1, 2, 0.2), (LOG[:1], 1.0, 2.7, 0, 0, 0.1)],
)
def test_results_are_those_of_the_best_epoch_and_of_the_start_only_if_nothing_trained(
    log, loss, ppl, best_epoch, epochs_run, share
):
    assert results(log, num_tokens=7) == {
        "val_loss": loss,
        "val_ppl": ppl,
        "best_epoch": best_epoch,
        "epochs_run": epochs_run,
        "num_trained_tokens": 7 * epochs_run,
        "memory_share_mean": share,
    }


def test_a_perplexity_is_finite_however_bad_the_model():
    assert perplexity(2.0) == math.exp(2)
    assert perplexity(1e9) == perplexity(701.0) == math.exp(700) < math.inf


LEAST = {
    distill_params: {"batch_size": 1, "epochs": 0, "patience": 1, "samples": 1, "val_samples": 1}
    | {"tokens_per_sample": 2, "seed": 0},
    finetune_params: {"batch_size": 1, "epochs": 1, "patience": 1, "kl_weight": 1.0, "seed": 0}
    | {"train_documents": 1, "val_documents": 1, "lora": LoraParams(rank=1, alpha=0.1)}
    | {"lr_scale": LrScale(memory=0.0, infini=0.0, rest=0.0)},
}


@pytest.mark.parametrize(
    ("make", "change", "message"),
    [
        (distill_params, {"epochs": -1}, r"^distill\.epochs must be at least 0, got -1$"),
        (finetune_params, {"epochs": 0}, r"^finetune\.epochs must be at least 1, got 0$"),
        (distill_params, {"lr": 0.0}, r"^distill\.lr must be greater than 0, got 0\.0$"),
        (distill_params, {"samples": 0}, r"^distill\.samples must be at least 1, got 0$"),
        (distill_params, {"val_samples": 0}, r"^distill\.val_samples must be at least 1, got 0$"),
        (distill_params, {"tokens_per_sample": 1}, r"^distill\.tokens_per_sample .* 2, got 1$"),
        (finetune_params, {"batch_size": 0}, r"^finetune\.batch_size must be at least 1, got 0$"),
        (finetune_params, {"patience": 0}, r"^finetune\.patience must be at least 1, got 0$"),
        (finetune_params, {"seed": -1}, r"^finetune\.seed must be at least 0, got -1$"),
        (finetune_params, {"seed": 2**32}, r"^finetune\.seed must be below 2\*\*32, got 4294967"),
        (finetune_params, {"train_documents": 0}, r"^finetune\.train_documents must be .* got 0$"),
        (finetune_params, {"val_documents": 0}, r"^finetune\.val_documents must be .* got 0$"),
        (finetune_params, {"kl_weight": -0.1}, r"^finetune\.kl_weight must be in 0\.\.1, got -0"),
        (finetune_params, {"kl_weight": 1.1}, r"^finetune\.kl_weight must be in 0\.\.1, got 1\.1$"),
        (
            finetune_params,
            {"label_shift": 2},
            r"^finetune\.kl_weight must be 0 when finetune\.label_shift is 2, .*, got 1\.0$",
        ),
    ],
)
def test_bad_parameters_are_refused_by_name_and_the_least_good_ones_are_not(make, change, message):
    assert make(**LEAST[make])
    with pytest.raises(ValueError, match=message):
        make(**LEAST[make] | change)


@pytest.mark.parametrize("name", ["memory", "infini", "rest"])
def test_a_negative_learning_rate_scale_is_refused(name):
    message = rf"^finetune\.lr_scale\.{name} must be at least 0, got -1\.0$"
    with pytest.raises(ValueError, match=message):
        LrScale(**{"memory": 1.0, "infini": 1.0, "rest": 1.0} | {name: -1.0})


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
