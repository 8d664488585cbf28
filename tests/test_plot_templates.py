"""Every plot of dvc.yaml draws all that its file holds, and its page needs no internet."""

import csv
import json
import re
import shutil
from pathlib import Path

import pytest
import vl_convert
import yaml
from dvc_render.vega import VegaRenderer

from analysis import offline_plots
from analysis.offline_plots import VEGA_LITE
from tests.tiny_checkout import dvc
from tests.tiny_project import ROOT

TEMPLATES = ROOT / ".dvc" / "plots"
ENTRIES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["plots"]
PLOTS = {path: options for entry in ENTRIES for path, options in entry.items()}
LINES = {path: (ROOT / path).read_text().splitlines() for path in PLOTS}
COLUMNS = {path: lines[0].split("\t") for path, lines in LINES.items()}
ROWS = {path: list(csv.DictReader(lines, delimiter="\t")) for path, lines in LINES.items()}
METRICS = json.loads((ROOT / "metrics" / "eval_sliding.json").read_text())
# Columns whose values a reader tells apart. Each of their combinations is a kind of rows.
KINDS = ("model", "protocol", "split", "quantity", "layer")
GAINS = {
    "gain_over_off": "over memory off",
    "gain_over_recent": "over memory of one segment",
    "gain_over_swapped": "over memory swapped",
    "gain_over_control": "over the control",
    "gain_over_kv": "over the same bytes of KV",
}
# Templates that leave out scores off the scale, and scores equal to `segment` by construction.
HIDING = ("documents", "ppl_by_protocol")


def is_hidden(kind: tuple[str, ...]) -> bool:
    """Return whether rows hold the doubly shifted score, or that of a memory that is not there."""
    has_no_memory = kind[:1] in [("base",), ("control",)]
    needs_memory = kind[1:] in [("segment_off",), ("segment_recent",), ("segment_swapped",)]
    return not {"t2", "unigram"}.isdisjoint(kind) or (has_no_memory and needs_memory)


def draw(path: str, rows: list[dict[str, str]], *revisions: str) -> str:
    options = PLOTS[path] | {"template_dir": str(TEMPLATES)}
    spec = VegaRenderer([dict.fromkeys(COLUMNS[path], "")], path, **options).get_filled_template()
    assert "<DVC_METRIC" not in json.dumps(spec)
    spec["data"]["values"] = [row | {"rev": rev} for rev in revisions for row in rows]
    return vl_convert.vegalite_to_svg(spec, vl_version=VEGA_LITE)


def marks(svg: str) -> list[dict[str, str]]:
    """Return what the drawing tells a screen reader of each mark."""
    labels = re.findall(r'aria-label="([^"]*)" role="graphics-symbol"', svg)
    return [dict(re.findall(r"([^;]+): ([^;]*)(?:; |$)", label)) for label in labels]


def kind_of(row: dict[str, str]) -> tuple[str, ...]:
    return tuple(row[name] for name in KINDS if name in row)


@pytest.mark.parametrize("path", [path for path in PLOTS if ROWS[path]])
def test_a_plot_draws_every_kind_of_its_rows_and_names_the_revisions(path):
    svg = draw(path, ROWS[path], "v1", "v2")
    for text in (PLOTS[path]["title"], "v1", "v2"):
        assert f">{text}</text>" in svg
    drawn = len(marks(draw(path, ROWS[path], "v1")))
    assert len(marks(svg)) > drawn
    for kind in {kind_of(row) for row in ROWS[path]}:
        others = [row for row in ROWS[path] if kind_of(row) != kind]
        is_shown = not is_hidden(kind) or PLOTS[path]["template"] not in HIDING
        assert (len(marks(draw(path, others, "v1"))) < drawn) == is_shown, kind


def shifted(path: str, by: float) -> list[dict[str, str]]:
    """Return a file's rows, with another loss of the finetuned model under `segment`."""
    line = ("finetuned", "segment")
    rows = ROWS[path]
    return [r | {"nll": str(float(r["nll"]) + by * (kind_of(r) == line))} for r in rows]


@pytest.mark.parametrize("by", [0.0, 0.5])
def test_the_gains_drawn_are_those_of_the_metrics(by):
    path = "plots/eval_documents.tsv"
    means = [m for m in marks(draw(path, shifted(path, by), "v1")) if "over" in m and "rev" in m]
    for name in GAINS.keys() & METRICS["finetuned"]:
        drawn = [m["nats a token gained"] for m in means if m["over"] == GAINS[name]]
        drawn = [float(text.replace("\N{MINUS SIGN}", "-")) for text in drawn]
        assert any(abs(d - METRICS["finetuned"][name]) < 6e-4 for d in drawn) == (not by), name


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
