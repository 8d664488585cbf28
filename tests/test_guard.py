"""The guard of a run, mostly around processes of their own that are really killed."""

import contextlib
import errno
import functools
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import SafetensorError

from infini_retrofit.pipeline import guard
from infini_retrofit.pipeline.files import whole_file
from infini_retrofit.pipeline.guard import (
    ChangedWhileRunningError,
    Dependencies,
    run_stage,
    training_run,
)

ROOT = Path(__file__).parent.parent
STAGE = """
import sys, time
from pathlib import Path
from infini_retrofit.pipeline import guard

guard._ROOT, guard.FREE_BYTES = Path.cwd(), 0

def main():
    with guard.training_run("train") as run:
        (run / "epoch").write_text("1")
        Path("starting").write_text(str(run))
        Path("starting").rename("started")  # written whole, because the test waits for it
        Path("exclusive").open("x").close()  # fails if another run is inside
        limit = time.monotonic() + 60
        while not Path("go").exists() and time.monotonic() < limit:
            time.sleep(0.01)
        time.sleep(0.05)
        Path("exclusive").unlink()

guard.run_stage(main)
"""
PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "stage.py"])
print(child.pid, flush=True)
child.wait()
"""


PIPELINE = """
stages:
  train:
    deps: [stages/train.py, infini_retrofit/room, data]
    params: [epochs, source, "sources.${source}"]
    outs: [model, metrics.json: {cache: false}]
  whole:
    deps: [stages/train.py]
    params: [params.yaml: null]
"""
PARAMS = "epochs: 3\nsource: a\nsources: {a: {seed: 1}, b: 2}\nother: 1\n"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with all inputs, code and parameters of a run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.delenv("DVC_STAGE", raising=False)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(guard, "_ROOT", tmp_path)
    monkeypatch.setattr(guard, "FREE_BYTES", 0)
    for folder in ("data", "stages", "infini_retrofit/room"):
        Path(folder).mkdir(parents=True)
    Path("data/train.txt").write_text("text")
    Path("stages/train.py").write_text("x = 1\n")
    Path("infini_retrofit/room/code.py").write_text("y = 1\n")
    Path("stage.py").write_text(STAGE)
    Path("dvc.yaml").write_text(PIPELINE)
    Path("params.yaml").write_text(PARAMS)
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


def run_as_stage(main: Callable[[], str | None], monkeypatch: pytest.MonkeyPatch) -> str | None:
    """Run a function as if it were the `main` of stages/train.py; return its error."""
    monkeypatch.setattr(guard, "_stage_of", lambda _: "train")
    try:
        run_stage(main)
    except SystemExit as error:
        return error.code
    return None


def test_the_folder_goes_when_the_run_ends_well_and_stays_when_it_fails(project, monkeypatch):
    monkeypatch.setenv("DVC_ROOT", str(project / "main"))
    with contextlib.suppress(FloatingPointError), training_run("train") as run:
        (run / "epoch").write_text("1")
        raise FloatingPointError
    with training_run("train") as again:
        assert again.parent == project / "main" / "checkpoints"
        assert (again / "epoch").read_text() == "1"
    assert not again.exists()


EDITS = {
    "params.yaml: epochs": lambda: edit("params.yaml", "epochs: 3", "epochs: 4"),
    "params.yaml: sources.a.seed": lambda: edit("params.yaml", "seed: 1", "seed: 2"),
    "params.yaml: source, params.yaml: sources.a.seed, params.yaml: sources.b": lambda: edit(
        "params.yaml", "source: a", "source: b"
    ),
    "params.yaml must be plain YAML in UTF-8: .*": lambda: Path("params.yaml").write_text("a: [\n"),
    "stages/train.py": lambda: edit("stages/train.py", "x", "z"),
    "infini_retrofit/room/code.py": Path("infini_retrofit/room/code.py").unlink,
    "infini_retrofit/room/new.py": Path("infini_retrofit/room/new.py").touch,
    "data": lambda: edit("data/train.txt", "text", "other"),
}


def edit(path: str, old: str, new: str) -> None:
    """Replace a text in a file."""
    text = Path(path).read_text()
    assert old in text
    Path(path).write_text(text.replace(old, new))


@pytest.mark.parametrize("name", EDITS)
def test_a_stage_whose_code_parameters_or_files_changed_is_refused(name, project, monkeypatch):
    before = Dependencies("train").fingerprint()
    expected = f"error: train: changed while it was running: {name}; run it again"
    assert re.fullmatch(expected, run_as_stage(EDITS[name], monkeypatch))
    if "UTF-8" not in name:
        assert Dependencies("train").fingerprint() != before
        Path("params.yaml").write_text(PARAMS)
        main = functools.partial(edit, "params.yaml", "other: 1", "other: 2")  # no dependency
        assert run_as_stage(main, monkeypatch) is None


def test_code_that_changed_while_it_was_imported_is_noticed(project, monkeypatch):
    monkeypatch.setattr(guard, "_IMPORTED", {})
    guard.note_code()
    edit("stages/train.py", "x", "z")
    expected = "error: train: changed while it was running: stages/train.py; run it again"
    assert run_as_stage(lambda: None, monkeypatch) == expected


def test_what_changed_before_a_training_begins_is_refused_before_it_trains(project, monkeypatch):
    def main() -> None:
        edit("params.yaml", "epochs: 3", "epochs: 4")
        with training_run("train"):
            pytest.fail("its checkpoints would be of other parameters than their folder's name")

    assert "while it was running: params.yaml: epochs; run" in run_as_stage(main, monkeypatch)


def test_the_checkpoints_of_a_training_that_is_refused_stay(project):
    run = training_run("train")
    with pytest.raises(ChangedWhileRunningError, match=r"train\.py; run it again"), run as folder:
        edit("stages/train.py", "x", "z")
    assert folder.is_dir()


def test_a_stage_that_reads_all_parameters_names_the_one_that_changed(project):
    dependencies = Dependencies("whole")
    edit("params.yaml", "other: 1", "other: 2")
    with pytest.raises(ChangedWhileRunningError, match=r"running: params\.yaml: other; run"):
        dependencies.check()


def test_the_fingerprint_is_of_contents_and_of_processes(project, monkeypatch):
    here = Dependencies("train").fingerprint()
    shutil.copytree(project, project / "elsewhere", ignore=lambda *_: ["elsewhere"])
    monkeypatch.chdir(project / "elsewhere")
    monkeypatch.setattr(guard, "_ROOT", Path.cwd())
    assert Dependencies("train").fingerprint() == here
    Path("data/manifest.json").write_text('{"train.txt": "0"}')
    with_manifest = Dependencies("train").fingerprint()
    assert with_manifest != here
    Path("data/train.txt").write_text("a folder stands by its manifest")
    assert Dependencies("train").fingerprint() == with_manifest
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert Dependencies("train").fingerprint() != with_manifest


def train() -> str:
    """Write the outputs of the stage."""
    with training_run("train"):
        Path("trained").open("x").close()  # fails if it exists
        Path("model").mkdir()
        Path("model/weights").write_text("w")
        Path("metrics.json").write_text("{}")
    return "trained"


@pytest.mark.parametrize("is_recorded", [False, True])
def test_a_training_that_dvc_did_not_record_is_not_run_again(project, monkeypatch, is_recorded):
    monkeypatch.setenv("DVC_ROOT", str(project))
    monkeypatch.setenv("DVC_STAGE", "train")
    monkeypatch.setattr(guard, "_die_with_parent", lambda: None)
    assert run_as_stage(train, monkeypatch) is None
    (kept,) = Path("checkpoints").iterdir()
    kept.with_suffix("").mkdir()  # as if it had been killed after it kept its outputs
    kept.with_suffix(".lock").touch()
    shutil.rmtree("model")  # as DVC does before it starts a stage
    Path("metrics.json").unlink()
    md5 = hashlib.md5(b"{}").hexdigest() if is_recorded else "of another run"
    lock = f"stages: {{train: {{outs: [{{path: metrics.json, md5: {md5}}}]}}}}\n"
    Path("dvc.lock").write_text(lock)
    error = run_as_stage(train, monkeypatch)
    if is_recorded:  # it is forced
        assert "File exists: 'trained'" in error
    else:
        assert error is None
        assert Path("model/weights").read_text() == "w"
        assert Path("metrics.json").read_text() == "{}"
        Path("dvc.lock").write_text(lock.replace("of another run", hashlib.md5(b"{}").hexdigest()))
    monkeypatch.setattr(guard, "_stage_of", lambda _: "whole")  # the next one
    run_stage(lambda: None)
    left = {path.suffix for path in Path("checkpoints").iterdir()}
    assert left == ({"", ".lock"} if is_recorded else set())  # of the run that failed


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "models/x/weights"),
        OSError(errno.EFBIG, "File too large"),
        SafetensorError("Error while serializing: I/O error: Disk quota exceeded (os error 122)"),
        RuntimeError("[enforce fail at inline_container.cc] PytorchStreamWriter failed writing"),
        RuntimeError("basic_ios::clear: iostream error"),
    ],
)
def test_a_full_disk_is_one_sentence_however_a_library_wraps_it(error, project, monkeypatch):
    def main() -> None:
        raise RuntimeError("cannot save") from error

    said = run_as_stage(main, monkeypatch)
    path = getattr(error, "filename", None) or "a file below /"
    expected = rf"error: .*: {path}.*, [\d,]+ bytes free; free space on that disk or .*"
    assert re.fullmatch(expected, said)


def test_a_full_disk_names_the_file_that_was_to_be_written_and_nothing_is_left_of_it(project):
    def write() -> None:
        with whole_file(Path("table")) as partial:
            partial.touch()
            raise OSError(errno.ENOSPC, "No space left")

    with pytest.raises(OSError, match=r"^\[Errno 28\] No space left: 'table'$"):
        write()
    assert not list(Path(".").glob("table*"))


def test_a_finished_stage_does_not_fail_for_its_seconds(project, monkeypatch):
    monkeypatch.setenv("DVC_STAGE", "train")
    Path(".dvc").write_text("a file where the folder should be")
    assert run_as_stage(lambda: None, monkeypatch) is None


def test_a_full_or_read_only_disk_is_refused_at_the_start(project, monkeypatch):
    monkeypatch.setattr(guard, "FREE_BYTES", 1 << 50)
    with pytest.raises(OSError, match=r"must have 1048576\.0 GiB free, got \d+\.\d GiB"):
        training_run("train").__enter__()
    monkeypatch.setattr(guard, "FREE_BYTES", 0)
    shutil.rmtree("checkpoints")
    Path("checkpoints").write_text("a file where the folder should be")
    with pytest.raises(OSError, match=r"cannot write to checkpoints"):
        training_run("train").__enter__()


def test_only_the_first_of_several_processes_locks_and_removes(project, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with training_run("train") as first:
        monkeypatch.setenv("RANK", "1")
        with training_run("train") as second:
            assert second == first
        assert first.is_dir()
        monkeypatch.setenv("RANK", "0")
        message = f"^the same training is under way in another process, which holds {first}"
        with pytest.raises(BlockingIOError, match=message + r"\.lock: wait for it or end it$"):
            training_run("train").__enter__()
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
