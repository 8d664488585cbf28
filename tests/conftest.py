"""No test reaches the network or depends on the test before it."""

import os
import signal

# Before anything imports huggingface_hub and torch, which read them once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
# On tiny tensors handing work to threads takes longer than the work.
os.environ["OMP_NUM_THREADS"] = "1"

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from infini_retrofit.layer import attention
from tests.tiny_project import PROJECTS, make_project, run_stages

torch.set_num_threads(1)
# A shell lets what it starts in the background ignore Ctrl-C, and so would all that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def initial_memory_share() -> Iterator[float]:
    """Start gates where an untrained memory shows in the output; yield the library's own start."""
    own = attention.INITIAL_MEMORY_SHARE
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "INITIAL_MEMORY_SHARE", 0.3)
        yield own


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny projects in which every stage has run; no test writes into them."""
    folders = {name: tmp_path_factory.mktemp(name) for name in PROJECTS}
    for name, folder in folders.items():
        make_project(folder, **PROJECTS[name])
        run_stages(folder)
    return folders


@pytest.fixture
def project(finished: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the project of the linear layer, as the working folder."""
    folder = tmp_path / "project"
    shutil.copytree(finished["linear"], folder)
    monkeypatch.chdir(folder)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    return folder
