"""Machines and checkouts as people have them: other Pythons, moved folders, notebooks, clones."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from infini_retrofit.bases.sources import LocalBase
from infini_retrofit.pipeline.guard import run_stage
from infini_retrofit.texts.articles import read_corpus
from infini_retrofit.texts.corpora import FilesCorpus
from recipes import __main__ as recipes
from tests.tiny_checkout import commit, git, make_checkout, own_recipes, write
from tests.tiny_project import ROOT

# Makes an environment as Python does: scripts begin with their interpreter's absolute path.
NEWER_PYTHON = """#!/bin/bash
[ -z "$PYTHONHOME" ] || exit 1
[ "$1" = --version ] && echo Python 3.29.0
[ "$1" = -m ] || exit 0
[ -z "$PYTHONSAFEPATH$PIP_USER" ] || exit 1
[ "$3" = --clear ] && rm -r .venv
mkdir -p .venv/bin
ln -s "$(command -v python3.29)" .venv/bin/python
ln -s "$(command -v bash)" .venv/bin/interpreter
echo "#!$PWD/.venv/bin/interpreter" > .venv/bin/pip
chmod +x .venv/bin/pip
"""


def write_program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def make_environment(folder: Path) -> str:
    """Run make in a folder, with the programs beside it, and return what it says."""
    settings = dict.fromkeys(("PYTHONHOME", "PYTHONSAFEPATH", "PIP_USER"), "1")
    settings["PATH"] = str(folder.parent / "bin")
    command = [shutil.which("make"), ".venv/.created"]
    done = subprocess.run(command, cwd=folder, env=settings, capture_output=True, text=True)
    return done.stdout + done.stderr


def test_make_finds_any_python_and_remakes_an_environment_that_was_moved(tmp_path):
    folder, moved, programs = (tmp_path / name for name in ("a", "b", "bin"))
    folder.mkdir()
    programs.mkdir()
    for name in ("Makefile", "requirements.txt"):
        shutil.copyfile(ROOT / name, folder / name)
    for name in ("bash", "ln", "mkdir", "chmod", "rm", "touch", "grep"):
        (programs / name).symlink_to(shutil.which(name))
    for name in ("python3", "python3.12"):
        write_program(programs / name, "#!/bin/bash\nexit 1\n")
    assert "error: Python 3.11 or later with ensurepip is needed" in make_environment(folder)
    write_program(programs / "python3.29", NEWER_PYTHON)
    assert make_environment(folder) == "Making .venv with Python 3.29.0\n"
    assert "up to date" in make_environment(folder)
    folder.rename(moved)
    said = make_environment(moved)
    assert said == "Making .venv with Python 3.29.0; the old one does not work here\n"
    assert "up to date" in make_environment(moved)


def test_pictures_need_no_backend_of_a_notebook():
    settings = os.environ | {"MPLBACKEND": "of a notebook"}
    command = [sys.executable, "-c", "import analysis.report.figures, matplotlib.figure"]
    assert subprocess.run(command, cwd=ROOT, env=settings, check=False).returncode == 0


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    make_checkout(tmp_path, monkeypatch)
    own_recipes(monkeypatch, one="# nothing\n{}\n")
    return tmp_path / "checkout"


def test_a_checkout_has_the_committed_line_ends(checkout):
    shutil.copyfile(ROOT / ".gitattributes", ".gitattributes")
    commit()
    Path("params.yaml").unlink()
    git("-c", "core.autocrlf=true", "checkout", "params.yaml")
    assert Path("params.yaml").read_bytes() == (ROOT / "params.yaml").read_bytes()


def refusal(*words: str) -> str:
    with pytest.raises(SystemExit) as error:
        recipes.main(words)
    return str(error.value.code)


def test_copies_of_a_shallow_clone_are_refused_and_an_experiment_must_be_stored(
    checkout, monkeypatch
):
    monkeypatch.setattr(recipes, "run", lambda command: 0)
    lost = "error: DVC ended well, but has stored no experiment one: "
    commit()
    commit()
    assert refusal("one", "--temp").startswith(lost)
    git("clone", "--quiet", "--depth", "1", f"file://{checkout}", "../shallow")
    monkeypatch.setenv("DVC_ROOT", str(checkout))
    run_stage(lambda: None)
    monkeypatch.setenv("DVC_ROOT", str(checkout / "../shallow"))
    with pytest.raises(SystemExit, match="run `git fetch --unshallow` first"):
        run_stage(lambda: None)
    monkeypatch.chdir("../shallow")
    run_stage(lambda: None)
    assert "run `git fetch --unshallow` first" in refusal("one", "--temp")
    assert refusal("one").startswith(lost)


def test_a_checkout_of_another_user_is_named_as_the_cause(checkout, monkeypatch):
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    said = refusal("one")
    assert said.startswith("error: experiments start from the last commit: detected dubious owner")
    assert "git config --global --add safe.directory" in said


CONFIG = '{"model_type": "llama", "num_hidden_layers": 3}'


def test_a_relative_path_is_found_from_a_copy_of_the_project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(**{"main/mine/a.txt": "A text.", "main/mine/config.json": CONFIG})
    write(**{"copy/mine/committed.txt": "Another."})
    monkeypatch.chdir("copy")
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "main"))
    articles = read_corpus(FilesCorpus(path="mine", val_share=0.1, test_share=0.1))
    assert [article.title for article in articles] == ["a.txt"]
    assert LocalBase(path="mine").known_depth() == 3
