"""Recipes: what each overlay holds, and the command that it becomes."""

import shlex
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from dvc.utils.hydra import apply_overrides

from infini_retrofit.pipeline.params import read_params
from recipes import __main__ as command_line
from recipes import overlays
from recipes.overlays import leaves, literal, overrides, read_overlay, recipe_names
from tests.tiny_checkout import commit, make_checkout, own_recipes
from tests.tiny_project import ROOT, run_stage, write_params

PLANNED = {
    *("infini-layer0", "parallel", "hybrid-last", "infini-all", "infini-all-delta"),
    *("infini-all-gamma", "scratch", "control"),
}
# Recipes whose rows do not compare with the others', and the keys in which they do not.
OWN_BUDGET = {
    "scratch": {"finetune.epochs", "finetune.patience", "finetune.lr"},
    "memory-only": {"finetune.lr"},
    "memory-and-context": {"finetune.lr"},
}


@pytest.fixture(autouse=True)
def _checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_checkout(tmp_path, monkeypatch)


def recipes(capsys: pytest.CaptureFixture[str], line: str) -> str:
    """Return what the command line prints."""
    command_line.main(shlex.split(line))
    return capsys.readouterr().out


def refusal(line: str) -> str:
    """Return the sentence with which a command line is refused."""
    with pytest.raises(SystemExit) as error:
        command_line.main(shlex.split(line))
    return str(error.value.code)


def apply(command: str) -> dict[str, Any]:
    """Let DVC's own parser carry a printed command's overrides into params.yaml."""
    words = shlex.split(command)
    given = [value for flag, value in pairwise(words) if flag == "-S"]
    assert len(given) == words.count("-S") > 0
    apply_overrides("params.yaml", given)
    return dict(leaves(read_params()))


def own_values(name: str) -> dict[str, Any]:
    """Read an overlay without the budget below it."""
    return dict(leaves(read_params(ROOT / "recipes" / f"{name}.yaml")))


def test_every_planned_recipe_is_there():
    assert set(recipe_names()) >= PLANNED
    assert "budget" not in recipe_names()


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_holds_only_keys_of_the_parameters_and_passes_their_checks(name):
    assert read_overlay(name).keys() <= dict(leaves(read_params())).keys()
    write_params(Path.cwd(), read_overlay(name))
    run_stage("check_params")


def test_a_recipe_with_a_bad_value_would_fail_those_checks():
    write_params(Path.cwd(), read_overlay("infini-all") | {"infini.positions": "sideways"})
    with pytest.raises(ValueError, match=r"^infini\.positions must be"):
        run_stage("check_params")


@pytest.mark.parametrize("name", sorted({*PLANNED, *OWN_BUDGET}))
def test_recipes_share_one_budget_and_none_of_them_stops_early(name):
    budget = dict(leaves(read_params(ROOT / "recipes" / "budget.yaml")))
    tokens = ("samples", "tokens_per_sample", "train_documents", "batch_size", "epochs", "seed")
    fixed = {key for key in read_params_keys() if key.split(".")[-1] in tokens} | budget.keys()
    assert own_values(name).keys() & fixed == OWN_BUDGET.get(name, set())
    merged = dict(leaves(read_params())) | read_overlay(name)
    for section in ("distill", "finetune"):
        assert merged[f"{section}.patience"] >= merged[f"{section}.epochs"]


def read_params_keys() -> set[str]:
    """List the keys of the sections that say how much is trained and scored."""
    sections = ("longdocs", "distill", "finetune", "eval")
    return {key for key in dict(leaves(read_params())) if key.split(".")[0] in sections}


@pytest.mark.parametrize("rule", ["delta", "gamma"])
def test_the_delta_rules_differ_from_the_linear_rule_in_nothing_else(rule):
    values = {
        key: (own_values("infini-all")[key], value)
        for key, value in own_values(f"infini-all-{rule}").items()
    }
    assert values.keys() == own_values("infini-all").keys()
    assert {key for key, (one, other) in values.items() if one != other} == {"infini.update_rule"}


@pytest.mark.parametrize("name", recipe_names())
def test_dvc_reads_a_printed_command_as_the_recipe_means_it(name, capsys):
    before = dict(leaves(read_params()))
    command = recipes(capsys, f"{name} --print")
    assert command.startswith(f"dvc exp run -n {name} -S ")
    assert apply(command) == before | read_overlay(name)


def test_the_user_s_own_setting_wins_wherever_it_stands(capsys):
    line = "-S distill.epochs=9 infini-all -S infini.layers=[0,3] -S models.my-model.path=a/b"
    command = recipes(capsys, f"{line} --print --temp --force")
    assert command.count("distill.epochs=") == command.count("infini.layers=") == 1
    assert command.startswith("dvc exp run -n infini-all --temp --force -S ")
    after = apply(command)
    assert after["distill.epochs"] == 9 != read_overlay("infini-all")["distill.epochs"]
    assert after["infini.layers"] == [0, 3]
    assert after["models.my-model.path"] == "a/b"
    assert after["infini.positions"] == "rope"


def test_a_recipe_does_not_inherit_what_an_earlier_one_left_in_the_workspace(capsys):
    clean = apply(recipes(capsys, "memory-only --print"))
    after_another = apply(recipes(capsys, "hybrid-last --print"))
    assert after_another["infini.feature_map"] == "elu1" != clean["infini.feature_map"]
    assert after_another["finetune.trainable"] == "infini" != clean["finetune.trainable"]
    command_line.main(["infini-all", "--print"])
    told = capsys.readouterr()
    assert told.err.startswith("note: recipes start from the params.yaml of the last commit")
    assert "infini.layers" in told.err
    assert apply(told.out)["infini.layers"] == "all"
    commit()
    command_line.main(["infini-all", "--print"])
    assert capsys.readouterr().err == ""


def test_recipes_of_one_call_do_not_inherit_from_each_other(capsys):
    alone = apply(recipes(capsys, "hybrid-last --print"))
    shutil.copyfile(ROOT / "params.yaml", "params.yaml")
    copies = recipes(capsys, "memory-only hybrid-last --print --temp").splitlines()
    assert "feature_map" not in copies[1]
    first, second = recipes(capsys, "memory-only hybrid-last --print").splitlines()
    assert apply(first)["infini.feature_map"] == "hedgehog"
    assert apply(second) == alone


def test_only_values_that_both_know_are_put_back():
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
    Path("other.yaml").write_text("key: x\n")
    apply_overrides("other.yaml", [f"key={literal(value)}"])
    after = read_params(Path("other.yaml"))["key"]
    assert after == value
    assert type(after) is type(value)


def test_a_text_without_quotes_would_not_survive():
    Path("other.yaml").write_text("key: x\n")
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
        ("infini-al --print", ["must be one of control, ", ", scratch", "got 'infini-al'"]),
        ("budget --print", ["must be one of", "got 'budget'"]),
        ("control nope --print", ["got 'nope'"]),
        ("control --print -S distill.epoch=3", ["distill.epoch must", "distill has batch_size, "]),
        ("control --print -S distil.epochs=3", ["distil.epochs must", "params.yaml has corpora, "]),
        ("control --print -S model.x=3", ["model.x must", "model has no keys"]),
        ("control --print -S distill.epochs", ["-S must be key=value", "got 'distill.epochs'"]),
        ("control --print -S =3", ["-S must be key=value", "got '=3'"]),
        ("control --print -S 'finetune.seed = 3'", ["without blanks", "got 'finetune.seed = 3'"]),
        ("control --print -S finetune=3", ["such as finetune.trainable=..."]),
        ("control --print -S finetune.lora=3", ["such as finetune.lora.rank=..."]),
        ("control scratch --name x --print", ["--name must come with one recipe"]),
        ("v1 control v1 --print", ["NAMEs must differ, got v1, control, v1"]),
    ],
)
def test_what_cannot_be_meant_is_refused_with_the_choices(line, words):
    message = refusal(line)
    assert message.startswith("error: ")
    for word in words:
        assert word in message


@pytest.mark.parametrize("line", ["--list --diff v1 v2", "--keep --diff v1 v2", "--diff --list"])
def test_one_thing_is_asked_for_at_a_time(line, capsys):
    with pytest.raises(SystemExit, match="2"):
        command_line.main(line.split())
    assert "not allowed with argument --" in capsys.readouterr().err


def test_a_recipe_with_an_unknown_key_is_refused_by_name(monkeypatch):
    own_recipes(monkeypatch, wrong="# a recipe with a slip\ndistill:\n  epoch: 3\n")
    assert refusal("wrong --print").startswith("error: recipe wrong: distill.epoch must be a key")


def test_without_a_commit_to_start_from_nothing_runs():
    shutil.rmtree(".git")
    assert refusal("control").startswith("error: params.yaml is missing from the last commit")


def test_the_user_s_mapping_comes_after_the_recipe_s_part_of_it(monkeypatch):
    params = {"a": {"b": 1, "c": 2}}
    own_recipes(monkeypatch, part="# a part\na:\n  c: 3\n")
    assert overrides("part", params, {"a.c": 2}, ["a={b: 5}"]) == ["a.c=3", "a={b: 5}"]
