"""The page of `dvc plots show` draws without internet."""

import shutil
from pathlib import Path

from analysis import offline_plots
from tests.tiny_checkout import dvc
from tests.tiny_project import ROOT

CDN = "cdn.jsdelivr.net/npm/vega"
PLOT = "plots: [finetune.tsv: {template: curves, x: epoch, y: ppl, title: About curves}]\n"


def show() -> str:
    return Path(dvc("plots", "show").strip().removeprefix("file://")).read_text()


def test_the_page_loads_nothing_after_the_set_up(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / ".dvc" / "plots", ".dvc/plots")
    config = (ROOT / ".dvc" / "config").read_text().replace("[core]", "[core]\n    no_scm = true")
    Path(".dvc/config").write_text(config)
    Path("dvc.yaml").write_text(PLOT)
    Path("finetune.tsv").write_text(
        "epoch\tsplit\tloss\tppl\n1\tval\t0.6\t21.5\n2\tval\t0.4\t20.5\n"
    )
    page = show()
    assert CDN in page
    # Without internet and without the set-up, a reader is told what to run.
    assert "make plots" in page
    assert f"python -m {offline_plots.__name__}" in page
    offline_plots.main()
    page = show()
    assert CDN not in page
    assert "<script src" not in page
    assert "vegaEmbed" in page
    assert "About curves" in page
    assert "<DVC_METRIC" not in page
    assert "20.5" in page
