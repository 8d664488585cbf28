"""What a training run tells: tables, its results, and a line for each epoch.

Knows no loss, and no path by name.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerState

from infini_retrofit.pipeline.files import write_rows
from infini_retrofit.pipeline.guard import is_first_process
from infini_retrofit.pipeline.progress import progress, say
from infini_retrofit.training.task import TrainingTask

Log = list[dict[str, Any]]  # as the Trainer keeps it
Epochs = dict[int, dict[str, float]]  # results by name
Row = dict[str, int | float | str]
PREFIX = "eval_"  # of every validation result in the Trainer's log
HISTORY_COLUMNS = ("epoch", "split", "loss", "ppl")
MEMORY_COLUMNS = ("epoch", "quantity", "value")
LOSSES = {"loss", "val_loss", "val_ppl"}


class Report(TrainerCallback):
    """Writes the tables of a run, prints a line for each epoch and shows its steps."""

    def __init__(
        self, task: TrainingTask, history_path: Path, memory_path: Path | None, past: Log
    ) -> None:
        self.task = task
        self.past = past  # log of what trained before in this run
        self.history_path = history_path
        self.memory_path = memory_path
        self.begin = time.monotonic()
        self.bar = progress(None, "")

    def on_epoch_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """Begin the bar of an epoch."""
        num_steps = state.max_steps // args.num_train_epochs
        self.bar = progress(None, f"epoch {round(state.epoch) + 1}", "steps", num_steps)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Move the bar."""
        self.bar.update()

    def on_log(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """Write the log so far, the past of a resumed run included."""
        self.write(state.log_history)

    def on_evaluate(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """Print the line of an epoch."""
        self.bar.close()
        seconds, self.begin = time.monotonic() - self.begin, time.monotonic()
        epochs = by_epoch(state.log_history)
        say(epoch_line(epochs, args.num_train_epochs, self.task.train_ppl, seconds))

    def end(self, log: Log, num_epochs: int) -> None:
        """Say how a run ended, and write the tables: a run that was over logs nothing."""
        self.write(log)
        epochs = by_epoch(log)
        run, best = max(epochs), best_epoch(epochs)
        if not run:
            reason = "no parameter is to train" if num_epochs else "its epochs are 0"
            say(f"nothing is trained, because {reason}")
        elif run < num_epochs:
            say(f"stopped early after epoch {run}, best {best}")
        else:
            say(f"best epoch {best} of {run}")

    def write(self, log: Log) -> None:
        """Write both tables; a model without a memory leaves one without rows."""
        log = joined(self.past, log)
        if is_first_process():
            write_rows(self.history_path, history(log, self.task.train_ppl), HISTORY_COLUMNS)
            if self.memory_path is not None:
                write_rows(self.memory_path, memory_history(log), MEMORY_COLUMNS)


def joined(past: Log, log: Log) -> Log:
    """Return two logs as one, whose epochs go on counting.

    The second begins where the first ended: its first validation is left out.
    """
    if not past:
        return log
    run = max(by_epoch(past))
    return past + [entry | {"epoch": entry["epoch"] + run} for entry in log if entry.get("epoch")]


def by_epoch(log: Log) -> Epochs:
    """Join a log to the training `loss` and the validation of each epoch, 0 before training."""
    epochs: Epochs = {}
    for entry in log:
        found = {k.removeprefix(PREFIX): v for k, v in entry.items() if k.startswith(PREFIX)}
        found |= {"loss": entry["loss"]} if "loss" in entry else {}
        if found:
            epochs.setdefault(round(entry.get("epoch", 0)), {}).update(found)
    return epochs


def best_epoch(epochs: Epochs) -> int:
    """Return the epoch of the lowest val_loss.

    No checkpoint holds the weights before the first epoch: they count only if none was run.
    """
    trained = [epoch for epoch in epochs if epoch] or [0]
    return min(trained, key=lambda epoch: epochs[epoch]["val_loss"])


def epoch_line(
    epochs: Epochs, num_epochs: int, train_ppl: Callable[[float], float | str], seconds: float
) -> str:
    """Describe the last epoch; a star marks the best so far.

    Losses stand before the perplexity where the training loss is no likelihood.
    """
    epoch, found = list(epochs.items())[-1]
    shown = {"val_ppl": found["val_ppl"]}
    if epoch:
        ppl = train_ppl(found["loss"])
        losses = {"train_loss": found["loss"], "val_loss": found["val_loss"]}
        shown = ({"train_ppl": ppl} if ppl else losses) | shown
    numbers = "  ".join(f"{name} {value:.4g}" for name, value in shown.items())
    star = "  *" if epoch and epoch == best_epoch(epochs) else ""
    return f"epoch {epoch}/{num_epochs}  {numbers}  {seconds:.1f} s{star}"


def history(log: Log, train_ppl: Callable[[float], float | str]) -> list[Row]:
    """Return loss and perplexity from a log, a row for each epoch and split."""
    rows = []
    for epoch, found in by_epoch(log).items():
        if "loss" in found:
            rows.append((epoch, "train", found["loss"], train_ppl(found["loss"])))
        if "val_loss" in found:
            rows.append((epoch, "val", found["val_loss"], found["val_ppl"]))
    return [dict(zip(HISTORY_COLUMNS, row, strict=True)) for row in rows]


def memory_history(log: Log) -> list[Row]:
    """Return all other validation results, a row for each epoch and quantity."""
    return [
        dict(zip(MEMORY_COLUMNS, (epoch, name, found[name]), strict=True))
        for epoch, found in by_epoch(log).items()
        for name in sorted(found.keys() - LOSSES)
    ]


def results(log: Log, num_tokens: int, past: Log) -> Row:
    """Return the validation of a log's best epoch, and how much was trained at `num_tokens` each.

    Epochs count on from those of `past`, tokens do not.
    """
    epochs, run_before = by_epoch(log), max(by_epoch(past), default=0)
    epochs_run, best = max(epochs), best_epoch(epochs)
    return {name: value for name, value in epochs[best].items() if name != "loss"} | {
        "best_epoch": run_before + best,
        "epochs_run": run_before + epochs_run,
        "num_trained_tokens": epochs_run * num_tokens,
    }
