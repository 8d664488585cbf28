"""Training on `transformers.Trainer`: what distilling and fine-tuning have in common.

Mixed precision, accumulation, checkpoints, resume, early stopping and many processes come from
the Trainer. Here stand the loss's frame, the parameter groups and the validation that divides
by tokens once. Knows no loss, no stage and no path by name.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint

from infini_retrofit.history import history, ppl_of_nll
from infini_retrofit.report import write_rows
from infini_retrofit.schedule import Schedule, rate_factor

# How far, in logits, a gate could move in a whole run if its gradient never changed sign: from
# a memory share of 0.02 to one of 0.53. With the body's learning rate it cannot move at all.
GATE_TRAVEL = 4.0


class Trainee(nn.Module, ABC):
    """A model with its loss: what the Trainer trains, validates and saves.

    Args:
        model: holds the parameters; those that train are float32.
        groups: the trainable parameters by group; `gate` gets a learning rate of its own.
        lr_scales: factors on the learning rate of the other groups.
        dtype: of the matrix products.
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

    @abstractmethod
    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        """Return the batch's mean loss as `loss`."""

    @abstractmethod
    def validate(self, val: Tensor) -> dict[str, float]:
        """Return `val_loss` and `val_ppl` of validation samples, each token weighing alike."""

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Return what trains: a frozen base has no place in a checkpoint."""
        trainable = {name for name, p in self.named_parameters() if p.requires_grad}
        state = super().state_dict(*args, **kwargs)
        return {name: tensor for name, tensor in state.items() if name in trainable}

    def mixed_precision(self) -> torch.autocast:
        """Return the context in which the Trainer runs `forward`, for use outside of it."""
        device = next(self.parameters()).device.type
        return torch.autocast(device, self.dtype, enabled=self.dtype is torch.bfloat16)


class _RetrofitTrainer(Trainer):
    """The Trainer with our parameter groups and validation, and no patience with NaN."""

    def __init__(self, val: Tensor, schedule: Schedule, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.val = val
        self.schedule = schedule

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Give gates a rate that lets them move within this run, and nothing weight decay."""
        num_steps = self.schedule.epochs * len(self.get_train_dataloader())
        rates = {name: self.schedule.lr * s for name, s in self.model.lr_scales.items()}
        rates["gate"] = GATE_TRAVEL / sum(rate_factor(i, num_steps) for i in range(num_steps))
        groups = [
            {"params": parameters, "lr": rates[name]}
            for name, parameters in self.model.groups.items()
            if parameters
        ]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LambdaLR:
        """Ramp up from the first step on: the Trainer's own warm-up wastes that one at rate 0."""
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer or self.optimizer, lambda step: rate_factor(step, num_training_steps)
        )
        return self.lr_scheduler

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Stop at a loss that is not finite; the last checkpoint stays as it was."""
        loss = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"training diverged in epoch {int(self.state.epoch) + 1}, "
                f"step {self.state.global_step + 1}: the training loss is {loss.item()}; "
                "nothing was written, try a smaller lr"
            )
        return loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Validate with the trainee's own method, which weighs tokens alike."""
        self.model.eval()
        with torch.no_grad(), self.model.mixed_precision():
            metrics = self.model.validate(self.val.to(self.args.device))
        if not math.isfinite(metrics["val_loss"]):
            raise FloatingPointError(
                f"training diverged in epoch {round(self.state.epoch or 0)}, "
                f"step {self.state.global_step}: the validation loss is {metrics['val_loss']}; "
                "nothing was written, try a smaller lr"
            )
        metrics = {f"eval_{name}": value for name, value in metrics.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Expect the frozen weights to be missing from a checkpoint, and nothing else."""
        assert not load_result.unexpected_keys, load_result.unexpected_keys


class _HistoryWriter(TrainerCallback):
    """Rewrites the history after every epoch, so that a run can be watched."""

    def __init__(self, path: Path, ppl_of_train_loss: Callable[[float], float | str]) -> None:
        self.path = path
        self.ppl_of_train_loss = ppl_of_train_loss

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write what the Trainer has logged so far, a resumed run's past included."""
        rows = history(state.log_history, self.ppl_of_train_loss)
        if rows and state.is_world_process_zero:
            write_rows(self.path, rows)


def train(
    trainee: Trainee,
    train_samples: Tensor,
    val_samples: Tensor,
    schedule: Schedule,
    checkpoints: Path,
    history_path: Path,
    ppl_of_train_loss: Callable[[float], float | str] = ppl_of_nll,
) -> dict[str, int | float | str]:
    """Train to the best epoch's weights and say how it went.

    Args:
        trainee: is left holding the weights of the epoch with the lowest val_loss.
        train_samples: token ids, one row a sample.
        val_samples: the same, of other articles.
        schedule: how long and how fast.
        checkpoints: folder of the run; a run that was killed goes on from its last epoch.
        history_path: TSV of loss and perplexity by epoch and split.
        ppl_of_train_loss: how to read the training loss as a perplexity.

    Returns:
        Results of the best epoch, and what it took.

    Raises:
        FloatingPointError: if a loss is not finite.
    """
    last_checkpoint = get_last_checkpoint(checkpoints) if checkpoints.is_dir() else None
    trainer = _RetrofitTrainer(
        val=val_samples,
        schedule=schedule,
        model=trainee,
        args=_arguments(schedule, checkpoints, trainee.dtype, resumed=last_checkpoint is not None),
        train_dataset=Dataset.from_dict({"input_ids": train_samples.numpy()}).with_format("torch"),
        eval_dataset=[],
        callbacks=[
            EarlyStoppingCallback(schedule.patience, schedule.min_delta),
            _HistoryWriter(history_path, ppl_of_train_loss),
        ],
    )
    trainer.train(resume_from_checkpoint=last_checkpoint)
    trainer.accelerator.wait_for_everyone()
    rows = history(trainer.state.log_history, ppl_of_train_loss)
    num_parameters = sum(p.numel() for group in trainee.groups.values() for p in group)
    return _results(rows, train_samples.numel()) | {"num_trainable_parameters": num_parameters}


def _results(
    rows: list[dict[str, int | float | str]], num_tokens: int
) -> dict[str, int | float | str]:
    """Name the best epoch, its validation, and how much was trained on."""
    best = min((r for r in rows if r["split"] == "val" and r["epoch"]), key=lambda r: r["loss"])
    epochs_run = max(row["epoch"] for row in rows)
    return {
        "val_loss": best["loss"],
        "val_ppl": best["ppl"],
        "best_epoch": best["epoch"],
        "epochs_run": epochs_run,
        "num_trained_tokens": epochs_run * num_tokens,
    }


def _arguments(
    schedule: Schedule, checkpoints: Path, dtype: torch.dtype, resumed: bool
) -> TrainingArguments:
    on_gpu = torch.cuda.is_available()
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        per_device_train_batch_size=schedule.batch_size,
        num_train_epochs=schedule.epochs,
        learning_rate=schedule.lr,
        max_grad_norm=1.0,
        bf16=dtype is torch.bfloat16,
        use_cpu=not on_gpu,
        seed=schedule.seed,
        eval_strategy="epoch",
        save_strategy="epoch",
        logging_strategy="epoch",
        # A resumed run has its first validation in its history already, and early stopping
        # would count it twice.
        eval_on_start=not resumed,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="val_loss",
        greater_is_better=False,
        restore_callback_states_from_checkpoint=True,
        logging_nan_inf_filter=False,
        remove_unused_columns=False,
        dataloader_pin_memory=on_gpu,
        report_to="none",
    )
    if arguments.n_gpu > 1:
        # Many GPUs are torchrun's business; one process would split batches among replicas that
        # the teacher's layers are no part of.
        arguments._n_gpu = 1
    return arguments
