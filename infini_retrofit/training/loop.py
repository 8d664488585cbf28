"""Training on `transformers.Trainer`: what distilling and fine-tuning have in common.

The Trainer does mixed precision, checkpoints, resuming, early stopping and many processes. Here
are the learning rates of the groups, the curves, and a run that trains nothing. Knows no loss and
no stage.
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, wait_for_everyone
from datasets import Dataset
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.integrations import TensorBoardCallback, is_tensorboard_available

from infini_retrofit.pipeline.guard import is_first_process, num_processes
from infini_retrofit.training.report import PREFIX, Log, Report, joined, results
from infini_retrofit.training.resuming import Sealing, is_over, last_whole, load_best, read_state
from infini_retrofit.training.task import Schedule, TrainingTask

WARMUP_SHARE = 0.05  # of all steps
# How far, in logits, a gate could move in a whole run if its gradient never changed sign: from
# a memory share of 0.02 to one of 0.53. At the body's learning rate it could not move at all.
GATE_TRAVEL = 4.0
# The same for `alpha`, which scales a branch: from 0 to the weight of the base's attention.
ALPHA_TRAVEL = 1.0
# How far they may move in one step. Without it, a run of few steps would depend on one batch.
MAX_GATE_RATE, MAX_ALPHA_RATE = 0.25, 0.1


def train(
    parts: Iterable[tuple[TrainingTask, Tensor]],
    val_samples: Tensor,
    schedule: Schedule,
    checkpoints: Path,
    history_path: Path,
    memory_path: Path | None = None,
) -> dict[str, int | float | str]:
    """Train one part after another, each for all epochs, and return the results of the last.

    Epochs, parameters and tokens are counted over all parts. A killed run resumes from the last
    whole checkpoint. Without epochs, or without a parameter to train, a part only validates, and
    prints that.

    Args:
        parts: tasks and what they train on, token ids with one row a sample. Each is made once the
            part before it has ended.
        val_samples: the same, of other articles.
        schedule: how long and how fast.
        checkpoints: folder of the run.
        history_path: gets loss and perplexity by epoch and split (TSV).
        memory_path: gets the use of the memory by epoch (TSV); None: no file.

    Raises:
        FloatingPointError: if a loss is not finite.
    """
    past: Log = []
    num_tokens, trained = 0, {}
    for number, (task, samples) in enumerate(parts):
        part = f"part-{number + 1}" if number else ""
        report = Report(task, history_path, memory_path, past)
        own = {id(p): p.numel() for group in task.groups.values() for p in group}
        trained |= own  # a parameter of two parts counts once
        if schedule.epochs and own:
            log = _fit(task, samples, val_samples, schedule, checkpoints, report, part)
        else:
            metrics = task.run_validation(val_samples)
            log = [{PREFIX + name: value for name, value in metrics.items()}]
        task.merge()
        report.end(log, schedule.epochs)
        found = results(log, samples.numel(), past)
        num_tokens += found["num_trained_tokens"]
        past = joined(past, log)
    counts = {"num_trained_tokens": num_tokens, "num_trainable_parameters": sum(trained.values())}
    return found | counts


def outcome(metrics: dict[str, int | float | str]) -> str:
    """Describe in a line what `train` returned."""
    return (
        f"{metrics['num_trainable_parameters']:,} parameters trained on "
        f"{metrics['num_trained_tokens']:,} tokens, val_ppl {metrics['val_ppl']:.2f}"
    )


def _fit(
    task: TrainingTask,
    train_samples: Tensor,
    val_samples: Tensor,
    schedule: Schedule,
    run: Path,
    report: Report,
    part: str,
) -> Log:
    """Run the Trainer, from its last whole checkpoint if there is one, and return its log."""
    checkpoints = run / part
    arguments = _arguments(schedule, checkpoints, task.dtype)
    last = last_whole(checkpoints) if is_first_process() else None
    last = broadcast_object_list([last])[0]
    # The history of a resumed run holds its first validation already, and early stopping would
    # count it twice.
    arguments.eval_on_start = last is None
    state = read_state(last) if last else None
    if state is None or not is_over(state):
        num_steps = schedule.epochs * steps_per_epoch(len(train_samples), schedule.batch_size)
        train_set = Dataset.from_dict({"input_ids": train_samples.numpy()}).with_format("torch")
        trainer = _Trainer(
            model=task,
            args=arguments,
            train_dataset=train_set,
            eval_dataset=val_samples,
            optimizers=_optimizer(task, schedule.lr, num_steps),
            callbacks=[
                *(EarlyStoppingCallback(schedule.patience), report, Sealing()),
                *_tensorboard(Path(run.name, part)),
            ],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=last)
        state = trainer.state
    wait_for_everyone()
    load_best(task, checkpoints, state)  # in every process: another part may follow
    return state.log_history


def _arguments(schedule: Schedule, checkpoints: Path, dtype: torch.dtype) -> TrainingArguments:
    on_gpu = torch.cuda.is_available()
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        per_device_train_batch_size=schedule.batch_size,
        num_train_epochs=schedule.epochs,
        bf16=dtype is torch.bfloat16,
        use_cpu=not on_gpu,
        seed=schedule.seed,
        logging_strategy="epoch",
        logging_nan_inf_filter=False,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="val_loss",
        restore_callback_states_from_checkpoint=True,
        remove_unused_columns=False,
        dataloader_pin_memory=on_gpu,
        disable_tqdm=True,  # `Report` shows what happens
        report_to="none",  # but `_tensorboard`
    )
    if arguments.n_gpu > 1:
        # A process uses one GPU; torchrun starts one for each. The Trainer would split batches
        # among replicas of the model, without the layers of its teacher.
        arguments._n_gpu = 1
    return arguments


def _tensorboard(run: Path) -> list[TrainerCallback]:
    """Log to runs/ where TensorBoard is installed: the run's own folder is removed at its end."""
    if not is_tensorboard_available():
        return []
    callback = TensorBoardCallback()
    callback.logging_dir = callback.logging_dir or str("runs" / run)
    return [callback]


def _optimizer(task: TrainingTask, lr: float, num_steps: int) -> tuple[AdamW, LambdaLR]:
    """Return AdamW without weight decay, with rates that let gates move within this run."""
    factors = sum(rate_factor(step, num_steps) for step in range(num_steps))
    rates = {
        "gate": min(GATE_TRAVEL / factors, MAX_GATE_RATE),
        "alpha": min(ALPHA_TRAVEL / factors, MAX_ALPHA_RATE),
    }
    groups = [
        {"params": parameters, "lr": rates.get(name, lr * task.lr_scales.get(name, 1.0))}
        for name, parameters in task.groups.items()
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

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], **_: Any) -> Tensor:
        """Scale the loss so that N processes equal one with the whole batch.

        In the last step of an epoch the Trainer fills batches up with rows of the first step,
        which must not count.
        """
        num_rows, batch_size = len(self.train_dataset), self.args.per_device_train_batch_size
        step, process = self.state.global_step, self.args.process_index
        num_own, num_all = share_rows(num_rows, batch_size, step, process)
        rows = inputs["input_ids"][: max(num_own, 1)]
        loss = model(rows)["loss"] * (num_own * num_processes() / num_all)
        mean = self.accelerator.reduce(loss.detach(), "mean").item()
        _require_finite(mean, f"in epoch {int(self.state.epoch) + 1}, step {step + 1}", "training")
        return loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Validate with the task's own method.

        Every process does, and takes the results of rank 0, so that all stop together.
        """
        found = broadcast_object_list([self.model.run_validation(self.eval_dataset)])[0]
        place = f"in epoch {round(self.state.epoch or 0)}, step {self.state.global_step}"
        _require_finite(found["val_loss"], place, "validation")
        metrics = {PREFIX + name: value for name, value in found.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def _load_best_model(self) -> None:
        """Leave it to `load_best`, which verifies it and finds it where it lies."""

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Expect the frozen weights to be missing from a checkpoint, and nothing else."""
        assert not load_result.unexpected_keys, load_result.unexpected_keys


def _require_finite(loss: float, place: str, kind: str) -> None:
    """Raise FloatingPointError if a loss is not finite; the last checkpoint stays as it is."""
    if not math.isfinite(loss):
        raise FloatingPointError(
            f"training diverged {place}: the {kind} loss is {loss}; "
            "nothing was written, try a smaller lr"
        )


def steps_per_epoch(num_rows: int, batch_size: int) -> int:
    """Return how many steps an epoch has; each takes `batch_size` rows a process."""
    return math.ceil(num_rows / (batch_size * num_processes()))


def share_rows(num_rows: int, batch_size: int, step: int, process: int) -> tuple[int, int]:
    """Return how many rows of a step belong to one process, and how many the step has.

    The last step of an epoch may have fewer than `batch_size`, or none for some processes.
    """
    processes = num_processes()
    step %= steps_per_epoch(num_rows, batch_size)
    num_left = num_rows - step * batch_size * processes
    num_own = min(max(num_left - process * batch_size, 0), batch_size)
    return num_own, min(num_left, batch_size * processes)
