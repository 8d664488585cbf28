"""Two experiments compared: `--diff` runs what is missing, then asks DVC."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from recipes import __main__ as command_line
from tests.tiny_checkout import commit, make_checkout, make_pipeline, own_recipes, python_m

RECIPES = {"one": "# sets a\na: 2\n", "one-fixed": "# sets b as well\na: 2\nb: 3\n"}
COMPARISONS = ["dvc metrics diff one one-fixed --md", "dvc params diff one one-fixed --md"]


def diff(kind: str, *revisions: str) -> dict:
    """Return what DVC says of two revisions."""
    command = ["dvc", kind, "diff", *revisions, "--json"]
    return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)


def cells(markdown: str) -> list[str]:
    """Return the cells of a table's only row."""
    return [cell.strip() for cell in markdown.split("\n")[2].strip("|").split("|")]


def test_real_experiments_and_then_branches_are_compared_by_name(tmp_path, monkeypatch):
    make_pipeline(tmp_path, monkeypatch, **RECIPES)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    monkeypatch.setenv("PATH", path)
    assert python_m("recipes", "one", "--temp")[0] == 0
    code, output = python_m("recipes", "one", "one-fixed", "--diff", "--temp")
    assert code == 0, output
    assert output.count("dvc exp run -n") == output.count("dvc exp run -n one-fixed ") == 1
    _, _, after = output.partition(f"\n{COMPARISONS[0]}\n")
    metrics, _, params = after.partition(f"\n{COMPARISONS[1]}\n")
    found = ["metrics/eval_sliding.json", "finetuned.segment_test_ppl", "21", "23", "2"]
    assert cells(metrics) == found
    assert cells(params) == ["params.yaml", "b", "1", "3"]

    for name in RECIPES:
        subprocess.run(["dvc", "exp", "branch", name, f"branch-{name}"], check=True)
        subprocess.run(["dvc", "exp", "remove", name], check=True)
    branches = [f"branch-{name}" for name in RECIPES]
    change = {"finetuned.segment_test_ppl": {"old": 21, "new": 23, "diff": 2}}
    assert diff("metrics", *branches) == {"metrics/eval_sliding.json": change}
    assert diff("params", *branches) == {"params.yaml": {"b": {"old": 1, "new": 3, "diff": 2}}}


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The commands that are run, of which that of a recipe `broken` fails; `one` exists."""
    make_checkout(tmp_path, monkeypatch)
    Path("params.yaml").write_text("a: 1\nb: 1\n")
    commit()
    own_recipes(monkeypatch, **RECIPES, broken="# fails\nb: text\n")
    seen = []

    def run(command: Sequence[str]) -> int:
        seen.append(" ".join(command))
        return 3 if "broken" in command else 0

    monkeypatch.setattr(command_line, "run", run)
    monkeypatch.setattr(command_line, "existing_experiments", lambda: {"one"})
    return seen


FIXED = "dvc exp run -n one-fixed{} -S a=2 -S b=3"


@pytest.mark.parametrize(
    ("line", "want"),
    [
        ("one one-fixed --diff", [FIXED.format(""), *COMPARISONS]),
        ("one --diff one-fixed --temp", [FIXED.format(" --temp"), *COMPARISONS]),
        (
            "one one-fixed --diff --force",
            ["dvc exp run -n one --force -S a=2", FIXED.format(" --force"), *COMPARISONS],
        ),
    ],
)
def test_only_what_is_missing_is_run_unless_forced(commands, line, want, capsys):
    command_line.main(line.split())
    assert commands == want == capsys.readouterr().out.splitlines()


def test_where_one_fails_nothing_is_compared(commands, capsys):
    with pytest.raises(SystemExit) as error:
        command_line.main(["broken", "one-fixed", "--diff"])
    assert error.value.code == 3
    assert commands == ["dvc exp run -n broken -S b=text"]
    assert "error: broken failed; left to run: one-fixed" in capsys.readouterr().err


def test_what_exists_may_have_any_name_and_nothing_is_run_then(commands, monkeypatch):
    monkeypatch.setattr(command_line, "existing_experiments", lambda: {"mine", "one"})
    command_line.main(["mine", "one", "--diff"])
    assert commands == [f"dvc {kind} diff mine one --md" for kind in ("metrics", "params")]


def test_printed_commands_are_not_run(commands, capsys):
    command_line.main(["one", "one-fixed", "--diff", "--print"])
    assert capsys.readouterr().out.splitlines() == [FIXED.format(""), *COMPARISONS]
    assert commands == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--diff", "--diff must come with two names, got none"),
        ("one --diff", "--diff must come with two names, got one"),
        ("one one --diff", "--diff must come with two names, got one, one"),
        ("one one-fixed broken --diff", "--diff must come with two names, got one, one-fixed, "),
        ("one one-fixed --diff -S a=3", "--diff must come without -S and --name, "),
        ("one one-fixed --diff --name x", "--diff must come without -S and --name, "),
        ("one two --diff --print", "a recipe must be one of broken, one, one-fixed, got 'two'"),
    ],
)
def test_what_cannot_be_compared_is_refused(commands, line, message):
    with pytest.raises(SystemExit) as error:
        command_line.main(line.split())
    assert str(error.value.code).startswith(f"error: {message}")
    assert commands == []
