"""Results kept in the repository: what is written, and that it reads as the experiment did."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from ruamel.yaml import YAML

from analysis import __main__ as command_line
from analysis import reading
from analysis.table import CHOSEN
from recipes import __main__ as recipes_command
from recipes.experiments import is_in_history, read_file, read_params_of
from recipes.finished import Finished
from recipes.kept import keep, read_kept
from recipes.overlays import leaves, read_overlay, recipe_names
from tests.test_recipe_table import METRICS, cells, experiment
from tests.test_recipe_table import commit as shown_commit
from tests.tiny_checkout import commit, head, make_checkout, write_scores

ROOT = Path(__file__).parent.parent
STAGES = {
    "finetune": {
        "deps": [{"path": "stages/code.py", "md5": "c"}],
        "outs": [{"path": "models/finetuned", "md5": "new"}],
    },
    "eval_sliding": {
        "deps": [{"path": "stages/code.py", "md5": "c"}, {"path": "models/finetuned", "md5": "new"}]
    },
}
LEFT = {f"metrics/{name}.json": json.dumps(values) for name, values in METRICS.items()}
LEFT |= {"plots/eval_positions.tsv": "position\n0\n"}
NUM_ARTICLES = 11


def write(**files: str) -> str:
    """Write files of the working folder and commit them; return the commit."""
    for name, text in files.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(text, encoding="utf-8")
    return commit()


def write_lock(stages: dict) -> None:
    """Write what the stages of an experiment read and made."""
    YAML().dump({"stages": stages}, Path("dvc.lock"))


def scores_of(seed: int) -> dict[tuple[str, str], np.ndarray]:
    """Make up what the models of an experiment scored; the base the same for every seed."""
    names = [("finetuned", "segment"), ("control", "segment"), ("control", "segment_kv")]
    names += [("finetuned", f"segment_{other}") for other in ("off", "recent", "swapped", "kv")]
    drawn = np.random.default_rng(seed).normal(3, 0.2, size=(len(names), NUM_ARTICLES))
    return dict(zip(names, drawn, strict=True)) | {("base", "full"): np.full(NUM_ARTICLES, 2.5)}


def back_to(revision: str) -> None:
    """Leave what was committed since beside the history, as DVC leaves experiments."""
    subprocess.run(["git", "reset", "--quiet", "--hard", revision], check=True)


def run_experiment(seed: int = 0, stages: dict = STAGES, **edits: str) -> Finished:
    """Leave beside the history what an experiment leaves, run in a workspace with edits."""
    code = head()
    write_lock(stages)
    write_scores(scores_of(seed), range(NUM_ARTICLES))
    text = Path("params.yaml").read_text(encoding="utf-8").replace("window: 64", "window: 32")
    text = text.replace("  seed: 0\n", f"  seed: {seed}\n")
    revision = write(**{**LEFT, "params.yaml": text, **edits})
    back_to(code)
    metrics = {path: {"data": json.loads(text)} for path, text in LEFT.items() if "metr" in path}
    return Finished(revision, metrics, code)


def show(monkeypatch: pytest.MonkeyPatch, **experiments: Finished) -> None:
    """Let DVC know these experiments and no others."""
    commits = []
    for name, found in experiments.items():
        entry = experiment(name, METRICS)
        entry["revs"][0]["rev"] = found.source
        commits.append(shown_commit(entry) | {"rev": found.code})
    for module in (reading, recipes_command):
        monkeypatch.setattr(module, "all_experiments", lambda: commits)


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> None:
    """Make a project in a folder of a repository, with code of one file."""
    make_checkout(tmp_path, monkeypatch)
    Path("project").mkdir()
    shutil.move("params.yaml", "project/params.yaml")
    monkeypatch.chdir("project")
    write(**{"stages/code.py": "pass\n", "dvc.yaml": "stages: {}\n", "README.md": "words\n"})


def test_what_is_kept_reads_as_the_experiment_does(checkout, monkeypatch, capsys):
    run = run_experiment()
    show(monkeypatch, mine=run)
    recipes_command.main(["--keep", "mine"])
    assert capsys.readouterr().out == "results/mine\n"
    folder = Path("results/mine")
    found = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert found == {"commit", "params.yaml", "plots/eval_documents.tsv", *LEFT}
    assert read_kept() == {"mine": Finished(folder, run.metrics, head())}
    for path in found - {"commit"}:
        assert read_file(folder, path) == read_file(run.source, path)
    assert read_params_of(folder)["infini"]["window"] == 32
    assert read_params_of("HEAD")["infini"]["window"] == 64


def test_every_view_reads_kept_results_and_says_so(checkout, monkeypatch, capsys):
    show(monkeypatch, mine=run_experiment(0), other=run_experiment(1))
    views = [["--table"], ["--against"], ["--repeats"], ["--picture", "a.svg"]]

    def shown() -> list[str]:
        for view in views:
            command_line.main([*view, "mine", "other"])
        output = capsys.readouterr()
        notes.append(output.err)
        return output.out.splitlines()

    notes: list[str] = []
    before = shown()
    recipes_command.main(["--keep", "mine", "other"])
    assert capsys.readouterr().out == "results/mine\nresults/other\n"
    show(monkeypatch)
    assert shown() == before
    assert notes[0] == ""
    assert notes[1] == "note: not run here, read from results/: mine, other\n" * len(views)


def test_a_table_shows_in_which_parameters_experiments_differ(checkout, monkeypatch, capsys):
    new = Path("params.yaml").read_text(encoding="utf-8")
    older = re.sub(r"  state_dtype: float32.*\n", "", new)
    assert older != new
    wider = new.replace("window: 64", "window: 96").replace("memory: on ", "memory: off ")
    wider = wider.replace("seed_scaling: false", "seed_scaling: true")
    wider = wider.replace("  layers:\n  - 0\n", "  layers: [0, -1]\n")
    wider = wider.replace("    rest: 1.0", "    rest: 25.0")
    new = new.replace("    rest: 1.0", "    rest: 1")  # the same number
    texts = {"first": older, "second": new, "third": wider}
    runs = {name: run_experiment(**{"params.yaml": text}) for name, text in texts.items()}
    show(monkeypatch, **runs)
    names = ["first", "third", "second", "control"]
    command_line.main(["--table", *names, "--columns", "choices"])
    header, _, *rows = map(cells, capsys.readouterr().out.splitlines())
    chosen = [column.title for column in CHOSEN]
    keys = [f"infini.{key}" for key in ("layers", "window", "memory", "seed_scaling")]
    assert header == ["recipe", *keys, "finetune.lr_scale.rest", *chosen]
    values = ["[0]", "64", "on", "false", "1"]
    numbers = ["29.10", "29.80", "8.6%", "+0.0189", "1,497,600"]
    assert rows == [
        ["first", *values, *numbers],
        ["third", "[0,-1]", "96", "off", "true", "25", *numbers],
        ["second", *values, *numbers],
        ["control", *["-"] * len(header[1:])],  # not run
    ]


def test_what_was_run_here_wins(checkout, monkeypatch, capsys):
    keep("control", run_experiment())
    own = experiment("control", {"finetune": {"num_trained_tokens": 1}})

    def tokens_seen(*experiments: dict) -> str:
        monkeypatch.setattr(reading, "all_experiments", lambda: [shown_commit(*experiments)])
        command_line.main(["--table"])
        (row,) = map(cells, capsys.readouterr().out.splitlines()[2:])
        return row[-1]

    assert tokens_seen() == "589,824"
    assert tokens_seen(own) == "1"


def test_keeping_again_replaces_the_folder_and_nothing_else(checkout):
    write(**{"results/mine/stale": "", "results/other/stale": ""})
    keep("mine", run_experiment())
    assert not Path("results/mine/stale").exists()
    assert Path("results/other/stale").exists()
    assert {p.name for p in Path("results").iterdir()} == {"mine", "other"}


def test_edits_that_are_no_code_do_not_matter(checkout):
    assert keep("x", run_experiment(**{"README.md": "others\n", "results/y/commit": "y\n"}))


@pytest.mark.parametrize("path", ["stages/code.py", "dvc.yaml"])
def test_an_experiment_that_ran_uncommitted_code_is_refused(checkout, path):
    edited = run_experiment(**{path: "changed\n"})
    with pytest.raises(ValueError, match=f"^x cannot be kept: it ran with changes of {path} that"):
        keep("x", edited)
    assert not Path("results").exists()


def test_an_experiment_of_another_history_is_refused(checkout):
    before = head()
    write(**{"stages/code.py": "elsewhere\n"})
    elsewhere = run_experiment()
    back_to(before)
    with pytest.raises(ValueError, match=f"the code of commit {elsewhere.code[:7]}, which the his"):
        keep("x", elsewhere)
    assert not Path("results").exists()


def test_an_experiment_of_some_stages_alone_is_refused(checkout):
    stages = json.loads(json.dumps(STAGES).replace('"md5": "new"', '"md5": "old"', 1))
    with pytest.raises(ValueError, match=r"its eval_sliding read another models/finetuned than"):
        keep("x", run_experiment(stages=stages))
    assert not Path("results").exists()


def test_an_experiment_that_lacks_a_file_leaves_nothing(checkout):
    run = run_experiment()
    with pytest.raises(ValueError, match=r"^x cannot be kept: path .*metrics/none\.json"):
        keep("x", run._replace(metrics={"metrics/none.json": {}}))
    assert not Path("results").exists()


def test_names_that_were_not_run_here_are_refused(checkout, monkeypatch):
    show(monkeypatch)
    for names, got in (([], "none"), (["control"], "some that have not been run: control")):
        with pytest.raises(SystemExit, match=f"--keep needs names of finished .*, got {got}$"):
            recipes_command.main(["--keep", *names])


def test_a_folder_by_halves_is_none_and_a_broken_file_is_named(checkout):
    folder = keep("x", run_experiment())
    Path("results/empty/metrics").mkdir(parents=True)
    assert list(read_kept()) == ["x"]
    (folder / "params.yaml").write_text("a: [", encoding="utf-8")
    with pytest.raises(ValueError, match=r"results/x/params\.yaml is not valid YAML"):
        read_params_of(folder)
    (folder / "metrics/finetune.json").write_bytes(b"<<<<<<< \xff")
    with pytest.raises(ValueError, match=r"^results/x/metrics/finetune\.json must hold JSON, try"):
        read_kept()


def test_the_project_s_own_results_are_of_its_recipes(monkeypatch):
    monkeypatch.chdir(ROOT)
    experiments = read_kept()
    assert {"infini-all", "v1"} <= experiments.keys()
    for name, found in experiments.items():
        if name in recipe_names():
            values = dict(leaves(read_params_of(found.source)))
            overlay = read_overlay(name)
            assert {key: values[key] for key in overlay} == overlay, name


def test_the_project_s_own_results_are_of_its_code(monkeypatch):
    monkeypatch.chdir(ROOT)
    command = ["git", "rev-parse", "--is-shallow-repository"]
    if subprocess.run(command, capture_output=True, text=True).stdout.strip() != "false":
        pytest.skip("the history is not there")
    assert [name for name, found in read_kept().items() if not is_in_history(found.code)] == []
