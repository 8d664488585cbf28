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
SEED, NUM_RANDOM, NUM_TORN, TRIES = 0, 20, 10, 5


@dataclass(frozen=True)
class Kill:
    """One signal to one of the processes of `dvc repro STAGE`."""

    stage: str
    number: signal.Signals
    target: str
    share: float | None = None  # of an undisturbed run's time; None: within a checkpoint
    file: str = ""  # of the checkpoint; the signal follows its appearance
    epoch: int = 0  # of the checkpoint, from 1

    def __str__(self) -> str:
        """Return the beginning of its line in the table."""
        when = f"epoch {self.epoch} {self.file}" if self.share is None else f"{self.share:.0%}"
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
        make_project(folder, **LINEAR, **{"finetune.epochs": 3})
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
    for _ in range(TRIES):
        project.prepare(kill.stage)
        process, _ = repro(kill.stage)
        code = strike(process, kill, seconds)
        wait_for_none()
        torn = [path.name for path in Path("checkpoints").glob("*/checkpoint-*") if is_torn(path)]
        whole = [path.name for path in Path("checkpoints").glob("*/checkpoint-*")]
        if kill.share is not None or torn:
            break
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
        found = f"{len(whole) - len(torn)} whole {len(torn)} torn" if whole else "-"
        skipped = log.read_text().count(" is skipped: ")
        print(f"\n{kill} exit {code:<4} {found:<14} {skipped} skipped  {end}", flush=True)
    # DVC passes SIGTERM on to its stage, which may finish the file by then.
    assert kill.share is not None or kill.target == "dvc" or torn, "no checkpoint was torn"
    assert skipped == len(torn)


def repro(stage: str) -> tuple[subprocess.Popen, Path]:
    """Start `dvc repro` in a session of its own; return it and its output's file."""
    log = Path("../repro.log").resolve()
    with log.open("w") as file:
        command = ["dvc", "repro", stage]
        return subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True), log


def strike(dvc: subprocess.Popen, kill: Kill, seconds: float) -> int:
    """Send the signal when it is time, unless the run is over, and return DVC's exit code."""
    time_is_up = time.monotonic() + (kill.share or 0) * seconds
    seen: set[str] = set()
    while dvc.poll() is None:
        time.sleep(0.001)
        if kill.share is None:
            seen |= {str(path) for path in Path("checkpoints").glob(f"*/*/{kill.file}")}
            is_due = len(seen) >= kill.epoch
        else:
            is_due = time.monotonic() > time_is_up
        if is_due and hit(dvc, kill):
            break
    return dvc.wait(timeout=300)


def hit(dvc: subprocess.Popen, kill: Kill) -> bool:
    """Send the signal; return False if the stage does not run yet."""
    if kill.target == "group":
        os.killpg(dvc.pid, kill.number)
    elif kill.target == "dvc":
        dvc.send_signal(kill.number)
    else:
        stages = [pid for pid, words in running().items() if f"stages.{kill.stage}" in words]
        if not stages:
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(stages[-1], kill.number)
    return True


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
