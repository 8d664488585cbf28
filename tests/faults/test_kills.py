"""Stages that are killed under DVC: `dvc repro` then ends as if nothing had happened.

`pytest -m faults -s tests/faults/test_kills.py` prints a line for each kill.
"""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from ruamel.yaml import YAML

from infini_retrofit.pipeline.files import verify_manifest
from tests.test_dvc import CODE
from tests.tiny_checkout import commit, git, keep_settings_apart
from tests.tiny_project import LINEAR, ROOT, contents, make_project, run_stages

pytestmark = [
    pytest.mark.faults,
    pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process of its parent"),
]

TRAINING = ("distill", "finetune", "finetune_control")
STAGES = (*TRAINING, "eval_sliding")
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
TARGETS = ("stage", "dvc", "group")
# What a checkpoint is made of, in the order in which it is written.
FILES = ("model.safetensors", "training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth")
SEED, NUM_RANDOM, NUM_TORN = 0, 20, 10
EPOCHS = {f"{section}.{key}": 6 for section in TRAINING[:2] for key in ("epochs", "patience")}


@dataclass(frozen=True)
class Kill:
    """One signal to one of the processes of `dvc repro STAGE`."""

    stage: str
    number: signal.Signals
    target: str
    share: float = 0.0  # of an undisturbed run's time
    file: str = ""  # or as soon as a checkpoint has this file, and not yet the others
    epoch: int = 0  # of the first checkpoint for which this is tried, from 1

    def __str__(self) -> str:
        """Return the beginning of its line in the table."""
        when = f"epoch {self.epoch} {self.file}" if self.file else f"{self.share:.0%}"
        return f"{self.stage:<16} {self.number.name:<7} {self.target:<5} {when:<25}"


def plan() -> list[Kill]:
    """Draw kills; every stage, signal and target has about as many."""
    draw = random.Random(SEED)
    ways = [(number, target) for number in SIGNALS for target in TARGETS]
    at_random = [
        Kill(STAGES[i % len(STAGES)], *ways[i % len(ways)], share=draw.random())
        for i in range(NUM_RANDOM)
    ]
    # DVC ignores SIGINT while a stage runs, so that would tear no checkpoint.
    ways.remove((signal.SIGINT, "dvc"))
    torn = [
        Kill(
            TRAINING[i % len(TRAINING)],
            *ways[i % len(ways)],
            file=FILES[i % len(FILES)],
            epoch=draw.randint(1, 2),
        )
        for i in range(NUM_TORN)
    ]
    return at_random + torn


class Project:
    """A finished project of which one stage at a time is yet to run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.finished = folder.with_name("finished")
        self.undisturbed: dict[str, tuple[float, dict[str, str]]] = {}
        make_project(folder, **LINEAR, **EPOCHS)
        run_stages(folder)
        for name in CODE:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            copy(ROOT / name, folder / name)
        git("init", "--quiet")
        subprocess.run(["dvc", "commit", "--force", "--quiet"], check=True)
        commit()
        folder.rename(self.finished)

    def prepare(self, stage: str) -> None:
        """Make the project new, with a stage of which DVC knows no result."""
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self.finished, self.folder)
        os.chdir(self.folder)
        shutil.rmtree(".dvc/cache/runs")
        lock, yaml = Path("dvc.lock"), YAML()
        locked = yaml.load(lock)
        del locked["stages"][stage]
        yaml.dump(locked, lock)

    def expected(self, stage: str) -> tuple[float, dict[str, str]]:
        """Return the seconds and the files of an undisturbed run."""
        if stage not in self.undisturbed:
            self.prepare(stage)
            begin = time.monotonic()
            process, log = repro(stage)
            assert process.wait(timeout=300) == 0, log.read_text()
            self.undisturbed[stage] = (time.monotonic() - begin, results())
        return self.undisturbed[stage]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """The project; the first kill waits for it."""
    folder, before = tmp_path_factory.mktemp("kills"), Path.cwd()
    (folder / "project").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        keep_settings_apart(folder, patch)
        patch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
        patch.chdir(folder / "project")
        yield Project(folder / "project")
        os.chdir(before)


@pytest.mark.parametrize("kill", plan(), ids=lambda kill: " ".join(str(kill).split()))
def test_after_a_kill_dvc_repro_ends_as_if_undisturbed(project, kill):
    seconds, expected = project.expected(kill.stage)
    code, torn = None, []
    # The run was over before the signal, or the checkpoint whole: once more, and earlier.
    while code is None or (kill.file and not torn):
        project.prepare(kill.stage)
        process, _ = repro(kill.stage)
        code = strike(process, kill, time.monotonic() + kill.share * seconds)
        seconds *= 0.9
        wait_for_none()
        found = list(Path("checkpoints").glob("*/checkpoint-*"))
        torn = [path for path in found if is_torn(path)]
    process, log = repro(kill.stage)
    try:
        assert process.wait(timeout=300) == 0, log.read_text()
        wait_for_none()
        assert results() == expected
        assert left_over() == []
        end = "bit-equal"
    except BaseException as error:
        end = f"FAILED: {type(error).__name__}"
        raise
    finally:
        skipped = log.read_text().count(" is skipped: ")
        counts = f"{len(found) - len(torn)} whole {len(torn)} torn {skipped} skipped"
        print(f"\n{kill} exit {code:<4} {counts}  {end}", flush=True)
    assert skipped == len(torn)


def repro(stage: str) -> tuple[subprocess.Popen, Path]:
    """Start `dvc repro` in a process group of its own; return it and its output's file."""
    log = Path("../repro.log").resolve()
    with log.open("w") as file:
        command = ["dvc", "repro", stage]
        return subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True), log


def strike(dvc: subprocess.Popen, kill: Kill, time_is_up: float) -> int | None:
    """Send the signal when it is due; return DVC's exit code, or None if the run was over."""
    stage, written = 0, 0
    while dvc.poll() is None:
        time.sleep(0.001)
        stage = stage or pid_of(kill.stage)
        if kill.file:
            paths = list(Path("checkpoints").glob(f"*/*/{kill.file}")) if stage else []
            is_due = written < len(paths) >= kill.epoch and stops_within(stage, paths)
            written = max(written, len(paths))
        else:
            is_due = time.monotonic() > time_is_up and (stage or kill.target != "stage")
        if is_due:
            send = os.killpg if kill.target == "group" else os.kill
            with contextlib.suppress(ProcessLookupError):
                send(stage if kill.target == "stage" else dvc.pid, kill.number)
                if kill.file and kill.target == "dvc":
                    dvc.wait(timeout=300)  # its end is what signals the stage
                if stage:
                    os.kill(stage, signal.SIGCONT)
                return dvc.wait(timeout=300)
    return None


def pid_of(stage: str) -> int:
    """Return the process of a stage, 0 if it has not begun."""
    pids = [pid for pid, words in running().items() if f"stages.{stage}" in words]
    return pids[-1] if pids else 0


def stops_within(stage: int, paths: list[Path]) -> bool:
    """Stop a process, and let it go on if it does not write one of these files' folders."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(stage, signal.SIGSTOP)
        if any(is_torn(path.parent) for path in paths):
            return True
        os.kill(stage, signal.SIGCONT)
    return False


def running() -> dict[int, list[str]]:
    """Return the processes that work in the project's folder, but this one, with their words."""
    found = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid != os.getpid() and process.cwd() == os.getcwd():
                found[process.pid] = process.cmdline()
    return found


def wait_for_none() -> None:
    """Wait until what was killed has ended, and fail if something lives on."""
    limit = time.monotonic() + 60
    while orphans := running():
        assert time.monotonic() < limit, orphans
        time.sleep(0.1)


def is_torn(checkpoint: Path) -> bool:
    """Return whether a checkpoint does not agree with its manifest."""
    try:
        verify_manifest(checkpoint)
    except (OSError, ValueError):
        return True
    return False


def results() -> dict[str, str]:
    """Return a digest of every file but those of DVC and git; dvc.lock is among them."""
    apart = (".dvc/", ".git/", "checkpoints/")
    return {name: x for name, x in contents(Path()).items() if not name.startswith(apart)}


def left_over() -> list[str]:
    """Return what should not be there after a run that ended well.

    The outputs that it keeps are not among it: the next stage removes them.
    """
    found = [path for path in Path().rglob("*partial*") if not path.is_relative_to(".git")]
    in_checkpoints = [path for path in Path("checkpoints").glob("*") if path.suffix != ".done"]
    return [str(path) for path in found + in_checkpoints]
