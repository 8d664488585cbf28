"""Edits during every stage, and full disks: nothing wrong is recorded and nothing is lost."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.test_dvc import CODE
from tests.tiny_checkout import keep_settings_apart
from tests.tiny_project import ROOT, STAGES, contents

pytestmark = pytest.mark.faults
# In every Python of a stage: run $ACT once, when a file gets the name that $WHEN has.
HOOK = """
import os, re, sys

acted = False

def act(event, arguments):
    global acted
    if event == "os.rename" and not acted and re.search(os.environ["WHEN"], str(arguments[1])):
        acted = True
        exec(os.environ["ACT"])

if "DVC_STAGE" in os.environ and "ACT" in os.environ:
    sys.addaudithook(act)
"""
EDIT_CODE = """
with open(f"stages/{os.environ['DVC_STAGE']}.py", "a") as file:
    file.write("# edited")
"""
EDIT_PARAMS = """
from pathlib import Path
from ruamel.yaml import YAML
yaml, section = YAML(), os.environ["SECTION"].split(".")
table = params = yaml.load(Path("params.yaml"))
for key in section[:-1]:
    table = table[key]
table[section[-1]] *= 2
yaml.dump(params, Path("params.yaml"))
"""
FILL = """
free = os.statvfs(".").f_bavail * os.statvfs(".").f_frsize - int(os.environ["LEFT"])
if free > 0:
    with open("fill", "wb") as file:
        file.write(bytes(free))
"""
NUMBERS = {
    "check_params": "distill.lr",
    "prepare_base": "corpora.my-texts.val_share",
    "prepare_wikitext": "corpora.my-texts.val_share",
    "prepare_longdocs": "longdocs.tokens_per_document",
    "prepare_comparison": "finetune.lr",
    "baseline_eval": "eval.window",
    "distill": "infini.segment_length",
    "finetune": "finetune.lr",
    "control_eval": "eval.window",
    "eval_sliding": "distill.epochs",
    "eval_longcontext": "longcontext.samples",
    "report": "finetune.lr",
}
OUTPUT = r"^(data|models|metrics|plots|report)/|/(data|models|metrics|plots|report)/"


def make_repository(project: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a finished project, with the code that made it, a repository of git and DVC."""
    shutil.copytree(project, folder, dirs_exist_ok=True)
    for name in CODE:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        copy(ROOT / name, folder / name)
    guard = folder / "infini_retrofit/pipeline/guard.py"
    guard.write_text(guard.read_text().replace("FREE_BYTES = 4 << 30", "FREE_BYTES = 0"))
    hook = folder.parent / "hook"
    hook.mkdir(exist_ok=True)
    (hook / "sitecustomize.py").write_text(HOOK)
    keep_settings_apart(folder.parent, monkeypatch)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    monkeypatch.setenv("PYTHONPATH", str(hook))
    monkeypatch.delenv("DVC_ROOT", raising=False)
    for command in ("git init -q", "dvc commit -q -f", "git add -A", "git commit -q -m finished"):
        subprocess.run(command.split(), check=True, capture_output=True)


@pytest.fixture(scope="module")
def patch() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as context:
        yield context


@pytest.fixture(scope="module")
def repository(finished, tmp_path_factory, patch) -> Path:
    """A finished project, of one test after another: each puts it back."""
    folder = tmp_path_factory.mktemp("edits") / "project"
    make_repository(finished["linear"], folder, patch)
    return folder


@pytest.fixture
def small_disk(finished, tmp_path, monkeypatch) -> Iterator[Path]:
    """A finished project on a disk of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root mounts a small disk")
    try:
        make_repository(finished["linear"], disk / "project", monkeypatch)
        yield disk / "project"
    finally:
        os.chdir(tmp_path)
        subprocess.run(["umount", "-l", str(disk)], check=True)


def repro(stage: str, *options: str, limit: float = 500, **env: str) -> tuple[bool, str]:
    """Run a stage alone; return whether it went well, and what it said."""
    command = ["timeout", "-k", "5", str(limit), "dvc", "repro", "--single-item", *options, stage]
    process = subprocess.run(command, env=os.environ | env, capture_output=True, text=True)
    return process.returncode == 0, process.stdout + process.stderr


def results() -> dict[str, str]:
    """Return a digest of every file that the stages left."""
    folders = ("data", "models", "metrics", "plots", "checkpoints")
    return {f"{f}/{name}": sha for f in folders for name, sha in contents(Path(f)).items()}


def errors(said: str) -> list[str]:
    """Return the sentence of a failed stage, of which there must be one and no traceback."""
    assert "Traceback" not in said, said
    return re.findall("^error: .*", said, re.M)


CASES = [(stage, "params", EDIT_PARAMS) for stage in NUMBERS]
CASES += [(stage, "code", EDIT_CODE) for stage in STAGES]


@pytest.mark.parametrize(("stage", "what", "act"), CASES)
def test_an_edit_during_a_stage_is_refused_and_it_must_run_again(stage, what, act, repository):
    went_well, said = repro(
        stage, "--force", ACT=act, WHEN=OUTPUT, SECTION=NUMBERS.get(stage, "")
    )
    name = f"stages/{stage}.py" if what == "code" else f"params.yaml: {NUMBERS[stage]}"
    assert not went_well
    assert errors(said) == [f"error: {stage}: changed while it was running: {name}; run it again"]
    status = subprocess.run(["dvc", "status", "--json", stage], capture_output=True, text=True)
    assert stage in json.loads(status.stdout)
    shutil.rmtree("checkpoints", ignore_errors=True)
    for command in ("git checkout -q -- .", "dvc checkout -q --force"):
        subprocess.run(command.split(), check=True, capture_output=True)


WRITERS = ("prepare_wikitext", "prepare_longdocs", "distill", "finetune", "finetune_control")


@pytest.mark.parametrize("stage", ["prepare_base", *WRITERS])
@pytest.mark.parametrize("left", [0, 8_000, 50_000, 200_000])
def test_a_full_disk_is_one_sentence_and_the_stage_goes_on(stage, left, small_disk):
    repro(stage, "--force")  # the fixture's run has another initial memory share
    before = results()
    first = r"models/\.partial|base" if stage == "prepare_base" else OUTPUT
    # DVC itself ends with an error, or tries to write its database until there is room.
    went_well, said = repro(stage, "--force", limit=90, ACT=FILL, WHEN=first, LEFT=str(left))
    found = errors(said)
    last = said.strip().splitlines()[-1]
    print(f"\n{stage} {left:,}: {'went well' if went_well else found or last}", flush=True)
    if not went_well and found:
        (sentence,) = found
        reasons = "No space left on device|a file could not be written"  # of torch, which hides it
        expected = rf"error: ({reasons}): .+, [\d,]+ bytes free; free space .*"
        assert re.fullmatch(expected, sentence), sentence
    Path("fill").unlink()
    went_well, said = repro(stage, "--force")  # or DVC would copy its earlier result
    assert went_well, said
    shutil.rmtree("checkpoints", ignore_errors=True)  # what DVC recorded, until the next stage
    assert results() == {k: v for k, v in before.items() if not k.startswith("checkpoints/")}


@pytest.mark.parametrize("stage", ["distill", "finetune"])
def test_a_training_that_dvc_had_no_room_to_record_is_not_run_again(
    stage, small_disk, monkeypatch
):
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(small_disk.parent / "site"))
    monkeypatch.setenv("SECTION", f"{stage}.lr")
    exec(EDIT_PARAMS, {"os": os})
    went_well, said = repro(stage, limit=200, ACT=FILL, WHEN=rf"{stage}\.manifest\.json$", LEFT="0")
    assert not went_well
    assert not errors(said)
    trained = results()
    Path("fill").unlink()
    went_well, said = repro(stage)
    assert went_well, said
    assert f"{stage}: brought back the result of the same run" in said
    assert not re.search("^epoch", said, re.M)
    assert results() == trained
    assert list(Path("checkpoints").glob("*.done"))
    repro("prepare_comparison", "--force")
    assert not list(Path("checkpoints").iterdir())
