"""The guard of a run, mostly around processes of their own that are really killed."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from infini_retrofit.pipeline.guard import (
    ChangedWhileRunningError,
    run_stage,
    stage_code,
    training_run,
)

ROOT = Path(__file__).parent.parent
STAGE = """
import sys, time
from pathlib import Path
from infini_retrofit.pipeline.guard import run_stage, training_run

def main():
    code = [Path("code.py")]
    with training_run("train", [Path("data")], {"epochs": 3}, code, free_bytes=0) as run:
        (run / "epoch").write_text("1")
        Path("starting").write_text(str(run))
        Path("starting").rename("started")  # written whole, because the test waits for it
        Path("exclusive").open("x").close()  # fails if another run is inside
        limit = time.monotonic() + 60
        while not Path("go").exists() and time.monotonic() < limit:
            time.sleep(0.01)
        time.sleep(0.05)
        Path("exclusive").unlink()

run_stage(main)
"""
PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "stage.py"])
print(child.pid, flush=True)
child.wait()
"""


@dataclass(frozen=True)
class Params:
    """A section."""

    lr: float


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with all inputs, code and parameters of a run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.delenv("RANK", raising=False)
    Path("data").mkdir()
    Path("data/train.txt").write_text("text")
    Path("code.py").write_text("x = 1\n")
    Path("stage.py").write_text(STAGE)
    Path("params.yaml").write_text("epochs: 3\ntraining: {lr: 0.1}\nother: 1\n")
    return tmp_path


def start() -> subprocess.Popen[str]:
    """Start the stage and wait until it trains."""
    for left_by_a_killed_run in ("started", "exclusive"):
        Path(left_by_a_killed_run).unlink(missing_ok=True)
    process = subprocess.Popen([sys.executable, "stage.py"], stderr=subprocess.PIPE, text=True)
    wait_for(Path("started").exists)
    return process


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """End the stage; return its exit code and errors."""
    Path("go").touch()
    _, errors = process.communicate(timeout=90)
    Path("go").unlink()
    return process.returncode, errors


def wait_for(condition: Callable[[], bool]) -> None:
    limit = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.01)


def guarded(**changes: object) -> str:
    """Return the name of a run's folder."""
    arguments = {"inputs": [Path("data")], "params": {"epochs": 3}, "code": [Path("code.py")]}
    with training_run("train", **(arguments | changes), free_bytes=0) as run:
        return run.name


@pytest.mark.parametrize("kind", [FileNotFoundError, ChangedWhileRunningError])
def test_a_user_s_mistake_ends_in_one_sentence_and_one_of_the_code_in_its_traceback(kind):
    def main() -> None:
        raise error

    error = kind("two\nlines")
    with pytest.raises(SystemExit) as caught:
        run_stage(main)
    assert caught.value.code == "error: two lines"
    error = AssertionError()
    with pytest.raises(AssertionError):
        run_stage(main)


def test_a_stage_s_code_is_its_module_and_its_rooms():
    code = {str(path.relative_to(ROOT)) for path in stage_code("distill")}
    assert {"stages/distill.py", "infini_retrofit/training/distillation.py"} <= code
    rooms = {name.split("/")[1] for name in code - {"stages/distill.py"}}
    assert rooms == {"layer", "model", "pipeline", "scoring", "training"}


def test_the_folder_goes_when_the_run_ends_well_and_stays_when_it_fails(project, monkeypatch):
    monkeypatch.setenv("DVC_ROOT", str(project / "main"))
    with contextlib.suppress(FloatingPointError), training_run("train", [], {}, [], 0) as run:
        (run / "epoch").write_text("1")
        raise FloatingPointError
    with training_run("train", [], {}, [], 0) as again:
        assert again.parent == project / "main" / "checkpoints"
        assert (again / "epoch").read_text() == "1"
    assert not again.exists()


def test_the_folder_s_name_depends_on_all_that_makes_the_result(project, monkeypatch):
    names = [guarded(), guarded(params={"training": Params(lr=0.1)})]
    Path("params.yaml").write_text("epochs: 4\ntraining: {lr: 0.2}\n")
    names += [guarded(params={"epochs": 4}), guarded(params={"training": Params(lr=0.2)})]
    Path("params.yaml").write_text("epochs: 3\n")
    Path("code.py").write_text("x = 2\n")
    names += [guarded()]
    Path("data/train.txt").write_text("other text")
    names += [guarded()]
    Path("data/manifest.json").write_text('{"train.txt": "0"}')
    names += [guarded()]
    assert len(set(names)) == len(names)
    Path("data/train.txt").write_text("a folder stands by its manifest")
    assert guarded() == names[-1]
    here = guarded(code=[Path("code.py").resolve()])
    elsewhere = project / "elsewhere" / project.name
    shutil.copytree(project, elsewhere, ignore=lambda *_: ["elsewhere", "checkpoints"])
    monkeypatch.chdir(elsewhere)
    assert guarded(code=[Path("code.py").resolve()]) == here
    with pytest.raises(FileNotFoundError, match=r"models/base is missing: run `dvc repro`"):
        guarded(inputs=[Path("models/base")])


def test_parameters_that_changed_are_refused(project):
    params = {"training": Params(lr=0.1)}
    with training_run("train", [], params, [], 0):
        Path("params.yaml").write_text("training: {lr: 0.1}\nother: 2\n")  # another section
    message = r"^train: changed while it was running: params\.yaml: training; run it again$"
    for new in ("lr: 0.2", "learning_rate: 0.1"):
        Path("params.yaml").write_text("training: {lr: 0.1}\n")
        run = training_run("train", [], params, [], 0)
        with pytest.raises(ChangedWhileRunningError, match=message), run:
            Path("params.yaml").write_text(f"training: {{{new}}}\n")
        with pytest.raises(ChangedWhileRunningError, match=message):
            training_run("train", [], params, [], 0).__enter__()


@pytest.mark.parametrize("change", [lambda p: p.write_text("x = 2\n"), Path.unlink])
def test_code_that_changed_is_refused_and_the_checkpoints_stay(project, change):
    code = Path("code.py")
    run = training_run("train", [], {}, [code], 0)
    with pytest.raises(ChangedWhileRunningError, match=r"code\.py; run it again"), run as folder:
        change(code)
    assert folder.is_dir()


def test_a_full_or_read_only_disk_is_refused_at_the_start(project):
    with pytest.raises(OSError, match=r"must have 1048576\.0 GiB free, got \d+\.\d GiB"):
        training_run("train", [], {}, [], free_bytes=1 << 50).__enter__()
    shutil.rmtree("checkpoints")
    Path("checkpoints").write_text("a file where the folder should be")
    with pytest.raises(OSError, match=r"cannot write to checkpoints"):
        training_run("train", [], {}, [], 0).__enter__()


def test_only_the_first_of_several_processes_locks_and_removes(project, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with training_run("train", [], {}, [], 0) as first:
        monkeypatch.setenv("RANK", "1")
        with training_run("train", [], {}, [], 0) as second:
            assert second == first
        assert first.is_dir()
        monkeypatch.setenv("RANK", "0")
        message = f"^the same training is under way in another process, which holds {first}"
        with pytest.raises(BlockingIOError, match=message + r"\.lock: wait for it or end it$"):
            training_run("train", [], {}, [], 0).__enter__()
    assert list(first.parent.iterdir()) == []


def test_equal_runs_wait_and_train_one_after_another_each_in_a_new_folder(project):
    first = start()
    command = [sys.executable, "stage.py"]
    others = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for other in others:
        assert other.stderr.readline().startswith("waiting: the same training is under way in ")
    Path("go").touch()
    for process in (first, *others):
        _, errors = process.communicate(timeout=90)
        assert (process.returncode, errors) == (0, "")
    assert list(Path("checkpoints").iterdir()) == []


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)],
)
def test_a_killed_run_fails_and_can_go_on(project, number, code):
    process = start()
    process.send_signal(number)
    process.communicate(timeout=90)
    assert process.returncode == code
    assert (Path(Path("started").read_text()) / "epoch").exists()
    assert finish(start()) == (0, "")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process of its parent")
@pytest.mark.parametrize("under_dvc", [True, False])
def test_under_dvc_a_run_dies_with_its_parent(project, monkeypatch, under_dvc):
    if under_dvc:
        monkeypatch.setenv("DVC_ROOT", str(project))
    command = [sys.executable, "-c", PARENT]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        child = int(parent.stdout.readline())
        wait_for(Path("started").exists)
        parent.kill()
    if under_dvc:
        wait_for(lambda: not is_running(child))
    else:
        time.sleep(0.5)
        assert is_running(child)
        os.kill(child, signal.SIGKILL)


def is_running(pid: int) -> bool:
    """Return whether a process runs and is no zombie, even if its parent has ended."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"
