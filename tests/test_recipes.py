"""Recipes: what each overlay holds, the command that it becomes, and what DVC makes of it."""

import re
import shlex
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from dvc.utils.hydra import apply_overrides

from analysis.__main__ import main as analysis_main
from infini_retrofit.pipeline.params import read_params
from infini_retrofit.pipeline.schema import leaves
from recipes import __main__ as command_line
from recipes import overlays
from recipes.experiments import newest_experiments
from recipes.overlays import literal, overrides, read_overlay, recipe_names
from tests.tiny_checkout import commit, dvc, git, make_checkout, own_recipes, python, write
from tests.tiny_project import ROOT, run_stage

SEEDS = {f"{name}{end}" for name in ("v1", "v2", "two-stage") for end in ("", "-fixed")}
# Recipes whose rows do not compare with the others', and the keys in which they do not.
OWN_BUDGET = {
    "scratch": {"finetune.epochs", "finetune.patience", "finetune.lr"},
    "memory-only": {"finetune.lr"},
    "memory-and-context": {"finetune.lr"},
    "code-gated-delta": {"finetune.lr"},
    "passkey": {"longdocs.tokens_per_document", "finetune.train_documents"},
    "passkey-mini": {
        "longdocs.tokens_per_document",
        "distill.samples",
        "distill.tokens_per_sample",
        "finetune.train_documents",
        "finetune.val_documents",
        "finetune.batch_size",
        "finetune.epochs",
        "finetune.patience",
        "finetune.lr",
    },
}
SIZES = ("samples", "tokens_per_sample", "train_documents", "batch_size", "epochs", "seed")
TINY = {"one": "# sets a\na: 2\n", "two": "# sets b\nb: 3\n", "broken": "# fails\nb: text\n"}
STAGE = """import json
from pathlib import Path
from ruamel.yaml import YAML
params = YAML(typ="safe").load(Path("params.yaml"))
metrics = {"finetuned": {"segment_test_ppl": params["a"] * 10 + params["b"]}}
Path("metrics").mkdir(exist_ok=True)
Path("metrics/eval_sliding.json").write_text(json.dumps(metrics))
"""
PIPELINE = """stages:
  eval_sliding:
    cmd: python stage.py
    deps: [stage.py]
    params: [a, b]
    metrics:
    - metrics/eval_sliding.json:
        cache: false
"""


@pytest.fixture(autouse=True)
def _checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_checkout(tmp_path, monkeypatch)


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    write(**{"params.yaml": "a: 1\nb: 1\n"})
    commit()
    own_recipes(monkeypatch, **TINY)
    seen = []

    monkeypatch.setattr(command_line, "run", lambda command: seen.append(" ".join(command)))
    monkeypatch.setattr(command_line, "existing_experiments", lambda: {"one"})
    monkeypatch.setattr(command_line, "check_stored", lambda name: None)
    return seen


def recipes(capsys: pytest.CaptureFixture[str], line: str) -> str:
    command_line.main(shlex.split(line))
    return capsys.readouterr().out


def refusal(line: str) -> str:
    with pytest.raises(SystemExit) as error:
        command_line.main(shlex.split(line))
    return str(error.value.code)


def apply(command: str) -> dict[str, Any]:
    """Apply a printed command's overrides to params.yaml with DVC's own parser."""
    words = shlex.split(command)
    given = [value for flag, value in pairwise(words) if flag == "-S"]
    assert len(given) == words.count("-S") > 0
    apply_overrides("params.yaml", given)
    return dict(leaves(read_params()))


def own_values(name: str) -> dict[str, Any]:
    return dict(leaves(read_params(ROOT / "recipes" / f"{name}.yaml")))


def test_recipes_run_experiments_and_know_nothing_of_what_they_show():
    for file in (ROOT / "recipes").glob("*.py"):
        assert not re.search(r"^\s*(from|import) analysis\b", file.read_text(), re.MULTILINE), file


@pytest.mark.parametrize("name", sorted({*recipe_names()} - SEEDS))
def test_recipes_share_one_budget_and_none_of_them_stops_early(name):
    values = dict(leaves(read_params()))
    sections = ("distill.", "finetune.", "finetune_control.")
    fixed = {k for k in values if k.split(".")[-1] in SIZES and k.startswith(sections)}
    chosen = {key for key in values if key.startswith("infini.") or key.endswith(".trainable")}
    chosen |= {"longdocs.corpus", "finetune.memory_documents", "finetune.lr_scale.memory"}
    fixed |= own_values("budget").keys() - chosen - {"finetune_control.lr"}
    assert own_values(name).keys() & fixed == OWN_BUDGET.get(name, set())
    merged = values | read_overlay(name)
    for section in ("distill", "finetune"):
        assert merged[f"{section}.patience"] >= merged[f"{section}.epochs"]


@pytest.mark.parametrize("rule", ["delta", "gamma"])
def test_the_delta_rules_differ_from_the_linear_rule_in_nothing_else(rule):
    one, other = own_values("infini-all"), own_values(f"infini-all-{rule}")
    assert dict(one.items() ^ other.items()).keys() == {"infini.update_rule"}


@pytest.mark.parametrize("name", recipe_names())
def test_dvc_reads_a_printed_command_as_the_recipe_means_it_and_all_checks_pass(name, capsys):
    before = dict(leaves(read_params()))
    command = recipes(capsys, f"{name} --print")
    assert command.startswith(f"dvc exp run -n {name} -S ")
    assert apply(command) == before | read_overlay(name)
    assert read_overlay(name).keys() <= before.keys()
    run_stage("check_params")


def test_the_user_s_own_setting_wins_wherever_it_stands(capsys):
    line = "-S distill.epochs=9 infini-all -S infini.layers=[0,3] -S models.my-model.path=a/b"
    command = recipes(capsys, f"{line} --print --temp --force")
    assert command.startswith("dvc exp run -n infini-all --temp --force -S ")
    assert command.count("distill.epochs=") == command.count("infini.layers=") == 1
    after = apply(command)
    assert after["distill.epochs"] == 9 != read_overlay("infini-all")["distill.epochs"]
    assert (after["infini.layers"], after["models.my-model.path"]) == ([0, 3], "a/b")


def test_a_recipe_does_not_inherit_what_an_earlier_one_left_in_the_workspace(capsys):
    clean = apply(recipes(capsys, "hybrid-last --print"))
    shutil.copyfile(ROOT / "params.yaml", "params.yaml")
    other = apply(recipes(capsys, "memory-only --print"))
    assert other["infini.feature_map"] == "hedgehog" != clean["infini.feature_map"]
    command_line.main(["hybrid-last", "--print"])
    told = capsys.readouterr()
    assert told.err.startswith("note: recipes start from the params.yaml of the last commit")
    assert apply(told.out) == clean
    shutil.copyfile(ROOT / "params.yaml", "params.yaml")
    apart = recipes(capsys, "memory-only hybrid-last --print --temp").split("\n")[1]
    assert "feature_map=elu1" in apart
    first, second = recipes(capsys, "memory-only hybrid-last --print").splitlines()
    assert apply(first)["infini.feature_map"] == "hedgehog"
    assert apply(second) == clean
    now, committed = {"a": {"b": 1, "new": 2}}, {"a": {"b": 3, "gone": 4}}
    assert overlays.left_over(now, committed) == {"a.b": 3}


@pytest.mark.parametrize(
    "value",
    [
        *("on", "off", "a-b", "org/name", "true", "Null", "nan", "1e-3", "3", "", "two words"),
        *("a,b", "x: y", 'a "quoted" word', "[a]", "\u00e9", 1e-5, 2e-3, 0, -1.0, True, None),
        *([], ["a", "true", -1, None], {"k": "v w"}),
    ],
    ids=repr,
)
def test_every_value_survives_dvc_s_grammar(value):
    write(**{"other.yaml": "key: x\n"})
    apply_overrides("other.yaml", [f"key={literal(value)}"])
    after = read_params(Path("other.yaml"))["key"]
    assert (after, type(after)) == (value, type(value))
    if value == "true":  # without quotes it would not survive
        apply_overrides("other.yaml", ["key=true"])
        assert read_params(Path("other.yaml"))["key"] is True


def test_the_list_says_what_each_recipe_is_in_a_line(capsys, monkeypatch):
    lines = recipes(capsys, "--list").splitlines()
    assert [line.split()[0] for line in lines] == recipe_names()
    assert all(len(line.split()) > 4 for line in lines)
    own_recipes(monkeypatch, silent="model: my-model\n")
    expected = "error: silent.yaml must begin with a line `# what it is`, got 'model: my-model'"
    assert refusal("--list") == expected


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("infini-al --print", ["must be one of adapter-layer0, code-", "got 'infini-al'"]),
        ("control --print -S distill.epoch=3", ["distill.epoch must", "distill has batch_size, "]),
        ("control --print -S distil.epochs=3", ["distil.epochs must", "params.yaml has corpora, "]),
        ("control --print -S distill.epochs", ["-S must be key=value", "got 'distill.epochs'"]),
        ("control --print -S 'finetune.seed = 3'", ["without blanks", "got 'finetune.seed = 3'"]),
        ("control --print -S finetune.lora=3", ["such as finetune.lora.rank=..."]),
        ("control scratch --name x --print", ["--name must come with one recipe"]),
        ("v1 control v1 --print", ["NAMEs must differ, got v1, control, v1"]),
        ("--diff", ["--diff must come with two names, got none"]),
        ("v1 v2 --diff -S a=3", ["--diff must come without -S and --name, "]),
        ("v1 x --diff --print", ["a recipe must be one of", "got 'x'"]),
    ],
)
def test_what_cannot_be_meant_is_refused_with_the_choices(line, words):
    message = refusal(line)
    assert message.startswith("error: ")
    for word in words:
        assert word in message


def test_overlays_and_repositories_that_do_not_fit_are_refused(monkeypatch):
    own_recipes(monkeypatch, wrong="# a slip\ndistill:\n  epoch: 3\n", part="# fits\na:\n  c: 3\n")
    assert refusal("wrong --print").startswith("error: recipe wrong: distill.epoch must be a key")
    params = {"a": {"b": 1, "c": 2}}  # the user's mapping comes after the recipe's part of it
    assert overrides("part", params, {"a.c": 2}, ["a={b: 5}"]) == ["a.c=3", "a={b: 5}"]
    shutil.rmtree(".git")
    assert refusal("part").startswith("error: experiments start from the last commit: not a git")


@pytest.mark.parametrize("option", ["table", "compare", "report", "leaderboard", "revisions"])
def test_what_shows_experiments_is_the_command_of_analysis(option, capsys):
    """Each ends as that command does, in a project without results."""
    command = "reports" if option == "report" else option
    names = [] if option == "leaderboard" else ["one", "two"]
    with pytest.raises(SystemExit) as other:
        analysis_main([command, *names])
    assert refusal(" ".join([f"--{option}", *names])) == str(other.value.code)
    assert capsys.readouterr().out == ""


FORCED = ["dvc exp run -n one --force -S a=2", "dvc exp run -n two --force -S a=1 -S b=3"]
COMPARISONS = ["dvc metrics diff one two --md", "dvc params diff one two --md"]


@pytest.mark.parametrize(
    ("line", "want"),
    [
        ("one two --diff", ["dvc exp run -n two -S b=3", *COMPARISONS]),
        ("one --diff two --temp", ["dvc exp run -n two --temp -S b=3", *COMPARISONS]),
        ("one two --diff --force", [*FORCED, *COMPARISONS]),
    ],
)
def test_only_what_is_missing_is_run_before_a_comparison(commands, line, want, capsys):
    assert recipes(capsys, line).splitlines() == commands == want
    commands.clear()
    assert recipes(capsys, f"{line} --print").splitlines() == want
    assert commands == []


def python_m(module: str, *words: str) -> tuple[int, str]:
    done = python("-m", module, *words)
    return done.returncode, done.stdout + done.stderr


def test_recipes_run_as_real_experiments_that_tables_and_dvc_find_by_name(monkeypatch):
    shutil.copytree(ROOT / "recipes", "recipes", ignore=shutil.ignore_patterns("*.yaml", "__py*"))
    own_recipes(monkeypatch, **TINY)
    write(**{"params.yaml": "a: 1\nb: 1\n", "dvc.yaml": PIPELINE, "stage.py": STAGE})
    write(**{".gitignore": "__pycache__/\n"})
    dvc("init", "--quiet")
    base = commit()
    code, output = python_m("recipes", "one", "two")
    assert code == 0, output
    assert "\ndvc exp run -n two -S a=1 -S b=3\n" in output
    assert {experiment.code for experiment in newest_experiments().values()} == {base}
    code, output = python_m("recipes", "two", "one")
    assert (code, "error: experiments that exist already: one, two." in output) == (1, True)
    code, output = python_m("recipes", "broken", "two", "--diff", "--force")
    assert (code != 0, "error: broken failed; left to run: two" in output) == (True, True)
    assert "dvc metrics diff" not in output
    code, output = python_m("recipes", "two", "--name", "three", "--temp", "-S", "a=4")
    assert code == 0, output
    code, output = python_m("recipes", "one", "three", "--diff")
    assert code == 0, output
    for values in ("finetuned.segment_test_ppl | 21 | 43 | 22", "params.yaml | a | 2 | 4"):
        assert values in " ".join(output.replace("|", " | ").split())
    assert git("for-each-ref", "refs/exps").count("/broken") == 0
    code, output = python_m("analysis", "table", "one", "two", "three")
    assert code == 0, output
    rows = [[cell.strip() for cell in row.split("|")[1:3]] for row in output.splitlines()[2:]]
    assert rows == [["two", "13.00"], ["one", "21.00"], ["three", "43.00"]]
    code, output = python_m("analysis", "table", "broken")
    assert (code, "have not been run: broken" in output) == (1, True)
