"""What a training run trains: a model with its loss and its validation.

Knows no loss, no Trainer and no path.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from infini_retrofit.training.processes import mean


class Trainee(nn.Module, ABC):
    """A model with its loss: what the Trainer trains, validates and saves.

    Args:
        model: holds the parameters; those that train are float32.
        groups: the trainable parameters by group; `gate` and `alpha` get learning rates of
            their own.
        lr_scales: factors on the learning rate of the other groups.
        dtype: of the matrix products.

    Attributes:
        step: how many steps were taken, kept by the Trainer.
        num_steps: how many there will be, unless the run stops early.
        share: how much the step's rows in this process weigh in the mean over processes.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        groups: dict[str, list[nn.Parameter]],
        lr_scales: dict[str, float],
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.dtype = dtype
        self.model = model
        self.groups = groups
        self.lr_scales = lr_scales
        self.step, self.num_steps, self.share = 0, 1, 1.0

    @abstractmethod
    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        """Return the batch's mean loss as `loss`."""

    @abstractmethod
    def validate(self, val: Tensor) -> dict[str, float]:
        """Return `val_loss` and `val_ppl` of validation samples, each token weighing alike.

        What else it returns is noted for each epoch, and that of the best one is a result.
        """

    def mean_of_step(self, mean_of_rows: Tensor) -> Tensor:
        """Return a mean over the rows of all processes, to divide by, from that of this one's."""
        return mean(mean_of_rows * self.share) if self.training else mean_of_rows

    def train_ppl(self, loss: float) -> float | str:
        """Return the perplexity of a training loss; an empty text if it is no likelihood."""
        return ppl_of_nll(loss)

    def merge(self) -> None:
        """Fold what was added for training only into the model's own weights."""

    @property
    def num_trainable_parameters(self) -> int:
        """How many numbers train."""
        return sum(p.numel() for group in self.groups.values() for p in group)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Return what trains: a frozen base has no place in a checkpoint."""
        trainable = {name for name, p in self.named_parameters() if p.requires_grad}
        state = super().state_dict(*args, **kwargs)
        return {name: tensor for name, tensor in state.items() if name in trainable}

    def mixed_precision(self) -> torch.autocast:
        """Return the context in which the Trainer runs `forward`, for use outside of it."""
        device = next(self.parameters()).device.type
        return torch.autocast(device, self.dtype, enabled=self.dtype is torch.bfloat16)

    def run_validation(self, val: Tensor) -> dict[str, float]:
        """Validate under the conditions of a run: nothing trains, products in `dtype`."""
        self.eval()
        with torch.no_grad(), self.mixed_precision():
            return self.validate(val.to(next(self.parameters()).device))


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
