"""The parameters of training sections, and the tables, results and lines made from a log."""

import math

import pytest

from infini_retrofit.scoring.score import perplexity
from infini_retrofit.training.report import (
    by_epoch,
    epoch_line,
    history,
    joined,
    memory_history,
    results,
)

LOG = [
    {"epoch": 0, "eval_val_loss": 1.0, "eval_val_ppl": 2.7, "eval_memory_share_mean": 0.1},
    {"epoch": 1.0, "loss": 2.0, "grad_norm": 3.0, "learning_rate": 0.1},
    {"epoch": 1.0, "eval_val_loss": 2.5, "eval_val_ppl": 12.0, "eval_memory_share_mean": 0.2},
    {"epoch": 2.0, "loss": 1.5, "grad_norm": 3.0, "learning_rate": 0.1},
    {"epoch": 2.0, "eval_val_loss": 2.9, "eval_val_ppl": 18.04, "eval_memory_share_mean": 0.3},
    {"epoch": 2.0, "train_runtime": 3.0, "total_flos": 0.0},
]


def test_history_is_one_row_an_epoch_and_split():
    assert history(LOG[:3] + LOG[4:], perplexity) == [
        {"epoch": 0, "split": "val", "loss": 1.0, "ppl": 2.7},
        {"epoch": 1, "split": "train", "loss": 2.0, "ppl": pytest.approx(math.exp(2))},
        {"epoch": 1, "split": "val", "loss": 2.5, "ppl": 12.0},
        {"epoch": 2, "split": "val", "loss": 2.9, "ppl": 18.04},
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
    assert results(log, num_tokens=7, past=[]) == {
        "val_loss": loss,
        "val_ppl": ppl,
        "best_epoch": best_epoch,
        "epochs_run": epochs_run,
        "num_trained_tokens": 7 * epochs_run,
        "memory_share_mean": share,
    }


def test_epochs_of_a_second_part_count_on():
    rows = history(joined(LOG, LOG), perplexity)
    assert [row["epoch"] for row in rows] == [0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert [row["loss"] for row in rows[5:]] == [row["loss"] for row in rows[1:5]]
    counted = results(LOG, num_tokens=7, past=LOG)
    assert counted == results(LOG, num_tokens=7, past=[]) | {"best_epoch": 3, "epochs_run": 4}


@pytest.mark.parametrize(
    ("num_entries", "train_ppl", "line"),
    [
        (1, perplexity, "epoch 0/50  val_ppl 2.7  28.8 s"),
        (3, perplexity, "epoch 1/50  train_ppl 7.389  val_ppl 12  28.8 s  *"),
        (5, perplexity, "epoch 2/50  train_ppl 4.482  val_ppl 18.04  28.8 s"),
        (3, lambda _: "", "epoch 1/50  train_loss 2  val_loss 2.5  val_ppl 12  28.8 s  *"),
    ],
)
def test_the_line_of_an_epoch_has_a_star_where_it_is_the_best_so_far(num_entries, train_ppl, line):
    assert epoch_line(by_epoch(LOG[:num_entries]), 50, train_ppl, 28.84) == line


def test_a_perplexity_is_finite_however_bad_the_model():
    assert perplexity(2.0) == math.exp(2)
    assert perplexity(1e9) == perplexity(701.0) == math.exp(700) < math.inf
