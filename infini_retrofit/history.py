"""The history of a training run: one row for each epoch and split.

Knows the names that the Trainer logs under, and no path.
"""

import math
from collections.abc import Callable
from typing import Any


def history(
    log: list[dict[str, Any]], ppl_of_train_loss: Callable[[float], float | str]
) -> list[dict[str, int | float | str]]:
    """Turn the Trainer's log into one row for each epoch and split."""
    rows = {}
    for entry in log:
        epoch = round(entry.get("epoch", 0))
        if "eval_val_loss" in entry:
            values = {"loss": entry["eval_val_loss"], "ppl": entry["eval_val_ppl"]}
            rows[epoch, "val"] = {"epoch": epoch, "split": "val"} | values
        elif "loss" in entry:
            values = {"loss": entry["loss"], "ppl": ppl_of_train_loss(entry["loss"])}
            rows[epoch, "train"] = {"epoch": epoch, "split": "train"} | values
    return [rows[key] for key in sorted(rows)]


def ppl_of_nll(nll: float) -> float:
    """Return the perplexity of a training loss in nats a token."""
    return math.exp(min(nll, 700))


def no_ppl(loss: float) -> str:
    """Return the empty cell of a training loss that is no likelihood."""
    return ""
