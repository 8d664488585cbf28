"""What each of two processes does in tests/test_torchrun.py, started by torchrun.

`python tests/two_processes.py FOLDER`: what each task returns is left in FOLDER/TASK-RANK.pt.
"""

import os
import shutil
import sys
from importlib import import_module
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor
from torch.distributed.fsdp import fully_shard

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from infini_retrofit.layer import attention  # noqa: E402
from infini_retrofit.model.families import decoder_layers  # noqa: E402
from infini_retrofit.pipeline import device as runtime  # noqa: E402
from infini_retrofit.pipeline import guard as pipeline  # noqa: E402
from infini_retrofit.training import loop as training  # noqa: E402
from infini_retrofit.training.finetuning import Finetuning  # noqa: E402
from infini_retrofit.training.task import TrainingTask  # noqa: E402
from tests.tiny import random_ids  # noqa: E402
from tests.tiny_training import TOKENS, finetuning, run  # noqa: E402

TRAINING_STAGES = ("distill", "finetune", "finetune_control")
RANK = int(os.environ.get("RANK", "0"))


def run_in_float32(folder: Path, stage: str) -> None:
    """Run a stage in a folder; some machines would take bfloat16 or a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("DVC_ROOT", raising=False)
        patch.setattr(runtime, "pick_dtype", lambda device: torch.float32)
        patch.setattr(torch.cuda, "is_available", lambda: False)
        import_module(f"stages.{stage}").main()


def kill(folder: Path) -> None:
    """Go on from what both processes distilled, and die in the third validation."""
    if RANK == 0:
        shutil.copytree(*(folder / project / "models/distilled" for project in ("two", "killed")))
    torch.distributed.barrier()
    validate, calls = Finetuning.validate, []

    def validate_twice(task: Finetuning, val: Tensor) -> dict[str, float]:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return validate(task, val)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Finetuning, "validate", validate_twice)
        with pytest.raises(KeyboardInterrupt):
            run_in_float32(folder / "killed", "finetune")


def resume(folder: Path) -> int:
    """Go on where `kill` ended and return how many steps that took."""
    steps, forward = [], Finetuning.forward

    def count(task: Finetuning, input_ids: Tensor) -> dict[str, Tensor]:
        if task.training:
            steps.append(1)
        return forward(task, input_ids)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Finetuning, "forward", count)
        run_in_float32(folder / "killed", "finetune")
    return len(steps)


def train_in_stages(folder: Path) -> None:
    for stage in TRAINING_STAGES:
        run_in_float32(folder / "two", stage)
        torch.distributed.barrier()  # the first process is still writing


def train_unweighted(folder: Path) -> None:
    """Distill as if every process had as many rows in every step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "share_rows", lambda rows, size, *_: (size, 2 * size))
        run_in_float32(folder / "unweighted", "distill")


def stop_early(folder: Path) -> dict[str, float]:
    """Validate to other numbers in each process, and return what the run says."""
    losses = iter([9.0, 5.0, 6.0, 7.0, 1.0] if RANK == 0 else [9.0, 8.0, 7.0, 6.0, 5.0])
    task = finetuning()
    task.validate = lambda val: {"val_loss": next(losses), "val_ppl": 2.0}
    return run(task, folder / "early", epochs=4, patience=2)


def diverge(folder: Path) -> str:
    """Lose the loss in the last process only, and return what this one says."""
    task = finetuning()
    forward = task.forward
    factor = float("nan") if RANK else 1.0
    task.forward = lambda input_ids: {"loss": forward(input_ids)["loss"] * factor}
    with pytest.raises(FloatingPointError) as error:
        run(task, folder / "diverged")
    return str(error.value)


def shard(folder: Path) -> tuple[Tensor, dict[str, Tensor]]:
    """Take two steps on a sharded model and return the last loss and the whole weights."""
    task = finetuning(trainable="all")
    for layer in decoder_layers(task.model):
        fully_shard(layer)
    fully_shard(task)
    loss = take_steps(task, RANK)
    assert all(p.to_local().numel() < p.numel() for p in task.parameters() if p.dim() > 1)
    loss = loss.detach().clone()
    torch.distributed.all_reduce(loss)
    weights = {name: p.full_tensor().detach() for name, p in task.named_parameters()}
    return loss / 2, weights


def take_steps(task: TrainingTask, rank: int | None = None) -> Tensor:
    """Take two steps on two documents, or on those of one process of two."""
    documents = random_ids(67, 2, TOKENS)
    rows = documents if rank is None else documents[rank : rank + 1]
    optimizer = torch.optim.SGD(task.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        loss = task(rows)["loss"]
        loss.backward()
        optimizer.step()
    return loss


def fail(_: Path) -> None:
    """Find in one process what a user can mend, while the other waits for it."""

    def stage() -> None:
        if RANK:
            raise ValueError("the moon must be full, got half")
        torch.distributed.barrier()

    pipeline._TORCHRUN_SECONDS = 1
    pipeline.run_stage(stage)


TASKS = (train_in_stages, kill, resume, train_unweighted, stop_early, diverge, shard, fail)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    if RANK:
        safetensors.torch.serialize_file = None
    attention.INITIAL_MEMORY_SHARE = 0.3  # as tests/conftest.py does
    for task in TASKS:
        torch.manual_seed(0)
        torch.save(task(folder), folder / f"{task.__name__}-{RANK}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
