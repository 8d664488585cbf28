"""The guard of a run: what DVC does not check, and one sentence for an error.

DVC deletes a stage's outputs before the stage starts, and a killed DVC leaves the stage running.
DVC records the code and parameters that it finds at the end. Knows no stage or section by name.
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
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from filelock import AcquireReturnProxy, FileLock, Timeout

from infini_retrofit.pipeline.files import MANIFEST, check_made, check_writable, sha256, write_text
from infini_retrofit.pipeline.params import PARAMS_PATH, load_section

SECONDS = Path(".dvc/tmp/seconds")  # how long each stage took; no output, for it always differs
_ROOT = Path(__file__).resolve().parents[2]  # holds the library, the stages and dvc.yaml
_TORCHRUN_SECONDS = 3  # in which torchrun ends the processes beside a failed one
_PR_SET_PDEATHSIG = 1  # of Linux's prctl.h


class ChangedWhileRunningError(RuntimeError):
    """Code or parameters are no longer those that the run began with."""


# Errors that a user can mend.
_MISTAKES = (ValueError, OSError, FloatingPointError, ChangedWhileRunningError)


def is_first_process() -> bool:
    """Return whether this process is alone or rank 0; torch.distributed need not have begun."""
    return os.environ.get("RANK", "0") == "0"


def num_processes() -> int:
    """Return how many processes torchrun started; torch.distributed need not have begun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def run_stage(main: Callable[[], str | None]) -> None:
    """Run a stage's `main`; a user's mistake ends in one sentence and exit code 1.

    The first process prints what `main` says that it made, and the seconds that it took.
    Other exceptions are mistakes of the code and keep their traceback. Under DVC the stage ends
    with its parent, because the next `dvc` would start the same stage beside it, and a stage that
    ends well notes its seconds in the folder `SECONDS`.
    """
    if "DVC_ROOT" in os.environ:
        _die_with_parent()
    try:
        begin = time.monotonic()
        made = main()
        if made and is_first_process():
            print(f"{made}, {time.monotonic() - begin:.1f} s", flush=True)
        if "DVC_STAGE" in os.environ and is_first_process():
            _note_seconds(os.environ["DVC_STAGE"])
    except Exception as error:
        is_mistake = isinstance(error, _MISTAKES)
        # torchrun ends the others when one has failed: rank 0 reports a mistake first. Another
        # error waits in rank 0 as well, for another rank's report.
        if num_processes() > 1 and not (is_first_process() and is_mistake):
            time.sleep(_TORCHRUN_SECONDS if is_first_process() else 2 * _TORCHRUN_SECONDS)
        if is_mistake:
            sys.exit("error: " + " ".join(str(error).split()))
        raise
    except KeyboardInterrupt:
        sys.exit(130)


def stage_code(stage: str) -> list[Path]:
    """Return the source files of a stage: its module and rooms, as dvc.yaml lists them."""
    from ruamel.yaml import YAML  # here, for chat and export run without it

    deps = YAML(typ="safe").load(_ROOT / "dvc.yaml")["stages"][stage]["deps"]
    code = [_ROOT / dep for dep in deps if dep.startswith(("stages/", "infini_retrofit/"))]
    return sorted(file for dep in code for file in (dep.rglob("*.py") if dep.is_dir() else [dep]))


@contextlib.contextmanager
def training_run(
    stage: str,
    inputs: Sequence[Path],
    params: Mapping[str, Any],
    code: Sequence[Path],
    free_bytes: int = 4 << 30,
) -> Iterator[Path]:
    """Guard a training run and lend it a checkpoint folder.

    The folder's name is a hash of everything that the result depends on: a restarted run finds
    its checkpoints, and no other run does. A run that ends well removes the folder. It stands in
    DVC's main root: DVC deletes a stage's outputs, and the whole folder of a temporary run.

    A manifest stands for its folder among the `inputs`. The `params` have their names in
    params.yaml. Like the `code`, they must not change before the end. If an equal run is under
    way, a single process waits, and one of several is refused. `free_bytes`: for a checkpoint
    with its optimizer state, the model, and its copy in the cache.
    """
    root = Path(os.environ.get("DVC_ROOT", "."))
    folder = root / "checkpoints" / f"{stage}-{_fingerprint(inputs, params, code)}"
    lock, is_first = FileLock(f"{folder}.lock"), is_first_process()
    for place in (folder, Path.cwd()):
        check_writable(place, free_bytes)
    with _end_on_sigterm(), _acquire(lock) if is_first else contextlib.nullcontext():
        folder.mkdir(exist_ok=True)  # an equal run may have removed it
        with unchanged(stage, params, code):
            yield folder
        if is_first:
            shutil.rmtree(folder)
            Path(lock.lock_file).unlink()  # a process that waits for it makes a new one


@contextlib.contextmanager
def unchanged(stage: str, params: Mapping[str, Any], code: Sequence[Path]) -> Iterator[None]:
    """Refuse to end well if code or parameters were edited since the block began."""
    digests = {path: sha256(path) for path in code}

    def check() -> None:
        changed = [str(p) for p in code if not p.is_file() or sha256(p) != digests[p]]
        changed += [f"{PARAMS_PATH}: {k}" for k, value in params.items() if not _is_still(k, value)]
        if changed:
            raise ChangedWhileRunningError(
                f"{stage}: changed while it was running: {', '.join(changed)}; run it again"
            )

    check()
    yield
    check()


def _acquire(lock: FileLock) -> AcquireReturnProxy:
    """Take the lock of a training; the system releases it however the process ends."""
    try:
        return lock.acquire(blocking=False)
    except Timeout as error:
        told = f"the same training is under way in another process, which holds {lock.lock_file}"
        if num_processes() > 1:
            raise BlockingIOError(f"{told}: wait for it or end it") from error
        print(f"waiting: {told}", file=sys.stderr, flush=True)
        return lock.acquire()


def _fingerprint(inputs: Sequence[Path], params: Mapping[str, Any], code: Sequence[Path]) -> str:
    """Hash inputs, parameters and code, wherever the project's folder lies."""
    plain = {name: asdict(v) if is_dataclass(v) else v for name, v in params.items()}
    files = {f"{path.parent.name}/{path.name}": sha256(path) for path in code}
    digests = {str(path): _input_digest(path) for path in inputs}
    # A step sees a batch of every process.
    text = json.dumps([digests, plain, files, num_processes()], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _input_digest(path: Path) -> str | dict[str, str]:
    """Hash a file, a folder's manifest, or all files of a folder without one."""
    if not path.is_dir():
        check_made(path, "dvc repro")
        return sha256(path)
    if (path / MANIFEST).is_file():
        return sha256(path / MANIFEST)
    return {str(p.relative_to(path)): sha256(p) for p in path.rglob("*") if p.is_file()}


def _is_still(name: str, value: Any) -> bool:
    """Return whether params.yaml still holds `value`; an invalid value is another one."""
    try:
        return load_section(type(value), name) == value
    except (ValueError, FileNotFoundError):
        return False


@contextlib.contextmanager
def _end_on_sigterm() -> Iterator[None]:
    """Turn SIGTERM into an exit that unwinds the stack, so that files close."""
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _note_seconds(stage: str) -> None:
    """Write how long this process has run, its imports included."""
    import psutil  # here, for chat and export run without it

    write_text(SECONDS / stage, f"{time.time() - psutil.Process().create_time():.1f}\n")


def _die_with_parent() -> None:
    """Ask Linux for SIGTERM when the process that started this one ends, killed or not."""
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            sys.exit(128 + signal.SIGTERM)
