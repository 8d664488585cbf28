"""Training on `transformers.Trainer`: what distilling and fine-tuning have in common.

The Trainer does mixed precision, checkpoints, resuming, early stopping and many processes. Here
are the learning rates of the groups, the curves, and a run that trains nothing. Knows no loss, no
stage and no path by name.
"""

import math
import sys
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from datasets import Dataset
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from infini_retrofit.pipeline.files import write_rows, write_text
from infini_retrofit.pipeline.guard import is_first_process, num_processes
from infini_retrofit.training.trainee import (
    MEMORY_COLUMNS,
    PREFIX,
    Schedule,
    Trainee,
    history,
    memory_history,
    results,
)

Value = TypeVar("Value")
WARMUP_SHARE = 0.05  # of all steps
# How far, in logits, a gate could move in a whole run if its gradient never changed sign: from
# a memory share of 0.02 to one of 0.53. At the body's learning rate it could not move at all.
GATE_TRAVEL = 4.0
# The same for `alpha`, which scales a branch: from 0 to the weight of the base's attention.
ALPHA_TRAVEL = 1.0
# How far they may move in one step. Without it, a run of few steps would depend on one batch.
MAX_GATE_RATE, MAX_ALPHA_RATE = 0.25, 0.1


def train(
    trainee: Trainee,
    train_samples: Tensor,
    val_samples: Tensor,
    schedule: Schedule,
    checkpoints: Path,
    history_path: Path,
    memory_path: Path | None = None,
) -> dict[str, int | float | str]:
    """Train to the weights of the epoch with the lowest val_loss and return its results.

    A killed run resumes from the last epoch in `checkpoints`. Without epochs, or without a
    parameter to train, it only validates, and prints that.

    Args:
        trainee: holds the weights of the best epoch in the end.
        train_samples: token ids, one row a sample.
        val_samples: the same, of other articles.
        schedule: how long and how fast.
        checkpoints: folder of the run.
        history_path: gets loss and perplexity by epoch and split (TSV).
        memory_path: gets the use of the memory by epoch (TSV); None: no file.

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
    curves: "_Curves",
) -> list[dict[str, Any]]:
    """Run the Trainer, from its last checkpoint if there is one, and return its log."""
    arguments = _arguments(schedule, checkpoints, trainee.dtype)
    last_checkpoint = get_last_checkpoint(checkpoints) if checkpoints.is_dir() else None
    last_checkpoint = value_of_first(last_checkpoint)
    # The history of a resumed run holds its first validation already, and early stopping would
    # count it twice.
    arguments.eval_on_start = last_checkpoint is None
    num_steps = schedule.epochs * steps_per_epoch(len(train_samples), schedule.batch_size)
    trainer = _Trainer(
        val=val_samples,
        model=trainee,
        args=arguments,
        train_dataset=Dataset.from_dict({"input_ids": train_samples.numpy()}).with_format("torch"),
        eval_dataset=[],
        optimizers=_optimizer(trainee, schedule.lr, num_steps),
        callbacks=[EarlyStoppingCallback(schedule.patience), curves],
    )
    trainer.train(resume_from_checkpoint=last_checkpoint)
    trainer.accelerator.wait_for_everyone()
    return trainer.state.log_history


def _only_validate(
    trainee: Trainee, val_samples: Tensor, schedule: Schedule, curves: "_Curves"
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
    on_gpu = torch.cuda.is_available()
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        per_device_train_batch_size=schedule.batch_size,
        num_train_epochs=schedule.epochs,
        max_grad_norm=1.0,
        bf16=dtype is torch.bfloat16,
        use_cpu=not on_gpu,
        seed=schedule.seed,
        logging_strategy="epoch",
        logging_nan_inf_filter=False,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="val_loss",
        greater_is_better=False,
        restore_callback_states_from_checkpoint=True,
        remove_unused_columns=False,
        dataloader_pin_memory=on_gpu,
        report_to="none",
    )
    if arguments.n_gpu > 1:
        # A process uses one GPU; torchrun starts one for each. The Trainer would split batches
        # among replicas of the model, without the layers of its teacher.
        arguments._n_gpu = 1
    return arguments


def _optimizer(trainee: Trainee, lr: float, num_steps: int) -> tuple[AdamW, LambdaLR]:
    """Return AdamW without weight decay, with rates that let gates move within this run."""
    factors = sum(rate_factor(step, num_steps) for step in range(num_steps))
    rates = {
        "gate": min(GATE_TRAVEL / factors, MAX_GATE_RATE),
        "alpha": min(ALPHA_TRAVEL / factors, MAX_ALPHA_RATE),
    }
    groups = [
        {"params": parameters, "lr": rates.get(name, lr * trainee.lr_scales.get(name, 1.0))}
        for name, parameters in trainee.groups.items()
        if parameters
    ]
    optimizer = AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
    return optimizer, LambdaLR(optimizer, lambda step: rate_factor(step, num_steps))


def rate_factor(step: int, num_steps: int) -> float:
    """Return the share of the peak learning rate at a step, counted from 0: ramp, then cosine."""
    ramp = (step + 1) / max(1, round(WARMUP_SHARE * num_steps))
    return min(1.0, ramp) * 0.5 * (1 + math.cos(math.pi * step / num_steps))


class _Trainer(Trainer):
    """The Trainer with our validation, which stops at a loss that is not finite."""

    def __init__(self, val: Tensor, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.val = val

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], **_: Any) -> Tensor:
        """Scale the loss so that N processes equal one with the whole batch.

        In the last step of an epoch the Trainer fills batches up with rows of the first step,
        which must not count.
        """
        num_own, num_all = self._num_rows()
        rows = inputs["input_ids"][: max(num_own, 1)]
        loss = model(rows)["loss"] * (num_own * num_processes() / num_all)
        place = f"in epoch {int(self.state.epoch) + 1}, step {self.state.global_step + 1}"
        _require_finite(mean(loss).item(), place, "training")
        return loss

    def _num_rows(self) -> tuple[int, int]:
        """Return how many new rows this step has in this process, and in all."""
        num_rows, batch_size = len(self.train_dataset), self.args.per_device_train_batch_size
        step = self.state.global_step % steps_per_epoch(num_rows, batch_size)
        return share_rows(num_rows, batch_size, step, self.args.process_index, num_processes())

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Validate with the trainee's own method.

        Every process does, and takes the results of rank 0, so that all stop together.
        """
        metrics = value_of_first(self.model.run_validation(self.val))
        place = f"in epoch {round(self.state.epoch or 0)}, step {self.state.global_step}"
        _require_finite(metrics["val_loss"], place, "validation")
        metrics = {PREFIX + name: value for name, value in metrics.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Expect the frozen weights to be missing from a checkpoint, and nothing else."""
        assert not load_result.unexpected_keys, load_result.unexpected_keys


class _Curves(TrainerCallback):
    """Writes the tables of a run again after every epoch."""

    def __init__(self, trainee: Trainee, history_path: Path, memory_path: Path | None) -> None:
        self.trainee = trainee
        self.history_path = history_path
        self.memory_path = memory_path

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write the log so far, the past of a resumed run included."""
        if state.is_world_process_zero:
            self.write(state.log_history)

    def write(self, log: list[dict[str, Any]]) -> None:
        """Write both tables; a model without a memory leaves one without rows."""
        if rows := history(log, self.trainee.train_ppl):
            write_rows(self.history_path, rows)
        if self.memory_path is None:
            return
        if memory_rows := memory_history(log):
            write_rows(self.memory_path, memory_rows)
        else:
            write_text(self.memory_path, "\t".join(MEMORY_COLUMNS) + "\n")


def _require_finite(loss: float, place: str, kind: str) -> None:
    """Raise FloatingPointError if a loss is not finite; the last checkpoint stays as it is."""
    if not math.isfinite(loss):
        raise FloatingPointError(
            f"training diverged {place}: the {kind} loss is {loss}; "
            "nothing was written, try a smaller lr"
        )


def mean(value: Tensor) -> Tensor:
    """Return the mean over processes, without a gradient."""
    value = value.detach().clone()
    if num_processes() > 1:
        dist.all_reduce(value)
    return value / num_processes()


def value_of_first(value: Value) -> Value:
    """Return rank 0's value in every process."""
    values = [value]
    if num_processes() > 1:
        dist.broadcast_object_list(values, src=0)
    return values[0]


def steps_per_epoch(num_rows: int, batch_size: int) -> int:
    """Return how many steps an epoch has; each takes `batch_size` rows a process."""
    return math.ceil(num_rows / (batch_size * num_processes()))


def share_rows(
    num_rows: int, batch_size: int, step: int, process: int, processes: int
) -> tuple[int, int]:
    """Return how many rows of a step belong to one process, and how many the step has.

    The last step of an epoch may have fewer than `batch_size`, or none for some processes. Steps
    of the epoch and processes count from 0.
    """
    num_left = num_rows - step * batch_size * processes
    num_own = min(max(num_left - process * batch_size, 0), batch_size)
    return num_own, min(num_left, batch_size * processes)
