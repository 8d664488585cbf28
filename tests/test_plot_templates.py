"""The templates of plots name columns that the stages write, and draw one revision or two."""

import json
import re
from itertools import pairwise
from pathlib import Path

import pytest
import vl_convert
import yaml
from dvc_render.vega import VegaRenderer

from infini_retrofit.evaluation.evaluation import MEMORY_PROTOCOLS, PROTOCOLS
from infini_retrofit.evaluation.gains import gains
from infini_retrofit.share.offline_plots import VEGA_LITE
from tests.tiny_plots import MODELS, NUM_BINS, NUM_DOCUMENTS, ROWS, TITLES, Row

ROOT = Path(__file__).parent.parent
TEMPLATES = ROOT / ".dvc" / "plots"
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
PLOTS = {
    path: options
    for stage in STAGES.values()
    for entry in stage.get("plots", [])
    for path, options in entry.items()
}
TRIED = {"documents", "positions", "memory_use", "memory_share", "ppl_by_protocol"}
# A label drawn: where it begins, whether it is turned, its size, what it says.
_PLACE, _SIZE = r'"translate\(([\d.]+),[^)]*\)( rotate\(270\))?[^>]*', r'size="(\d+)px"[^>]*'
LABEL = f'="text mark"[^>]*{_PLACE}{_SIZE}>([^<]*)<'


def filled(path: str, *revisions: str) -> Row:
    """Fill a plot's template as DVC does, which reads every cell as text."""
    options = PLOTS[path] | {"template_dir": str(TEMPLATES)}
    rows = [
        {k: str(v) for k, v in row.items()} | {"rev": r} for r in revisions for row in ROWS[path]
    ]
    return VegaRenderer(rows, path, **options).get_filled_template()


def draw(spec: Row) -> str:
    return vl_convert.vegalite_to_svg(spec, vl_version=VEGA_LITE)


def marks(svg: str, **wanted: str) -> list[dict[str, str]]:
    """Return what the drawing tells screen readers of each mark, where it says all of `wanted`."""
    labels = re.findall(r'aria-label="([^"]*)" role="graphics-symbol"', svg)
    said = [dict(re.findall(r"([^;]+): ([^;]*)(?:; |$)", label)) for label in labels]
    return [mark for mark in said if mark.items() >= wanted.items()]


def number(text: str) -> float:
    return float(text.replace("\N{MINUS SIGN}", "-"))


def columns(template: str) -> set[str]:
    """Return the columns that a template expects, those that it computes itself left out."""
    made = set(re.findall(r'"as": "(\w+)"', template))
    made |= set(re.findall(r'"as": \["(\w+)"\]', template))
    named = set(re.findall(r"datum\['(\w+)'\]", template))
    named |= set(re.findall(r"datum\.(?!value\b)(\w+)", template))
    named |= set(re.findall(r'"field": "(\w+)"', template))
    for names in re.findall(r'"(?:groupby|flatten)": \[([^\]]*)\]', template):
        named |= set(re.findall(r'"(\w+)"', names))
    return named - made - {"rev"}


def unknown_columns(path: str, template: str) -> set[str]:
    """Return what a plot asks for and the rows do not have."""
    return (columns(template) | {PLOTS[path]["x"], PLOTS[path]["y"]}) - ROWS[path][0].keys()


def test_every_plot_of_these_templates_is_tried():
    assert {p for p, options in PLOTS.items() if options["template"] in TRIED} == ROWS.keys()


@pytest.mark.parametrize("path", ROWS)
def test_a_template_names_only_columns_that_the_stage_writes(path):
    text = (TEMPLATES / f"{PLOTS[path]['template']}.json").read_text()
    assert json.loads(text)["data"] == {"values": "<DVC_METRIC_DATA>"}
    assert unknown_columns(path, text) == set()
    assert unknown_columns(path, text.replace('"field": "rev"', '"field": "revision"')) == {
        "revision"
    }


@pytest.mark.parametrize("path", ["plots/baseline_documents.tsv", "plots/eval_positions.tsv"])
def test_a_column_under_another_name_is_noticed(path):
    text = (TEMPLATES / f"{PLOTS[path]['template']}.json").read_text()
    assert unknown_columns(path, text.replace("datum['model']", "datum['name']")) == {"name"}


@pytest.mark.parametrize("path", ROWS)
def test_it_draws_two_revisions_and_names_both(path):
    spec = filled(path, "v1", "v2")
    assert "<DVC_METRIC" not in json.dumps(spec)
    svg = draw(spec)
    for text in (PLOTS[path]["title"], "v1", "v2"):
        assert f">{text}</text>" in svg


@pytest.mark.parametrize("path", ["plots/finetune_memory.tsv", "plots/memory_share.tsv"])
def test_a_file_of_column_names_alone_draws_no_mark(path):
    spec = filled(path, "v1")
    assert marks(draw(spec))
    spec["data"]["values"] = []
    svg = draw(spec)
    assert PLOTS[path]["title"] in svg
    assert not marks(svg)


def test_documents_show_each_protocol_but_the_one_off_scale():
    svg = draw(filled("plots/eval_documents.tsv", "v1"))
    shown = [m for m in marks(svg) if "document" in m]
    assert {m["protocol"] for m in shown} == set(PROTOCOLS) - {"t2"}
    num_protocols = sum(len(e.nlls) - 1 for e in MODELS.values())
    assert len(shown) == NUM_DOCUMENTS * num_protocols
    assert all(abs(number(m["nats a token above full attention"])) < 2 for m in shown)


def test_the_gains_drawn_are_those_of_the_metrics():
    svg = draw(filled("plots/eval_documents.tsv", "v1"))
    drawn = [m for m in marks(svg, rev="v1") if "over" in m and "revision" not in m]
    labels = {
        "over memory off": "off",
        "over memory of one segment": "recent",
        "over memory swapped": "swapped",
        "over the control": "control",
        "over the same bytes of KV": "kv",
    }
    means = {name: [] for name in labels.values()}
    for mark in drawn:
        means[labels[mark["over"]]].append(number(mark["nats a token gained"]))
    for name in labels.values():
        control = MODELS["control"].of_documents()
        found = [gains(e.of_documents(), control, TITLES) for e in MODELS.values()]
        key = f"gain_over_{name}"
        expected = [gain[key] for gain in found if key in gain]
        assert means[name] == pytest.approx(expected, abs=6e-4)


def test_a_base_alone_is_measured_against_its_own_full_attention():
    svg = draw(filled("plots/baseline_documents.tsv", "v1"))
    own = [m for m in marks(svg, protocol="full") if "document" in m]
    assert [number(m["nats a token above full attention"]) for m in own] == [0] * NUM_DOCUMENTS
    assert not marks(svg, over="over the control")


def test_positions_show_what_finetuned_gains_over_each_rival_where_it_is_one():
    gained = "nats a token that finetuned gains over each rival"
    svg = draw(filled("plots/eval_positions.tsv", "v1"))
    assert gained in svg
    assert gained not in draw(filled("plots/baseline_positions.tsv", "v1"))
    shown = [m for m in marks(svg) if "shown" in m]
    drawn = {(m["model"], m["protocol"]): [] for m in shown}
    for mark in shown:
        drawn[mark["model"], mark["protocol"]].append(number(mark["shown"]))
    nlls = {(r["model"], r["protocol"]): [] for r in ROWS["plots/eval_positions.tsv"]}
    for row in ROWS["plots/eval_positions.tsv"]:
        nlls[row["model"], row["protocol"]].append(row["nll"])
    better_kv = min(
        ("control", "finetuned"), key=lambda m: MODELS[m].of_documents()["segment_kv"].mean()
    )
    rivals = {("finetuned", f"segment_{name}") for name in MEMORY_PROTOCOLS}
    rivals |= {("control", "segment"), (better_kv, "segment_kv")}
    assert drawn.keys() == nlls.keys()
    for line, values in nlls.items():
        own = nlls["finetuned", "segment"]
        gains_of_line = [v - o for v, o in zip(values, own, strict=True)] if line in rivals else []
        gains_drawn = {value for value in drawn[line] if abs(value) < 2}
        assert sorted(gains_drawn) == pytest.approx(sorted(gains_of_line), abs=6e-3), line


def test_each_quantity_of_the_memory_s_use_has_its_own_scale():
    svg = draw(filled("plots/finetune_memory.tsv", "v1"))
    panels = ("share of the memory (a query and a head)", "norm of recalled / of local attention")
    for panel in (*panels, "validation perplexity"):
        assert svg.count(f">{panel}</text>") == 1
    statistics = {"mean", "p05", "p50", "p95", "segment", "segment_off"}
    assert {m["statistic or protocol"] for m in marks(svg)} == statistics


def test_the_heat_map_has_a_cell_for_every_bin_that_is_not_empty():
    svg = draw(filled("plots/memory_share.tsv", "v1"))
    share = "share of the layer's pairs of a query and a head (log)"
    cells = [m for m in marks(svg) if share in m]
    filled_bins = [r for r in ROWS["plots/memory_share.tsv"] if r["share_of_pairs"] > 0]
    assert 0 < len(cells) == len(filled_bins) < 2 * NUM_BINS
    # Layers sort as numbers, not as the text that DVC reads them as.
    assert [m["layer"] for m in cells] == ["2"] * (len(cells) // 2) + ["10"] * (len(cells) // 2)
    assert svg.index(">2</text>") < svg.index(">10</text>")


def num_overlaps(spec: Row) -> int:
    """Count labels that reach into the next one's place, a letter being half as wide as high."""
    labels = sorted(
        (float(x), int(size) * (1 if turned else len(text) / 2))
        for x, turned, size, text in re.findall(LABEL, draw(spec))
    )
    assert len(labels) == len(ROWS["plots/eval_sliding.tsv"])
    return sum(x + width > right for (x, width), (right, _) in pairwise(labels))


def test_numbers_over_bars_side_by_side_do_not_overlap():
    spec = filled("plots/eval_sliding.tsv", "v1")
    assert num_overlaps(spec) == 0
    spec["spec"]["layer"][1]["mark"]["angle"] = 0
    assert num_overlaps(spec) > 0
