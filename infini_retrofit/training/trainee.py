"""What every training shares: its parameters, a model with its loss, and tables of how it went.

Knows no loss, no Trainer and no path.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from infini_retrofit.scoring.score import perplexity

Row = dict[str, int | float | str]
PREFIX = "eval_"  # of every validation result in the Trainer's log
MEMORY_COLUMNS = ("epoch", "quantity", "value")


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long and how fast to train: the keys that all training sections share."""

    section: ClassVar[str]  # the section's name in params.yaml
    least_epochs: ClassVar[int] = 1

    batch_size: int  # samples a step and process
    epochs: int
    lr: float  # at its peak
    patience: int  # epochs without a lower val_loss before stopping
    seed: int

    def __post_init__(self) -> None:
        """Refuse values that would only fail, or mislead, an hour later."""
        self.require_at_least(1, "batch_size", "patience")
        self.require_at_least(self.least_epochs, "epochs")
        self.require_at_least(0, "seed")
        if self.seed >= 2**32:
            raise ValueError(f"{self.section}.seed must be below 2**32, got {self.seed}")
        if self.lr <= 0:
            raise ValueError(f"{self.section}.lr must be greater than 0, got {self.lr}")

    def require_at_least(self, least: int, *names: str) -> None:
        """Refuse fields that are too small, by name."""
        for name in names:
            if (value := getattr(self, name)) < least:
                raise ValueError(f"{self.section}.{name} must be at least {least}, got {value}")


class Trainee(nn.Module, ABC):
    """A model with its loss and its validation.

    Args:
        model: holds the parameters; those that train are float32.
        groups: the trainable parameters by group; `gate` and `alpha` have learning rates of
            their own.
        dtype: of the matrix products.
        lr_scales: factors on the learning rate of other groups; 1 for a group that is not named.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        groups: dict[str, list[nn.Parameter]],
        dtype: torch.dtype,
        lr_scales: Mapping[str, float],
    ) -> None:
        super().__init__()
        self.model = model
        self.groups = groups
        self.dtype = dtype
        self.lr_scales = lr_scales

    @abstractmethod
    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        """Return as `loss` the mean over rows; each row's part must not depend on the others."""

    @abstractmethod
    def validate(self, val: Tensor) -> dict[str, float]:
        """Return `val_loss` and `val_ppl`, each token weighing alike, and other results by name."""

    def train_ppl(self, loss: float) -> float | str:
        """Return the perplexity of a training loss; an empty text if it is no likelihood."""
        return perplexity(loss)

    def merge(self) -> None:
        """Merge what was added for training only into the model's own weights."""

    @property
    def num_trainable_parameters(self) -> int:
        """How many numbers train."""
        return sum(p.numel() for group in self.groups.values() for p in group)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Return what trains; a checkpoint leaves the frozen base out."""
        trainable = {name for name, p in self.named_parameters() if p.requires_grad}
        state = super().state_dict(*args, **kwargs)
        return {name: tensor for name, tensor in state.items() if name in trainable}

    def mixed_precision(self) -> torch.autocast:
        """Return the context in which the Trainer runs `forward`, for use outside of it."""
        device = next(self.parameters()).device.type
        return torch.autocast(device, self.dtype, enabled=self.dtype is torch.bfloat16)

    def run_validation(self, val: Tensor) -> dict[str, float]:
        """Validate as within a run: without gradients, products in `dtype`."""
        self.eval()
        with torch.no_grad(), self.mixed_precision():
            return self.validate(val.to(next(self.parameters()).device))


def history(log: list[dict[str, Any]], train_ppl: Callable[[float], float | str]) -> list[Row]:
    """Return loss and perplexity from the Trainer's log, a row for each epoch and split."""
    rows = {
        (epoch, "val"): (metrics["val_loss"], metrics["val_ppl"])
        for epoch, metrics in _validations(log).items()
    }
    rows |= {
        (round(entry["epoch"]), "train"): (entry["loss"], train_ppl(entry["loss"]))
        for entry in log
        if "loss" in entry
    }
    return [
        {"epoch": epoch, "split": split, "loss": loss, "ppl": ppl}
        for (epoch, split), (loss, ppl) in sorted(rows.items())
    ]


def memory_history(log: list[dict[str, Any]]) -> list[Row]:
    """Return all other validation results, a row for each epoch and quantity."""
    return [
        dict(zip(MEMORY_COLUMNS, (epoch, name, value), strict=True))
        for epoch, metrics in sorted(_validations(log).items())
        for name, value in sorted(_others(metrics).items())
    ]


def results(log: list[dict[str, Any]], num_tokens: int) -> Row:
    """Return the validation of the best epoch, and how much was trained.

    An epoch has `num_tokens`.
    """
    validations = _validations(log)
    epochs_run = max(validations)
    # No checkpoint holds the weights before the first epoch: they count only if none was run.
    candidates = [epoch for epoch in validations if epoch or not epochs_run]
    best = min(candidates, key=lambda epoch: validations[epoch]["val_loss"])
    return {
        "val_loss": validations[best]["val_loss"],
        "val_ppl": validations[best]["val_ppl"],
        "best_epoch": best,
        "epochs_run": epochs_run,
        "num_trained_tokens": epochs_run * num_tokens,
    } | dict(sorted(_others(validations[best]).items()))


def _validations(log: list[dict[str, Any]]) -> dict[int, dict[str, float]]:
    """Return the results of each validation by its epoch, 0 before training."""
    return {
        round(entry.get("epoch", 0)): {
            name.removeprefix(PREFIX): x for name, x in entry.items() if name.startswith(PREFIX)
        }
        for entry in log
        if PREFIX + "val_loss" in entry
    }


def _others(metrics: dict[str, float]) -> dict[str, float]:
    return {k: v for k, v in metrics.items() if k not in ("val_loss", "val_ppl")}
