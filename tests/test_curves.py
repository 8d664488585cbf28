"""What a run leaves beside weights: its curves and results, even where nothing trains."""

import csv
from pathlib import Path

import pytest
import torch

from infini_retrofit.training.finetuning import FinetuneParams
from tests.tiny_training import finetuning, run


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file, delimiter="\t"))


@pytest.mark.parametrize(
    ("form", "over", "reason"),
    [
        ({"memory": "off"}, {"trainable": "memory"}, "no parameter is to train"),
        ({}, {"epochs": 0}, "its epochs are 0"),
    ],
)
def test_where_nothing_trains_the_model_is_only_validated_and_that_is_said(
    form, over, reason, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(FinetuneParams, "least_epochs", 0)
    trainee = finetuning(form=form, **over)
    before = {name: tensor.clone() for name, tensor in trainee.model.state_dict().items()}
    metrics = run(trainee, tmp_path, **over)
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1] == f"finetune: nothing is trained, because {reason}"
    assert all(torch.equal(x, before[n]) for n, x in trainee.model.state_dict().items())
    assert (metrics["best_epoch"], metrics["epochs_run"]) == (0, 0)
    assert metrics["num_trained_tokens"] == 0
    (row,) = rows_of(tmp_path / "history.tsv")
    assert row == {
        "epoch": "0",
        "split": "val",
        "loss": str(metrics["val_loss"]),
        "ppl": str(metrics["val_ppl"]),
    }
    assert not (tmp_path / "run").exists()


def test_how_the_memory_is_used_is_written_for_each_epoch_and_reported_of_the_best(tmp_path):
    metrics = run(finetuning(), tmp_path, epochs=2)
    rows = rows_of(tmp_path / "memory.tsv")
    assert {row["epoch"] for row in rows} == {"0", "1", "2"}
    numbers = [
        {row["quantity"]: float(row["value"]) for row in rows if row["epoch"] == str(epoch)}
        for epoch in (0, metrics["best_epoch"])
    ]
    start, best = numbers
    assert {"memory_share_mean", "recalled_over_local", "segment_off_val_ppl"} <= set(best)
    assert best["segment_val_ppl"] == pytest.approx(metrics["val_ppl"], rel=1e-5)
    assert best == {name: metrics[name] for name in best}
    assert start["memory_share_mean"] == pytest.approx(0.3, rel=1e-4)
    assert start != best


def test_a_model_without_a_memory_leaves_a_table_without_rows(tmp_path):
    metrics = run(finetuning(form={"memory": "off"}), tmp_path, epochs=1)
    assert (tmp_path / "memory.tsv").read_text() == "epoch\tquantity\tvalue\n"
    assert not any("memory" in name for name in metrics)
