"""Training on `transformers.Trainer`: what distilling and fine-tuning have in common.

Mixed precision, accumulation, checkpoints, resume, early stopping and many processes come from
the Trainer. Here stand the groups' learning rates, the curves, and what a run that trains nothing
leaves. Knows no loss, no stage and no path by name.
"""

import math
import sys
from pathlib import Path
from typing import Any, ClassVar

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from infini_retrofit.pipeline.files import write_rows, write_text
from infini_retrofit.pipeline.guard import is_first_process
from infini_retrofit.training.processes import mean, num_processes, share_rows, value_of_first
from infini_retrofit.training.schedule import Schedule, rate_factor
from infini_retrofit.training.trainee import (
    MEMORY_COLUMNS,
    PREFIX,
    Trainee,
    history,
    memory_history,
    results,
)


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


# How far, in logits, a gate could move in a whole run if its gradient never changed sign: from
# a memory share of 0.02 to one of 0.53. With the body's learning rate it cannot move at all.
GATE_TRAVEL = 4.0
# The same for the factor of a branch that starts at zero: to where it weighs as the base does.
ALPHA_TRAVEL = 1.0
# What they move in a step at most: in a run of few steps all of it would hang on one batch.
MAX_GATE_RATE, MAX_ALPHA_RATE = 0.25, 0.1


class _RetrofitTrainer(BaseTrainer):
    """The Trainer with our parameter groups and validation."""

    def __init__(self, val: Tensor, schedule: Schedule, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.val = val
        self.schedule = schedule

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Give gates a rate that lets them move within this run, and nothing weight decay."""
        num_steps = self.schedule.epochs * len(self.get_train_dataloader())
        factors = sum(rate_factor(i, num_steps) for i in range(num_steps))
        rates = {name: self.schedule.lr * s for name, s in self.model.lr_scales.items()}
        rates |= {
            "gate": min(GATE_TRAVEL / factors, MAX_GATE_RATE),
            "alpha": min(ALPHA_TRAVEL / factors, MAX_ALPHA_RATE),
        }
        groups = [
            {"params": parameters, "lr": rates[name]}
            for name, parameters in self.model.groups.items()
            if parameters
        ]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
        return self.optimizer

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Let the trainee know where the run stands."""
        self.model.step, self.model.num_steps = self.state.global_step, self.state.max_steps
        return super().training_step(*args, **kwargs)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], **_: Any) -> Tensor:
        """Let each row weigh as it would in one process that has the whole batch.

        To even out an epoch's last batch, processes are given rows of the first once more.
        """
        num_own, num_all = self._num_rows()
        self.model.share = num_own * num_processes() / num_all
        inputs = {"input_ids": inputs["input_ids"][: max(num_own, 1)]}
        return super().compute_loss(model, inputs) * self.model.share

    def _num_rows(self) -> tuple[int, int]:
        """Return how many rows of this step are new in this process, and in all."""
        num_rows, batch_size = len(self.train_dataset), self.args.per_device_train_batch_size
        steps_per_epoch = -(-num_rows // (batch_size * num_processes()))
        step = self.state.global_step % steps_per_epoch
        return share_rows(num_rows, batch_size, step, self.args.process_index, num_processes())

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Validate with the trainee's own method, which weighs tokens alike.

        Every process does, and believes the first: all stop after the same epoch.
        """
        metrics = value_of_first(self.model.run_validation(self.val))
        place = f"in epoch {round(self.state.epoch or 0)}, step {self.state.global_step}"
        self.require_finite(metrics["val_loss"], place, "validation")
        metrics = {PREFIX + name: value for name, value in metrics.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Expect the frozen weights to be missing from a checkpoint, and nothing else."""
        assert not load_result.unexpected_keys, load_result.unexpected_keys


class _Curves:
    """The files that show how a run goes, rewritten after every epoch."""

    def __init__(self, trainee: Trainee, history_path: Path, memory_path: Path | None) -> None:
        self.trainee = trainee
        self.history_path = history_path
        self.memory_path = memory_path

    def write(self, log: list[dict[str, Any]]) -> None:
        """Write what was logged so far; a model without a memory leaves a table without rows."""
        if rows := history(log, self.trainee.train_ppl):
            write_rows(self.history_path, rows)
        if self.memory_path is None:
            return
        if memory_rows := memory_history(log):
            write_rows(self.memory_path, memory_rows)
        else:
            write_text(self.memory_path, "\t".join(MEMORY_COLUMNS) + "\n")


class _CurvesCallback(TrainerCallback):
    """Lets the curves be watched while a run goes on."""

    def __init__(self, curves: _Curves) -> None:
        self.curves = curves

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write what the Trainer has logged so far, a resumed run's past included."""
        if state.is_world_process_zero:
            self.curves.write(state.log_history)


def train(
    trainee: Trainee,
    train_samples: Tensor,
    val_samples: Tensor,
    schedule: Schedule,
    checkpoints: Path,
    history_path: Path,
    memory_path: Path | None = None,
) -> dict[str, int | float | str]:
    """Train to the best epoch's weights and say how it went.

    Without epochs, or with nothing to train, it only validates, and says so.

    Args:
        trainee: is left holding the weights of the epoch with the lowest val_loss.
        train_samples: token ids, one row a sample.
        val_samples: the same, of other articles.
        schedule: how long and how fast.
        checkpoints: folder of the run; a run that was killed goes on from its last epoch.
        history_path: TSV of loss and perplexity by epoch and split.
        memory_path: TSV of how the memory is used by epoch; None: not wanted.

    Returns:
        Results of the best epoch, and what it took.

    Raises:
        FloatingPointError: if a loss is not finite.
    """
    curves = _Curves(trainee, history_path, memory_path)
    num_parameters = trainee.num_trainable_parameters
    if schedule.epochs and num_parameters:
        log = _fit(trainee, train_samples, val_samples, schedule, checkpoints, curves)
    else:
        log = _only_validate(trainee, val_samples, schedule, curves)
    trainee.merge()
    return results(log, train_samples.numel()) | {"num_trainable_parameters": num_parameters}


def _fit(
    trainee: Trainee,
    train_samples: Tensor,
    val_samples: Tensor,
    schedule: Schedule,
    checkpoints: Path,
    curves: _Curves,
) -> list[dict[str, Any]]:
    """Run the Trainer, from its last checkpoint if there is one, and return its log."""
    arguments = _arguments(schedule, checkpoints, trainee.dtype)
    last_checkpoint = get_last_checkpoint(checkpoints) if checkpoints.is_dir() else None
    last_checkpoint = value_of_first(last_checkpoint)
    # A resumed run has its first validation in its history already, and early stopping would
    # count it twice.
    arguments.eval_on_start = last_checkpoint is None
    trainer = _RetrofitTrainer(
        val=val_samples,
        schedule=schedule,
        model=trainee,
        args=arguments,
        train_dataset=Dataset.from_dict({"input_ids": train_samples.numpy()}).with_format("torch"),
        eval_dataset=[],
        callbacks=[
            EarlyStoppingCallback(schedule.patience, schedule.min_delta),
            _CurvesCallback(curves),
        ],
    )
    trainer.train(resume_from_checkpoint=last_checkpoint)
    trainer.accelerator.wait_for_everyone()
    return trainer.state.log_history


def _only_validate(
    trainee: Trainee, val_samples: Tensor, schedule: Schedule, curves: _Curves
) -> list[dict[str, Any]]:
    """Leave the trainee as it is and return the log of its only validation."""
    metrics = trainee.run_validation(val_samples)
    log = [{"epoch": 0} | {PREFIX + name: value for name, value in metrics.items()}]
    if is_first_process():
        reason = "no parameter is to train" if schedule.epochs else "its epochs are 0"
        print(f"{schedule.section}: nothing is trained, because {reason}", file=sys.stderr)
        curves.write(log)
    return log


def _arguments(schedule: Schedule, checkpoints: Path, dtype: torch.dtype) -> TrainingArguments:
    return training_arguments(
        str(checkpoints),
        dtype,
        epochs=schedule.epochs,
        batch_size=schedule.batch_size,
        lr=schedule.lr,
        seed=schedule.seed,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="val_loss",
        greater_is_better=False,
        restore_callback_states_from_checkpoint=True,
        remove_unused_columns=False,
    )
