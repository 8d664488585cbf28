"""Checkpoints of a run: when one is whole, where a run goes on, and the weights that it keeps.

A kill leaves files of a checkpoint missing or short, and a disk may damage them. A checkpoint is
whole if it agrees with its manifest, which is written last. Knows no loss, no stage and no path
by name.
"""

import shutil
from pathlib import Path
from typing import Any

from accelerate.utils import wait_for_everyone
from safetensors.torch import load_file
from torch import nn
from transformers import TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint, rotate_checkpoints
from transformers.utils import SAFE_WEIGHTS_NAME

from infini_retrofit.pipeline.files import verify_manifest, write_manifest
from infini_retrofit.pipeline.guard import is_first_process
from infini_retrofit.pipeline.progress import say


class Sealing(TrainerCallback):
    """Completes each checkpoint by its manifest."""

    def on_save(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """Write the manifest once every process has written; keep the best and one more."""
        wait_for_everyone()
        if is_first_process():
            folder = Path(args.output_dir)
            write_manifest(_at_step(folder, state.global_step))
            # Not the Trainer's own `save_total_limit`, which deletes before the manifest is there.
            rotate_checkpoints(str(folder), 2, str(_best(folder, state)))


def last_whole(folder: Path) -> str | None:
    """Return the newest checkpoint that is whole, like the best one until then.

    Newer ones are deleted, with a note for each: the run makes them again.
    """
    while folder.is_dir() and (last := get_last_checkpoint(folder)):
        try:
            verify_manifest(Path(last))
            verify_manifest(_best(folder, read_state(last)))
            return last
        except (OSError, ValueError):
            say(f"{last} is skipped: a file of it or of the best one is missing or damaged")
            shutil.rmtree(last)
    return None


def read_state(checkpoint: str) -> TrainerState:
    """Read the Trainer's state of a whole checkpoint."""
    return TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))


def is_over(state: TrainerState) -> bool:
    """Return whether a run had no epoch left; one that stopped early has none either."""
    return state.stateful_callbacks["TrainerControl"]["args"]["should_training_stop"]


def load_best(model: nn.Module, folder: Path, state: TrainerState) -> None:
    """Load the weights of the best epoch.

    Raises:
        ValueError: if they were damaged since they were written.
    """
    best = _best(folder, state)
    verify_manifest(best)
    keys = model.load_state_dict(load_file(best / SAFE_WEIGHTS_NAME), strict=False)
    assert not keys.unexpected_keys, keys.unexpected_keys  # but the frozen weights are missing


def _best(folder: Path, state: TrainerState) -> Path:
    """Return the best checkpoint; the path in `state` is wrong once the project was moved."""
    return _at_step(folder, state.best_global_step)


def _at_step(folder: Path, step: int) -> Path:
    return folder / f"checkpoint-{step}"
