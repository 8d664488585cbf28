"""Results kept in the repository: what is written, and that it reads as the experiment did."""

import json
import subprocess
from pathlib import Path

import pytest

from recipes import __main__ as command_line
from recipes import kept
from recipes.experiments import read_file, read_params_of
from recipes.finished import Finished
from tests.test_recipe_table import METRICS, cells, experiment
from tests.test_recipe_table import commit as shown_commit
from tests.tiny_checkout import commit, make_checkout

SCORES = "model\tprotocol\tdocument\tarticle\tnll\nbase\tfull\t0\ta\t2.5\n"
LEFT = {f"metrics/{name}.json": json.dumps(values) for name, values in METRICS.items()}
LEFT |= {"plots/eval_documents.tsv": SCORES, "plots/eval_positions.tsv": "position\n0\n"}


def write(**files: str) -> None:
    """Write files of the working folder and commit them."""
    for name, text in files.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(text, encoding="utf-8")
    commit()


def head() -> str:
    """Return the last commit."""
    command = ["git", "rev-parse", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def shown(tmp_path, monkeypatch) -> dict:
    """Commit code, and beside the history an experiment with it; return it as DVC shows it."""
    make_checkout(tmp_path, monkeypatch)
    write(**{"code.py": "pass\n", ".gitignore": "results\n"})
    parameters = Path("params.yaml").read_text(encoding="utf-8")
    write(**LEFT, **{"params.yaml": parameters.replace("window: 64", "window: 32")})
    entry = experiment("infini-all", METRICS)
    entry["revs"][0]["rev"] = head()
    subprocess.run(["git", "reset", "--quiet", "--hard", "HEAD~1"], check=True)
    monkeypatch.setattr(command_line, "all_experiments", lambda: [shown_commit(entry)])
    return entry


def revision_of(shown: dict) -> str:
    return shown["revs"][0]["rev"]


def test_what_is_kept_reads_as_the_experiment_does(shown, capsys):
    command_line.main(["--keep", "infini-all"])
    assert capsys.readouterr().out == "results/infini-all\n"
    folder = Path("results/infini-all")
    found = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert found == {"commit", "params.yaml", *LEFT}
    assert (folder / "commit").read_text().strip() == head()
    (experiment,) = kept.kept().values()
    assert experiment.source == folder
    assert experiment.metrics == shown["revs"][0]["data"]["metrics"]
    for path in ("params.yaml", *LEFT):
        assert read_file(experiment.source, path) == read_file(revision_of(shown), path)
    assert read_params_of(folder)["infini"]["window"] == 32
    assert read_params_of("HEAD")["infini"]["window"] == 64


def test_a_table_shows_kept_results_and_what_was_run_here_instead(shown, monkeypatch, capsys):
    command_line.main(["--keep", "infini-all"])
    capsys.readouterr()

    def tokens_seen() -> str:
        command_line.main(["--table"])
        (row,) = map(cells, capsys.readouterr().out.splitlines()[2:])
        return row[-1]

    monkeypatch.setattr(command_line, "all_experiments", lambda: [shown_commit()])
    assert tokens_seen() == "589,824"
    own = experiment("infini-all", {"finetune": {"num_trained_tokens": 1}})
    monkeypatch.setattr(command_line, "all_experiments", lambda: [shown_commit(own)])
    assert tokens_seen() == "1"


def test_keeping_again_replaces_the_folder_and_nothing_else(shown):
    for name in ("infini-all", "other"):
        (Path("results") / name).mkdir(parents=True)
        (Path("results") / name / "stale").touch()
    command_line.main(["--keep", "infini-all"])
    assert not Path("results/infini-all/stale").exists()
    assert Path("results/other/stale").exists()
    assert {p.name for p in Path("results").iterdir()} == {"infini-all", "other"}


def test_an_experiment_whose_code_is_not_in_the_history_is_refused(shown):
    before = revision_of(shown)
    write(**{"code.py": "changed\n"} | LEFT)
    uncommitted = Finished(head(), {})
    subprocess.run(["git", "reset", "--quiet", "--hard", "HEAD~1"], check=True)
    with pytest.raises(ValueError, match=r"x cannot be kept: its code must have been .* code\.py$"):
        kept.keep({"x": uncommitted}, ["x"])
    write(**{"code.py": "elsewhere\n"})
    write(**LEFT)
    elsewhere = Finished(head(), {})
    subprocess.run(["git", "reset", "--quiet", "--hard", "HEAD~2"], check=True)
    with pytest.raises(ValueError, match=r"x cannot be kept: its code must be of a commit before"):
        kept.keep({"x": elsewhere}, ["x"])
    assert not Path("results").exists()
    assert kept.keep({"x": Finished(before, {})}, ["x"])


def test_an_experiment_that_lacks_a_file_leaves_nothing(shown):
    revision = revision_of(shown)
    with pytest.raises(FileNotFoundError, match=r"metrics/none\.json"):
        kept.keep({"x": Finished(revision, {"metrics/none.json": {}})}, ["x"])
    assert not Path("results").exists()


def test_names_that_were_not_run_here_are_refused(shown):
    for names, got in (([], "none"), (["control"], "some that have not been run: control")):
        with pytest.raises(SystemExit, match=f"--keep needs names of finished .*, got {got}$"):
            command_line.main(["--keep", *names])


def test_the_project_s_own_results_hold_together():
    root = Path(__file__).parent.parent
    for folder in sorted((root / "results").iterdir()):
        assert len((folder / "commit").read_text().strip()) == 40
        assert read_params_of(folder)["model"] in ("smollm2-135m", "pythia-mini-untrained")
        assert {"metrics/eval_sliding.json", "metrics/finetune.json"} <= {
            p.relative_to(folder).as_posix() for p in folder.rglob("*.json")
        }
