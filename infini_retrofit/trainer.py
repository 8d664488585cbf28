"""`transformers.Trainer` as every training here uses it: the rate's course, no patience with NaN.

Knows no loss, no stage and no path.
"""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

from infini_retrofit.processes import mean
from infini_retrofit.schedule import rate_factor


class BaseTrainer(Trainer):
    """The Trainer with the library's course of the learning rate, and no patience with NaN.

    Attributes:
        task: what is under way, for messages.
        lr_name: the parameter that helps where it fails.
    """

    task: ClassVar[str] = "training"
    lr_name: ClassVar[str] = "lr"

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LambdaLR:
        """Ramp up from the first step on: the Trainer's own warm-up wastes that one at rate 0."""
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer or self.optimizer, lambda step: rate_factor(step, num_training_steps)
        )
        return self.lr_scheduler

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Stop at a loss that is not finite, all processes alike."""
        loss = super().training_step(*args, **kwargs)
        place = f"in epoch {int(self.state.epoch) + 1}, step {self.state.global_step + 1}"
        self.require_finite(mean(loss).item(), place)
        return loss

    def require_finite(self, loss: float, place: str, kind: str = "training") -> None:
        """Refuse a loss that says that the weights are worth nothing.

        Raises:
            FloatingPointError: if so; the last checkpoint stays as it was.
        """
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"{self.task} diverged {place}: the {kind} loss is {loss}; "
                f"nothing was written, try a smaller {self.lr_name}"
            )


def training_arguments(
    output_dir: str,
    dtype: torch.dtype,
    *,
    epochs: int,
    batch_size: int,
    lr: float,
    seed: int,
    **more: Any,
) -> TrainingArguments:
    """Return the arguments that every training shares, and `more`.

    Args:
        output_dir: folder of the checkpoints.
        dtype: of the matrix products.
        epochs: at most.
        batch_size: rows a step and process.
        lr: at its peak.
        seed: of the order of the rows.
        more: arguments of the Trainer.
    """
    on_gpu = torch.cuda.is_available()
    arguments = TrainingArguments(
        output_dir=output_dir,
        per_device_train_batch_size=batch_size,
        num_train_epochs=epochs,
        learning_rate=lr,
        max_grad_norm=1.0,
        bf16=dtype is torch.bfloat16,
        use_cpu=not on_gpu,
        seed=seed,
        logging_strategy="epoch",
        logging_nan_inf_filter=False,
        dataloader_pin_memory=on_gpu,
        report_to="none",
        **more,
    )
    if arguments.n_gpu > 1:
        # Many GPUs are torchrun's business; one process would split batches among replicas that
        # a teacher's layers are no part of.
        arguments._n_gpu = 1
    return arguments
