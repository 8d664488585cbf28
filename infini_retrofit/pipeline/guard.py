"""The guard of a run: what DVC does not check, and one sentence for an error.

DVC deletes a stage's outputs before the stage starts, and a killed DVC leaves the stage running.
DVC records the code and parameters that it finds at the end. Knows no stage or section by name.
"""

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from filelock import AcquireReturnProxy, FileLock, Timeout

from infini_retrofit.pipeline.files import MANIFEST, check_writable, sha256, write_text
from infini_retrofit.pipeline.params import PARAMS_PATH, read_params
from infini_retrofit.pipeline.schema import leaves

SECONDS = Path(".dvc/tmp/seconds")  # how long each stage took; no output, for it always differs
FREE_BYTES = 4 << 30  # for a checkpoint with its optimizer state, the model, and DVC's copy of it
_ROOT = Path(__file__).resolve().parents[2]  # holds the library, the stages and dvc.yaml
_CODE = ("stages/", "infini_retrofit/", "analysis/")
_IMPORTED: dict[str, str] = {}  # digests of the code as this process imported it
_DISK_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
_LOCK, _KEPT = ".lock", ".done"  # beside the checkpoint folder of a run
_TORCHRUN_SECONDS = 3  # in which torchrun ends the processes beside a failed one
_PR_SET_PDEATHSIG = 1  # of Linux's prctl.h


class ChangedWhileRunningError(RuntimeError):
    """Code or parameters are no longer those that the run began with."""


# Errors that a user can mend.
_MISTAKES = (ValueError, OSError, FloatingPointError, ChangedWhileRunningError)
_BEGUN: dict[str, "Dependencies"] = {}  # of the stage that this process runs


def is_first_process() -> bool:
    """Return whether this process is alone or rank 0; torch.distributed need not have begun."""
    return os.environ.get("RANK", "0") == "0"


def num_processes() -> int:
    """Return how many processes torchrun started; torch.distributed need not have begun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def run_stage(main: Callable[[], str | None]) -> None:
    """Run a stage's `main`; a user's mistake ends in one sentence and exit code 1.

    The first process prints what `main` returns, and the seconds. A stage fails if what dvc.yaml
    lists for it changed meanwhile. Other exceptions keep their traceback.

    Under DVC the stage ends with its parent: the next `dvc` would start it a second time. The
    seconds of a stage that ends well stand in the folder `SECONDS`. A training that ended well
    before, but that DVC did not record, is not run again.
    """
    if "DVC_ROOT" in os.environ:
        _die_with_parent()
    try:
        _refuse_shallow()
        begin = time.monotonic()
        stage = _stage_of(main)
        made = _run_guarded(main, stage) if stage else main()
        if made and is_first_process():
            print(f"{made}, {time.monotonic() - begin:.1f} s", flush=True)
    except Exception as error:
        on_disk = _disk_fault(error)
        is_mistake = isinstance(error, _MISTAKES) or on_disk is not None
        # torchrun ends the others when one has failed: rank 0 reports a mistake first. Another
        # error waits in rank 0 as well, for another rank's report.
        if num_processes() > 1 and not (is_first_process() and is_mistake):
            time.sleep(_TORCHRUN_SECONDS if is_first_process() else 2 * _TORCHRUN_SECONDS)
        if is_mistake:
            sys.exit("error: " + " ".join((on_disk or str(error)).split()))
        raise
    except KeyboardInterrupt:
        sys.exit(130)
    if "DVC_STAGE" in os.environ and is_first_process():
        _note_seconds(os.environ["DVC_STAGE"])


def note_code() -> None:
    """Digest all code; an edit while a stage imports it is then noticed as well."""
    _IMPORTED.update(_code_digests(_CODE))


class Dependencies:
    """What a stage depends on, as it was when the object was made.

    That is what dvc.yaml lists: code, other files, and values of params.yaml. A folder's manifest
    stands for the folder.

    Args:
        stage: its name in dvc.yaml.
    """

    def __init__(self, stage: str) -> None:
        from ruamel.yaml import YAML  # here, for chat and export run without it

        self.stage = stage
        self.listed = YAML(typ="safe").load(_ROOT / "dvc.yaml")["stages"][stage]
        found = self._read()
        self.before = found | {name: _IMPORTED[name] for name in found if name in _IMPORTED}

    def fingerprint(self) -> str:
        """Hash all of them, wherever the project's folder lies."""
        # A step sees a batch of every process.
        text = json.dumps([self.before, num_processes()], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def check(self) -> None:
        """Refuse if one of them was edited since."""
        try:
            now = self._read()
            names = dict.fromkeys([*self.before, *now])
            changed = [name for name in names if self.before.get(name) != now.get(name)]
        except (ValueError, OSError) as error:
            changed = [str(error)]
        if changed:
            more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
            raise ChangedWhileRunningError(
                f"{self.stage}: changed while it was running: {', '.join(changed[:3])}{more}; "
                "run it again"
            )

    def outputs(self) -> list[str]:
        """List the paths of all outputs."""
        entries = self.listed["outs"]
        return [entry if isinstance(entry, str) else next(iter(entry)) for entry in entries]

    def _read(self) -> dict[str, str]:
        """Return parameters, digests of code and digests of other files, by name."""
        listed, found = self.listed.get("params", []), {}
        params = dict(leaves(read_params())) if listed else {}
        for entry in listed:
            name = entry if isinstance(entry, str) else ""  # the whole file
            name = re.sub(r"\$\{(\w+)\}", lambda match: str(params.get(match[1])), name)
            for key, value in params.items():
                if not name or f"{key}.".startswith(f"{name}."):
                    found[f"{PARAMS_PATH}: {key}"] = repr(value)
        code = [dep for dep in self.listed["deps"] if dep.startswith(_CODE)]
        found |= _code_digests(code)
        return found | {dep: _digest(Path(dep)) for dep in self.listed["deps"] if dep not in code}


@contextlib.contextmanager
def training_run(stage: str) -> Iterator[Path]:
    """Guard a training run and lend it a checkpoint folder.

    The folder's name is a hash of everything that the result depends on: a restarted run finds
    its checkpoints, and no other run does. A run that ends well removes the folder. It stands in
    DVC's main root: DVC deletes a stage's outputs, and the whole folder of a temporary run.

    If an equal run is under way, a single process waits, and one of several is refused. Under DVC
    the outputs are kept until DVC has recorded them.
    """
    dependencies = _BEGUN.get(stage) or Dependencies(stage)
    folder, is_first = _folder(dependencies), is_first_process()
    lock = FileLock(folder.with_suffix(_LOCK))
    for place in (folder, Path.cwd()):
        check_writable(place, FREE_BYTES)
    with _end_on_sigterm(), _acquire(lock) if is_first else contextlib.nullcontext():
        folder.mkdir(exist_ok=True)  # an equal run may have removed it
        dependencies.check()  # or its checkpoints would be of what `main` has read since
        yield folder
        dependencies.check()
        if is_first:
            if "DVC_STAGE" in os.environ:
                _keep(dependencies, folder)
            _remove(folder)


def _stage_of(main: Callable[[], str | None]) -> str | None:
    """Return the name of the stage whose module has `main`; another program is none."""
    spec = sys.modules[main.__module__].__spec__
    package, _, name = spec.name.rpartition(".") if spec else ("", "", "")
    return name if package == "stages" else None


def _run_guarded(main: Callable[[], str | None], stage: str) -> str | None:
    """Run a stage, or bring its result back; refuse if what it depends on changed."""
    _BEGUN[stage] = dependencies = Dependencies(stage)
    try:
        if "DVC_STAGE" in os.environ and _bring_back(dependencies):
            made = f"{stage}: brought back the result of the same run, which DVC had not recorded"
        else:
            made = main()
        dependencies.check()
    finally:
        del _BEGUN[stage]
    return made


def _checkpoints() -> Path:
    """Return the folder of all checkpoints, in the main root also of a temporary run."""
    return Path(os.environ.get("DVC_ROOT", ".")) / "checkpoints"


def _folder(dependencies: Dependencies) -> Path:
    """Return the checkpoint folder of a run; its lock and kept outputs stand beside it."""
    return _checkpoints() / f"{dependencies.stage}-{dependencies.fingerprint()}"


def _remove(folder: Path) -> None:
    """Remove checkpoints and lock of a run that ended well."""
    shutil.rmtree(folder, ignore_errors=True)
    # A process that waits for the lock makes a new one.
    folder.with_suffix(_LOCK).unlink(missing_ok=True)


def _keep(dependencies: Dependencies, folder: Path) -> None:
    """Copy the outputs of a training, in place of those of its last run."""
    for old in folder.parent.glob(f"{dependencies.stage}-*{_KEPT}"):
        shutil.rmtree(old)
    partial = folder / "outputs"  # removed with the folder, should the run be killed here
    for _ in range(2):
        shutil.rmtree(partial, ignore_errors=True)
        try:
            for path in map(Path, dependencies.outputs()):
                (partial / path.parent).mkdir(parents=True, exist_ok=True)
                copy = shutil.copytree if path.is_dir() else shutil.copyfile
                copy(path, partial / path)
            partial.rename(folder.with_suffix(_KEPT))
            break
        except OSError:  # the disk is full: they matter more than checkpoints
            shutil.rmtree(folder, ignore_errors=True)


def _bring_back(dependencies: Dependencies) -> bool:
    """Put the kept outputs back unless DVC recorded them; remove what it recorded of others.

    A run that was killed after it kept them left its checkpoints and its lock.
    """
    folder, is_first = _folder(dependencies), is_first_process()
    kept = folder.with_suffix(_KEPT)
    others = set(_checkpoints().glob(f"*{_KEPT}")) - {kept}
    for other in filter(_is_recorded, others if is_first else ()):
        shutil.rmtree(other)
    if not kept.is_dir() or _is_recorded(kept):
        return False
    if is_first:
        shutil.copytree(kept, ".", dirs_exist_ok=True)
        _remove(folder)
    return True


def _is_recorded(kept: Path) -> bool:
    """Return whether dvc.lock has the metrics and tables that a training kept."""
    from ruamel.yaml import YAML  # here, for chat and export run without it

    lock, stage = Path("dvc.lock"), kept.name.rpartition("-")[0]
    stages = YAML(typ="safe").load(lock)["stages"] if lock.is_file() else {}
    recorded = {kept / out["path"]: out["md5"] for out in stages.get(stage, {}).get("outs", [])}
    files = [path for path in recorded if path.is_file()]
    return bool(files) and all(_md5(path) == recorded[path] for path in files)


def _md5(path: Path) -> str:
    """Return the hash that DVC takes."""
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


def _disk_fault(error: BaseException | None) -> str | None:
    """Return a sentence if a disk caused an error, which a library may have wrapped."""
    chain = []
    while error is not None:
        chain.append(error)
        error = error.__cause__ or error.__context__
    said = " ".join(map(str, chain))
    reasons = [reason for reason in map(os.strerror, _DISK_FAULTS) if reason in said]
    if "PytorchStreamWriter failed" in said or "iostream error" in said:  # torch's, without a cause
        reasons.append("a file could not be written")
    if not reasons:
        return None
    errors = [e for e in chain if isinstance(e, OSError) and e.errno in _DISK_FAULTS]
    names = [str(e.filename) for e in errors if e.filename]
    places = [_checkpoints(), Path.cwd(), Path(tempfile.gettempdir())]
    places = [next(p for p in Path(names[0]).absolute().parents if p.is_dir())] if names else places
    free, place = min((shutil.disk_usage(p).free, p) for p in places if p.is_dir())
    path = names[0] if names else f"a file below {place}"
    return (
        f"{reasons[0]}: {path}, {free:,} bytes free; free space on that disk or move the project, "
        "then run the same command again: a training goes on from its last checkpoint"
    )


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


def _code_digests(places: Iterable[str]) -> dict[str, str]:
    """Hash every module of files and folders of the project, by its path there."""
    paths = [_ROOT / place for place in places]
    files = [file for path in paths for file in (path.rglob("*.py") if path.is_dir() else [path])]
    return {file.relative_to(_ROOT).as_posix(): _digest(file) for file in sorted(files)}


def _digest(path: Path) -> str:
    """Hash a file, a folder's manifest, or all files of a folder without one."""
    if path.is_dir() and not (path / MANIFEST).is_file():
        files = sorted(p for p in path.rglob("*") if p.is_file())
        return json.dumps({p.relative_to(path).as_posix(): sha256(p) for p in files})
    path = path / MANIFEST if path.is_dir() else path
    return sha256(path) if path.is_file() else "missing"


@contextlib.contextmanager
def _end_on_sigterm() -> Iterator[None]:
    """Turn SIGTERM into an exit that unwinds the stack, so that files close."""
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _refuse_shallow() -> None:
    """Refuse a copy of a shallow clone, whose experiment DVC would lose and call a success."""
    root = Path(os.environ.get("DVC_ROOT", ".")).resolve()
    if root == Path.cwd().resolve():
        return
    command = ["git", "-C", str(root), "rev-parse", "--is-shallow-repository"]
    if subprocess.run(command, capture_output=True).stdout == b"true\n":
        raise ValueError(
            f"{root} is a shallow clone, where DVC loses what --temp and the queue run: "
            "run `git fetch --unshallow` first"
        )


def note_seconds(name: str, seconds: float) -> None:
    """Write how long something took in a stage that DVC runs, for the report."""
    if "DVC_STAGE" in os.environ:
        with contextlib.suppress(OSError):  # no stage fails for them
            write_text(SECONDS / name, f"{seconds:.6f}\n")


def _note_seconds(stage: str) -> None:
    """Write how long this process has run, its imports included."""
    import psutil  # here, for chat and export run without it

    note_seconds(stage, time.time() - psutil.Process().create_time())


def _die_with_parent() -> None:
    """Ask Linux for SIGTERM when the process that started this one ends, killed or not."""
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            sys.exit(128 + signal.SIGTERM)
