"""A folder's lock, held by processes of their own, of which each removes the folder at its end."""

import subprocess
import sys
from pathlib import Path

import pytest

from infini_retrofit.pipeline.folder_lock import locked

ROOT = Path(__file__).parent.parent
# Fails if another is in the folder, and leaves nothing of it.
HOLDER = """
import shutil, sys, time
from pathlib import Path
from infini_retrofit.pipeline.folder_lock import locked
folder = Path("folder")
with locked(folder, "the same work", waits=True):
    (folder / "inside").open("x").close()
    print("inside", flush=True)
    sys.stdin.readline()
    time.sleep(0.05)
    shutil.rmtree(folder)
"""
WHAT, NUM_HOLDERS = "the same work", 3


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is not there yet, below the working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return tmp_path / "folder"


def hold() -> subprocess.Popen[str]:
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen([sys.executable, "-c", HOLDER], text=True, **pipes)


def test_those_who_wait_go_in_one_at_a_time_each_into_a_folder_of_its_own(folder):
    first = hold()
    assert first.stdout.readline() == "inside\n"
    others = [hold() for _ in range(NUM_HOLDERS - 1)]
    for other in others:
        assert other.stderr.readline().startswith("waiting: the same work is under way in ")
    for process in (first, *others):
        process.stdin.write("\n")
        process.stdin.flush()
    for process in (first, *others):
        _, errors = process.communicate(timeout=60)
        assert (process.returncode, errors) == (0, "")
    assert not folder.exists()


def test_who_does_not_wait_is_refused_by_the_lock_s_name(folder):
    with locked(folder, WHAT, waits=False):
        message = rf"{WHAT} is under way in another process, which holds {folder}/lock: wait for it"
        with pytest.raises(BlockingIOError, match=message), locked(folder, WHAT, waits=False):
            pass
    with locked(folder, WHAT, waits=False):
        assert folder.is_dir()


def test_a_killed_holder_leaves_the_lock_to_the_next(folder):
    first = hold()
    assert first.stdout.readline() == "inside\n"
    first.kill()
    first.communicate(timeout=60)
    with locked(folder, WHAT, waits=False):
        assert (folder / "inside").exists()
