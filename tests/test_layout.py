"""dvc.yaml, the imports and params.yaml must agree."""

import ast
import re
import tomllib
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import yaml

from tests.tiny_checkout import python
from tests.tiny_project import ROOT

STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
READ_ALL_PARAMS = {"check_params", "report"}
CODE = ("infini_retrofit", "stages", "analysis", "recipes")
# The rooms from which each room may import.
ROOMS = {
    "layer": set(),
    "pipeline": set(),
    "texts": {"pipeline"},
    "model": {"layer", "pipeline"},
    "scoring": {"model", "layer", "pipeline"},
    "bases": {"model", "texts", "pipeline"},
    "generation": {"model", "layer", "pipeline"},
    "training": {"scoring", "model", "layer", "pipeline"},
    "evaluation": {"scoring", "model", "layer", "pipeline"},
    "longcontext": {"generation", "texts", "scoring", "model", "layer", "pipeline"},
    "share": {"generation", "scoring", "model", "layer", "pipeline"},
}


def calls(stage: str, function: str) -> list[list[str]]:
    tree = ast.parse((ROOT / "stages" / f"{stage}.py").read_text())
    return [
        [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == function
    ]


def loaded_params(stage: str) -> set[str]:
    """Return the parameters that a stage loads, by their names in dvc.yaml."""
    sections = {name for (name,) in calls(stage, "load_section") + calls(stage, "load_presets")}
    choices = calls(stage, "load_choice")
    presets = {f"{table}.${{{chooser}}}" for chooser, table in choices}
    return sections | presets | {chooser for chooser, _ in choices}


def imported(file: Path) -> set[str]:
    """Return the dotted names that a file imports of this project's code, late ones too."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.split(".")[0] in CODE}


def rooms_reached(file: Path) -> set[str]:
    seen, waiting, rooms = set(), {file}, set()
    while waiting:
        seen.add(current := waiting.pop())
        names = [name.split(".") for name in imported(current)]
        rooms |= {"/".join(name[:2]) for name in names}
        files = {ROOT.joinpath(*name[:3]).with_suffix(".py") for name in names}
        waiting |= {path for path in files if path.is_file()} - seen
    return rooms


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_one_way(room):
    files = sorted((ROOT / "infini_retrofit" / room).glob("*.py"))
    assert files
    for file in files:
        assert {name.split(".")[1] for name in imported(file)} - {room} <= ROOMS[room], file.name


def test_rooms_have_no_circle_and_are_all_there():
    assert {p.parent.name for p in (ROOT / "infini_retrofit").glob("*/__init__.py")} == {*ROOMS}
    TopologicalSorter(ROOMS).prepare()  # refuses a circle


@pytest.mark.parametrize("stage", STAGES)
def test_dvc_lists_the_stage_s_file_and_every_room_that_it_imports(stage):
    rooms = rooms_reached(ROOT / "stages" / f"{stage}.py")
    listed = [d for d in STAGES[stage]["deps"] if d.split("/")[0] in CODE]
    assert sorted(listed) == sorted([f"stages/{stage}.py", *rooms])


@pytest.mark.parametrize("stage", sorted(set(STAGES) - READ_ALL_PARAMS))
def test_dvc_lists_every_section_the_stage_loads(stage):
    listed = STAGES[stage].get("params", [])
    assert len(listed) == len(set(listed))
    covered = {name for name in loaded_params(stage) if name.split(".")[0] in listed}
    assert set(listed) == {n.split(".")[0] for n in covered} | (loaded_params(stage) - covered)


def test_check_params_reads_the_whole_file_and_comes_before_every_stage():
    for stage in READ_ALL_PARAMS:
        assert loaded_params(stage) >= {""}
        assert STAGES[stage]["params"] == [{"params.yaml": None}]
    for stage in set(STAGES) - {"check_params"}:
        assert "data/params_ok" in STAGES[stage]["deps"], stage


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_is_a_module_that_runs_by_its_name(stage):
    assert re.search(rf" -m stages\.{stage}$", STAGES[stage]["cmd"])
    text = (ROOT / "stages" / f"{stage}.py").read_text()
    assert text.endswith('if __name__ == "__main__":\n    run_stage(main)\n')
    assert "\nReads: " in text
    assert "\nWrites: " in text


@pytest.mark.parametrize("stage", STAGES)
def test_metrics_and_plots_stand_in_git_under_the_stage_s_name(stage):
    docstring = ast.get_docstring(ast.parse((ROOT / "stages" / f"{stage}.py").read_text()))
    named = re.findall(r"\b(?:metrics|plots)/\w+\.\w+", docstring.split("\nWrites: ")[1])
    entries = [*STAGES[stage].get("outs", []), *STAGES[stage].get("metrics", [])]
    kept = {k: v for entry in entries if isinstance(entry, dict) for k, v in entry.items()}
    assert sorted(named) == sorted(path for path in kept if not path.startswith("report/"))
    assert all(options == {"cache": False} for options in kept.values())
    own = "metrics/summary.json" if stage == "report" else f"metrics/{stage}.json"
    assert {path for path in named if path.startswith("metrics/")} <= {own}


def test_one_file_of_metrics_is_small_enough_for_a_screen():
    metrics = [path for stage in STAGES.values() for path in stage.get("metrics", [])]
    assert metrics == [{"metrics/summary.json": {"cache": False}}]


@pytest.mark.parametrize("name", PROJECT["scripts"])
def test_every_console_command_shows_its_help(name):
    module, function = PROJECT["scripts"][name].split(":")
    for call in (["-c", f"import {module} as m; m.{function}()"], ["-m", module]):
        done = python(*call, "--help")
        assert done.returncode == 0, done.stderr
        assert "usage: " in done.stdout
        assert "RuntimeWarning" not in done.stderr
    pages = [page.read_text() for page in (ROOT / "docs").glob("*.md")]
    assert any(f"`{name}`" in page for page in pages)


def test_without_the_harness_its_command_names_what_installs_it():
    program = "import sys; sys.modules['lm_eval'] = None; import infini_retrofit.share.lm_eval"
    done = python("-c", program)
    said = f"is missing: run `pip install {PROJECT['optional-dependencies']['eval'][0]}`\n"
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"error: lm_eval\S* " + re.escape(said), done.stderr)
