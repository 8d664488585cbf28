"""Kept results as revisions of DVC: what they hold, and that nothing else changes."""

import json
from pathlib import Path

import pytest

from recipes.__main__ import main
from recipes.experiments import newest_experiments, read_file
from recipes.kept import IF_THERE, PLOTTED
from tests.tiny_checkout import commit, dvc, git, make_checkout, store, write

PIPELINE = """stages:
  finetune:
    cmd: python -m stages.finetune
    params: [lr]
    metrics:
    - metrics/finetune.json: {cache: false}
    plots:
    - plots/finetune.tsv: {cache: false}
"""
CURVE = IF_THERE[0]
STALE = ("metrics/finetune.json", "plots/training.tsv", "report/report.md")
ROWS = "model\tprotocol\tdocument\tnll\n"


def kept(name: str, code: str, ppl: float, **more: str) -> None:
    names = ("base", "control", "finetuned")
    protocols = ("segment", "segment_off", "segment_kv", "full", "sliding")
    scores = {model: {f"{name}_test_ppl": ppl for name in protocols} for model in names}
    files = {"commit": f"{code}\n", "params.yaml": f"lr: {ppl}\n", **dict.fromkeys(PLOTTED, ROWS)}
    files |= {"metrics/eval_sliding.json": json.dumps(scores), **more}
    files["metrics/finetune.json"] = json.dumps({"val_loss": ppl})  # no metric of DVC any more
    write(**{f"results/{name}/{path}": text for path, text in files.items()})


def state() -> list[str]:
    return [git("rev-parse", "HEAD"), git("ls-files", "--stage"), git("status", "--porcelain")]


def refs() -> list[str]:
    return git("for-each-ref", "--format=%(refname)").split()


@pytest.fixture
def code(tmp_path, monkeypatch) -> str:
    """Make a project in a folder of a repository and return the commit that kept results ran."""
    make_checkout(tmp_path, monkeypatch)
    Path("project").mkdir()
    monkeypatch.chdir("project")
    dvc("init", "--quiet", "--subdir")
    stale = dict.fromkeys(STALE, "of another run")
    write(**{"dvc.yaml": PIPELINE, "params.yaml": "lr: 1\n", "stages/finetune.py": "", **stale})
    return commit()


def test_kept_results_are_revisions_and_the_work_tree_stays(code):
    kept("one", code, 20.0, **{CURVE: "epoch\tsplit\tppl\n"})
    kept("two", code, 24.0)
    write(**{"params.yaml": "lr: 5\n", "mine.txt": "of a user"})
    before = state()
    main(["--revisions", "one", "two"])
    assert state() == before
    shown = dvc("metrics", "diff", "one", "two", "--md")
    assert max(map(len, shown.splitlines())) <= 120
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in shown.splitlines()]
    assert ["metrics/summary.json", "ppl", "20.0", "24.0", "4.0"] in cells
    assert {row[0] for row in cells[2:] if row} == {"metrics/summary.json"}
    shown = dvc("params", "diff", "one", "two", "--md").replace(" ", "")
    assert "|params.yaml|lr|20.0|24.0|" in shown
    one = f"refs/exps/{code[:2]}/{code[2:]}/one"
    changed = git("diff", "--name-status", "--relative", code, one).splitlines()
    made = {"dvc.yaml", "params.yaml", "metrics/eval_sliding.json", "metrics/summary.json"}
    assert {line.split("\t")[1] for line in changed} == {*made, *PLOTTED, *STALE}
    assert read_file(one, CURVE) == "epoch\tsplit\tppl\n"
    with pytest.raises(FileNotFoundError):
        read_file(one, "report/report.md")


def test_a_revision_is_no_run_and_is_made_anew(code):
    store("run", **{"params.yaml": "lr: 3\n"})
    kept("one", code, 20.0)
    kept("run", code, 20.0)
    main(["--revisions"])
    assert newest_experiments().keys() == {"run"}
    kept("one", code, 21.0)
    main(["--revisions", "one"])
    (one,) = [ref for ref in refs() if ref.endswith("/one")]
    assert read_file(one, "params.yaml") == "lr: 21.0\n"


def test_what_cannot_be_a_revision_is_refused(code):
    store("run", **{"params.yaml": "lr: 3\n"})
    kept("run", code, 20.0)
    kept("elsewhere", "1" * 40, 20.0)
    before = refs()
    for name, words in {
        "run": "run was run here, and is a revision already",
        "elsewhere": "of commit 1111111, which this clone lacks: run `git fetch --unshallow`",
        "none": "revisions needs names of finished experiments, got some that .*: none",
    }.items():
        with pytest.raises(SystemExit, match=f"^error: .*{words}$"):
            main(["--revisions", name])
    assert refs() == before
