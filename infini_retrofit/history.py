"""What the Trainer's log says of a run: its curves, and the results of its best epoch.

Knows the names that the Trainer logs under, and no path.
"""

import math
from collections.abc import Callable
from typing import Any

Row = dict[str, int | float | str]
PREFIX = "eval_"  # the Trainer's, of all that is validated
MEMORY_COLUMNS = ("epoch", "quantity", "value")
_OF_HISTORY = ("val_loss", "val_ppl")


def history(
    log: list[dict[str, Any]], ppl_of_train_loss: Callable[[float], float | str]
) -> list[Row]:
    """Turn the Trainer's log into one row for each epoch and split."""
    rows = {}
    for entry in log:
        epoch = round(entry.get("epoch", 0))
        if PREFIX + "val_loss" in entry:
            values = {"loss": entry[PREFIX + "val_loss"], "ppl": entry[PREFIX + "val_ppl"]}
            rows[epoch, "val"] = {"epoch": epoch, "split": "val"} | values
        elif "loss" in entry:
            values = {"loss": entry["loss"], "ppl": ppl_of_train_loss(entry["loss"])}
            rows[epoch, "train"] = {"epoch": epoch, "split": "train"} | values
    return [rows[key] for key in sorted(rows)]


def memory_history(log: list[dict[str, Any]]) -> list[Row]:
    """Turn what else was validated, how the memory is used, into a row for each number."""
    rows = {}
    for entry in log:
        epoch = round(entry.get("epoch", 0))
        if PREFIX + "val_loss" not in entry:
            continue
        for key, value in entry.items():
            name = key.removeprefix(PREFIX)
            if key.startswith(PREFIX) and name not in _OF_HISTORY:
                row = (epoch, name, value)
                rows[epoch, name] = dict(zip(MEMORY_COLUMNS, row, strict=True))
    return [rows[key] for key in sorted(rows)]


def results(log: list[dict[str, Any]], num_tokens: int) -> Row:
    """Name the best epoch, its validation, and how much was trained on.

    Args:
        log: the Trainer's.
        num_tokens: of one epoch.
    """
    rows = [row for row in history(log, no_ppl) if row["split"] == "val"]
    epochs_run = max(row["epoch"] for row in rows)
    # The state before the first epoch is in no checkpoint, so it can be the best only alone.
    best = min((r for r in rows if r["epoch"] or not epochs_run), key=lambda r: r["loss"])
    memory = (row for row in memory_history(log) if row["epoch"] == best["epoch"])
    return {
        "val_loss": best["loss"],
        "val_ppl": best["ppl"],
        "best_epoch": best["epoch"],
        "epochs_run": epochs_run,
        "num_trained_tokens": epochs_run * num_tokens,
    } | {row["quantity"]: row["value"] for row in memory}


def ppl_of_nll(nll: float) -> float:
    """Return the perplexity of a training loss in nats a token."""
    return math.exp(min(nll, 700))


def no_ppl(loss: float) -> str:
    """Return the empty cell of a training loss that is no likelihood."""
    return ""
