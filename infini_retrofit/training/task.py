"""What every training shares: its parameters, and a model with its loss and validation.

Knows no loss, no Trainer and no path.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from infini_retrofit.pipeline.fields import Batch, Count, Epochs, LearningRate, Seed
from infini_retrofit.scoring.score import perplexity


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long and how fast to train: the keys that all training sections share."""

    batch_size: Batch  # samples a step and process
    epochs: Epochs
    lr: LearningRate  # at its peak
    patience: Count  # epochs without a lower val_loss before stopping
    seed: Seed


class TrainingTask(nn.Module, ABC):
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

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Return what trains; a checkpoint leaves the frozen base out."""
        trainable = {name for name, p in self.named_parameters() if p.requires_grad}
        state = super().state_dict(*args, **kwargs)
        return {name: tensor for name, tensor in state.items() if name in trainable}

    def mixed_precision(self) -> torch.autocast:
        """Return the context in which the Trainer runs `forward`, for use outside of it."""
        return torch.autocast(
            self.model.device.type, self.dtype, enabled=self.dtype is torch.bfloat16
        )

    def run_validation(self, val: Tensor) -> dict[str, float]:
        """Validate as within a run: without gradients, products in `dtype`."""
        self.eval()
        with torch.no_grad(), self.mixed_precision():
            return self.validate(val.to(self.model.device))
