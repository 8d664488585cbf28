"""The page of `dvc plots show` draws without internet."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from infini_retrofit.share import offline_plots

ROOT = Path(__file__).parent.parent
DVC = [sys.executable, "-m", "dvc"]
CDN = "cdn.jsdelivr.net/npm/vega"
ROWS = {
    "curves": "epoch\tsplit\tloss\tppl\n1\ttrain\t0.5\t\n1\tval\t0.6\t21.5\n2\tval\t0.4\t20.5\n",
    "ppl_by_protocol": "model\tprotocol\tppl\nbase\tsliding\t21.5\ncontrol\tsliding\t20.5\n",
}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small DVC project with this project's configuration and templates."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".dvc" / "plots").mkdir(parents=True)
    config = (ROOT / ".dvc" / "config").read_text().replace("[core]", "[core]\n    no_scm = true")
    (tmp_path / ".dvc" / "config").write_text(config)
    lines = ["plots:"]
    for name, rows in ROWS.items():
        template = (ROOT / ".dvc" / "plots" / f"{name}.json").read_text()
        (tmp_path / ".dvc" / "plots" / f"{name}.json").write_text(template)
        (tmp_path / f"{name}.tsv").write_text(rows)
        x = rows.split("\t")[0] if name == "curves" else "protocol"
        lines.append(f"- {name}.tsv: {{template: {name}, x: {x}, y: ppl, title: About {name}}}")
    (tmp_path / "dvc.yaml").write_text("\n".join(lines) + "\n")
    return tmp_path


def show() -> str:
    """Return the page that `dvc plots show` makes."""
    run = subprocess.run([*DVC, "plots", "show"], capture_output=True, text=True, check=True)
    return Path(run.stdout.strip().removeprefix("file://")).read_text()


def test_the_page_loads_nothing_after_the_set_up(project):
    assert CDN in show()
    offline_plots.main()
    page = show()
    assert CDN not in page
    assert "<script src" not in page
    assert "vegaEmbed" in page
    assert all(f"About {name}" in page for name in ROWS)


@pytest.mark.parametrize(("name", "needle"), [("curves", "20.5"), ("ppl_by_protocol", "control")])
def test_a_template_is_filled_and_draws_its_values(project, name, needle):
    import vl_convert

    command = [*DVC, "plots", "show", f"{name}.tsv", "--show-vega"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "<DVC_METRIC" not in run.stdout
    assert needle in run.stdout
    svg = vl_convert.vegalite_to_svg(json.loads(run.stdout), vl_version="5.20")
    assert "About " + name in svg
    assert "20.5" in svg
