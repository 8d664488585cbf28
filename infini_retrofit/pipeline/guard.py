"""What DVC leaves to a stage: one sentence for an error, and the guard around a training run.

DVC deletes a stage's outputs before it starts it, outlives or orphans it without noticing, and
records the parameters it finds at the end. Knows no stage, section or file by name.
"""

import contextlib
import ctypes
import hashlib
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from infini_retrofit.pipeline.files import MANIFEST, check_made, sha256
from infini_retrofit.pipeline.folder_lock import locked
from infini_retrofit.pipeline.params import PARAMS_PATH, load_section

# Seconds for torchrun to end a process that failed because another did, or as another did.
_PATIENCE = 3
FREE_BYTES = 4 << 30  # a checkpoint with its optimizer state, the model, its copy in the cache
_PR_SET_PDEATHSIG = 1


# The folder that holds the library, the stages and dvc.yaml.
_ROOT = Path(__file__).resolve().parents[2]


class ChangedWhileRunningError(RuntimeError):
    """Code or parameters are no longer what the run began with."""


# What a user can mend.
_MISTAKES = (ValueError, OSError, FloatingPointError, ChangedWhileRunningError)


@dataclass(frozen=True)
class TrainingFolder:
    """Where a run keeps what it needs to go on after a kill.

    Attributes:
        path: the folder.
        is_first: whether this process is the one of several (torchrun) that writes results.
    """

    path: Path
    is_first: bool


def run_stage(main: Callable[[], None]) -> None:
    """Run a stage's `main`; a user's mistake ends in one sentence and exit code 1.

    Other exceptions keep their traceback, because they are ours. Of several processes (torchrun)
    one speaks, and torchrun ends the others. Under DVC the stage dies with
    its parent: a killed `dvc` would leave it running, and the next one would start a second.
    """
    if "DVC_ROOT" in os.environ:
        _die_with_parent()
    try:
        with _one_voice():
            main()
    except _MISTAKES as error:
        sys.exit("error: " + " ".join(str(error).split()))
    except KeyboardInterrupt:
        sys.exit(130)


def is_first_process() -> bool:
    """Tell whether this process is alone or the first of several (torchrun)."""
    return os.environ.get("RANK", "0") == "0"


def stage_code(stage: str) -> list[Path]:
    """Return the source files of a stage: its module and rooms, as dvc.yaml lists them."""
    from ruamel.yaml import YAML  # here, for chat and export run without it

    stages = YAML(typ="safe").load(_ROOT / "dvc.yaml")["stages"]
    deps = [_ROOT / dep for dep in stages[stage]["deps"]]
    folders = [dep for dep in deps if (dep / "__init__.py").is_file()]
    files = [dep for dep in deps if dep.suffix == ".py"]
    return sorted([*files, *(file for folder in folders for file in folder.rglob("*.py"))])


@contextlib.contextmanager
def training_run(
    stage: str,
    inputs: Sequence[Path],
    params: Mapping[str, Any],
    code: Sequence[Path],
    free_bytes: int = FREE_BYTES,
) -> Iterator[TrainingFolder]:
    """Guard a training run and lend it the checkpoint folder that is its own.

    The folder's name is a hash of everything the result depends on, so that a restarted run
    finds its checkpoints and a different run never does. It is removed when the block ends well
    and kept otherwise. It stands in DVC's main root, because DVC deletes a stage's outputs, and
    a temporary run's whole folder. Of several processes (torchrun) the first holds the lock.

    Args:
        stage: name of the stage.
        inputs: files and folders that the run reads; a folder with a manifest stands by it.
        params: the dataclasses or plain values that the run uses, by their names in params.yaml.
        code: source files of the run (see `stage_code`).
        free_bytes: what the disk must have free at the start.

    Raises:
        ChangedWhileRunningError: if `code` or `params` differ from the files, at start or end.
        FileNotFoundError: if an input is missing.
        OSError: if the disk is full or read-only, or, of several processes, an equal run is under
            way; a single process waits for its end.
    """
    root = Path(os.environ.get("DVC_ROOT", "."))
    folder = root / "checkpoints" / f"{stage}-{_fingerprint(inputs, params, code)}"
    is_first = is_first_process()
    _check_writable(folder, free_bytes)
    with (
        _end_on_sigterm(),
        locked(folder, "the same training", waits=_num_processes() == 1)
        if is_first
        else contextlib.nullcontext(),
    ):
        with unchanged(stage, params, code):
            yield TrainingFolder(folder, is_first)
        if is_first:
            shutil.rmtree(folder)


@contextlib.contextmanager
def unchanged(stage: str, params: Mapping[str, Any], code: Sequence[Path]) -> Iterator[None]:
    """Refuse to end well if code or parameters were edited since the block began.

    DVC records what it finds at the end of a stage, as if that had made the result.

    Raises:
        ChangedWhileRunningError: naming what changed.
    """
    digests = {path: sha256(path) for path in code}
    _check_unchanged(stage, digests, params)
    yield
    _check_unchanged(stage, digests, params)


@contextlib.contextmanager
def _one_voice() -> Iterator[None]:
    """Hold back what a process fails with while another may be saying why.

    A mistake that all notice is the first one's to say. A process that has lost another to
    talk to has nothing to say.
    """
    try:
        yield
    except Exception as error:
        if _num_processes() > 1 and not (is_first_process() and isinstance(error, _MISTAKES)):
            time.sleep(_PATIENCE if is_first_process() else 2 * _PATIENCE)
        raise


def _num_processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _fingerprint(inputs: Sequence[Path], params: Mapping[str, Any], code: Sequence[Path]) -> str:
    """Hash inputs, parameters and code, wherever the project's folder lies."""
    plain = {name: asdict(v) if is_dataclass(v) else v for name, v in params.items()}
    files = {f"{path.parent.name}/{path.name}": sha256(path) for path in code}
    digests = {str(path): _input_digest(path) for path in inputs}
    # A step sees a batch of every process.
    everything = [digests, plain, files, _num_processes()]
    text = json.dumps(everything, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _input_digest(path: Path) -> str | dict[str, str]:
    """Hash a file, a folder's manifest, or all files of a folder without one."""
    if not path.is_dir():
        check_made(path, "dvc repro")
        return sha256(path)
    if (path / MANIFEST).is_file():
        return sha256(path / MANIFEST)
    return {str(p.relative_to(path)): sha256(p) for p in path.rglob("*") if p.is_file()}


def _check_unchanged(stage: str, code: Mapping[Path, str], params: Mapping[str, Any]) -> None:
    """Refuse to let DVC record code or parameters that did not make the result."""
    changed = [str(path) for path, digest in code.items() if _sha256_or_none(path) != digest]
    changed += [
        f"{PARAMS_PATH}: {name}" for name, value in params.items() if not _is_still(name, value)
    ]
    if changed:
        raise ChangedWhileRunningError(
            f"{stage}: changed while it was running: {', '.join(changed)}; run it again"
        )


def _sha256_or_none(path: Path) -> str | None:
    """Hash a file that may have been deleted."""
    return sha256(path) if path.is_file() else None


def _is_still(name: str, value: Any) -> bool:
    """Tell whether params.yaml still holds `value`; an invalid new value is another one."""
    try:
        return load_section(type(value), name) == value
    except (ValueError, FileNotFoundError):
        return False


def _check_writable(folder: Path, free_bytes: int) -> None:
    """Make the folder, and find out now rather than after training that a disk is full."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for place in (folder, Path.cwd()):
            probe = place / f".writable-{os.getpid()}"
            probe.write_bytes(b"")
            probe.unlink(missing_ok=True)  # on another node a process may have the same number
    except OSError as error:
        raise OSError(f"cannot write to {error.filename}: {error.strerror}") from error
    for place in (folder, Path.cwd()):
        if (free := shutil.disk_usage(place).free) < free_bytes:
            raise OSError(
                f"{place} must have {free_bytes / 2**30:.1f} GiB free for checkpoints and the "
                f"model, got {free / 2**30:.1f} GiB"
            )


@contextlib.contextmanager
def _end_on_sigterm() -> Iterator[None]:
    """Turn SIGTERM into an exit that unwinds the stack, so that files close."""

    def end(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _die_with_parent() -> None:
    """Ask Linux for SIGTERM when the process that started this one ends, killed or not."""
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            sys.exit(128 + signal.SIGTERM)
