"""The templates of plots name columns that the stages write, and draw one revision or two."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import vl_convert
import yaml
from dvc_render.vega import VegaRenderer

from infini_retrofit.carrier import MemoryReading
from infini_retrofit.diagnostics import share_histogram
from infini_retrofit.evaluation import (
    MEMORY_PROTOCOLS,
    Evaluation,
    rows_of_documents,
    rows_of_positions,
)
from infini_retrofit.gains import gains
from infini_retrofit.history import memory_history
from infini_retrofit.offline_plots import VEGA_LITE
from stages.eval_sliding import POSITION_PROTOCOLS

ROOT = Path(__file__).parent.parent
TEMPLATES = ROOT / ".dvc" / "plots"
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
PLOTS = {
    path: options
    for stage in STAGES.values()
    for entry in stage.get("plots", [])
    for path, options in entry.items()
}
PROTOCOLS = ("full", "segment", "t2", *(f"segment_{p}" for p in (*MEMORY_PROTOCOLS, "kv")))
NUM_DOCUMENTS, SEGMENT, NUM_BINS = 3, 8, 20
TITLES = ["a", "b", "a"]
TRIED = {"documents", "positions", "memory_use", "memory_share"}
OFF_THE_PAGE = 9.0  # nats, of the doubly shifted score

Row = dict[str, Any]


def evaluation(seed: int) -> Evaluation:
    """Make scores of documents that differ from one another under every protocol."""
    generator = torch.Generator().manual_seed(seed)
    shape = (NUM_DOCUMENTS, 3 * SEGMENT - 1)
    nlls = {name: 3 + torch.rand(shape, generator=generator) for name in PROTOCOLS}
    nlls["t2"] += OFF_THE_PAGE
    return Evaluation({}, nlls)


MODELS = {
    name: evaluation(i) for i, name in enumerate(("base", "control", "distilled", "finetuned"))
}


def position_rows(*names: str) -> list[Row]:
    return [
        row
        for name in names
        for row in rows_of_positions(
            name, MODELS[name], SEGMENT, POSITION_PROTOCOLS.get(name, ("segment",))
        )
    ]


def memory_rows() -> list[Row]:
    shares = {"memory_share_mean": 0.11, "memory_share_p05": 0.01, "memory_share_p50": 0.1}
    used = shares | {"memory_share_p95": 0.3, "recalled_over_local": 0.5}
    used |= {"segment_val_ppl": 41.0, "segment_off_val_ppl": 42.0}
    logged = {f"eval_{name}": value for name, value in used.items()}
    return memory_history([{"epoch": e, "eval_val_loss": 1.0} | logged for e in (0, 1, 2)])


def share_rows() -> list[Row]:
    share = torch.linspace(0, 0.52, 60).reshape(1, 3, 4, 5)
    return share_histogram({i: MemoryReading(share, share, share) for i in (2, 10)}, NUM_BINS)


ROWS: dict[str, list[Row]] = {
    "plots/baseline_documents.tsv": rows_of_documents("base", MODELS["base"], TITLES),
    "plots/baseline_positions.tsv": position_rows("base"),
    "plots/distill_memory.tsv": memory_rows(),
    "plots/finetune_memory.tsv": memory_rows(),
    "plots/eval_documents.tsv": [
        row for name, e in MODELS.items() for row in rows_of_documents(name, e, TITLES)
    ],
    "plots/eval_positions.tsv": position_rows("base", "control", "finetuned"),
    "plots/memory_share.tsv": share_rows(),
}


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
    assert len(shown) == len(MODELS) * NUM_DOCUMENTS * (len(PROTOCOLS) - 1)
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
        expected = [
            gains(e, MODELS["control"], TITLES)[f"gain_over_{name}"] for e in MODELS.values()
        ]
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
        ("control", "finetuned"), key=lambda m: MODELS[m].of_documents("segment_kv").mean()
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
