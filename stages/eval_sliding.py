"""Stage `eval_sliding`: distilled and finetuned under every protocol, beside base and control.

Where nothing was distilled, the finetuned alone: `analysis.zero_cost` says what inserting cost.

Reads:  params.yaml (eval, infini, distill.epochs), models, data/wikitext, data/longdocs, and of
        base and control metrics/*_eval.json, plots/*_documents.tsv, plots/*_positions.tsv
Writes: metrics/eval_sliding.json, plots/eval_sliding.tsv, plots/eval_documents.tsv,
        plots/eval_positions.tsv, plots/memory_share.tsv
"""

import csv
import json
from pathlib import Path
from typing import Any, NamedTuple

from infini_retrofit.evaluation.evaluation import (
    PROTOCOLS,
    EvalParams,
    Evaluation,
    evaluate,
    read_document_rows,
    rows_of_documents,
    rows_of_positions,
)
from infini_retrofit.evaluation.gains import gains, gap_recovered, has_gap
from infini_retrofit.evaluation.protocols import share_histogram
from infini_retrofit.evaluation.rival import rival_of
from infini_retrofit.layer.form import InfiniParams
from infini_retrofit.model.checkpoints import load_retrofit
from infini_retrofit.pipeline.device import start_run
from infini_retrofit.pipeline.files import (
    check_made,
    verify_manifest,
    write_metrics,
    write_rows,
    write_text,
)
from infini_retrofit.pipeline.guard import run_stage, stage_code, unchanged
from infini_retrofit.pipeline.params import load_section
from infini_retrofit.pipeline.tokens import read_test_text
from infini_retrofit.scoring.memory_use import read_memory

BASE = Path("models/base")
DISTILLED, FINETUNED = Path("models/distilled"), Path("models/finetuned")
TEST_TEXT, TEST_DOCUMENTS = Path("data/wikitext/test.parquet"), Path("data/longdocs/test.parquet")
METRICS, ROWS = Path("metrics/eval_sliding.json"), Path("plots/eval_sliding.tsv")
DOCUMENTS, POSITIONS = Path("plots/eval_documents.tsv"), Path("plots/eval_positions.tsv")
MEMORY_SHARE = Path("plots/memory_share.tsv")
# Of the distilled model, what inserting cost; whose content a memory holds is asked when it has
# learned on documents.
DISTILLED_PROTOCOLS = ("full", "t2", "segment", "segment_off")
# Where a segment's cold start shows, and what a memory has to beat there.
POSITION_PROTOCOLS = ("segment", "segment_off", "segment_recent", "segment_swapped", "segment_kv")
HISTOGRAM_DOCUMENTS = 2  # of 30 layers, they hold 2 million pairs of a query and a head


class Scored(NamedTuple):
    """What another stage has found out about a model."""

    metrics: dict[str, float | int]
    documents: list[dict[str, Any]]
    positions: list[dict[str, Any]]


def main() -> None:
    """Run the stage."""
    params, infini = load_section(EvalParams, "eval"), load_section(InfiniParams, "infini")
    text = read_test_text(TEST_TEXT, TEST_DOCUMENTS, params.sliding_tokens, params.documents)
    base, control = read_scored("baseline"), read_scored("control")
    epochs = load_section(int, "distill.epochs")
    retrofits = [DISTILLED, FINETUNED] if epochs else [FINETUNED]
    for folder in retrofits:
        verify_manifest(folder)
    device, dtype = start_run()
    sections = {"eval": params, "infini": infini, "distill.epochs": epochs}
    length = infini.segment_length
    with unchanged("eval_sliding", sections, stage_code("eval_sliding")):
        found = {}
        for folder in retrofits:
            model = load_retrofit(BASE, folder, dtype)[0].to(device)
            if folder == FINETUNED:
                readings = read_memory(model, text.documents[:HISTOGRAM_DOCUMENTS], length)
            protocols = DISTILLED_PROTOCOLS if folder == DISTILLED else PROTOCOLS
            found[folder.name] = evaluate(model, rival_of(model, infini), params, text, protocols)
    metrics = {"base": base.metrics, "control": control.metrics}
    metrics |= compare(found, control, text.titles)
    write_metrics(METRICS, metrics)
    write_rows(ROWS, [r for name, m in metrics.items() for r in rows_of_metrics(name, m)])
    documents = [r for name, e in found.items() for r in rows_of_documents(name, e, text.titles)]
    write_rows(DOCUMENTS, base.documents + control.documents + documents)
    positions = rows_of_positions("finetuned", found["finetuned"], length, POSITION_PROTOCOLS)
    write_rows(POSITIONS, base.positions + control.positions + positions)
    write_histogram(share_histogram(readings))


def compare(
    found: dict[str, Evaluation], control: Scored, titles: list[str]
) -> dict[str, dict[str, float | int]]:
    """Return each model's metrics with what its memory gains."""
    metrics, nlls = {}, read_document_rows(control.documents)
    gap_is_there = has_gap(control.metrics)
    for name, evaluation in found.items():
        metrics[name] = evaluation.metrics | gains(evaluation.of_documents(), nlls, titles)
        if gap_is_there:
            metrics[name]["gap_recovered"] = gap_recovered(metrics[name], control.metrics)
    return metrics


def rows_of_metrics(name: str, metrics: dict[str, float | int]) -> list[dict[str, float | str]]:
    """Turn one model's metrics into rows of a plot: model, protocol, ppl."""
    suffix = "_test_ppl"
    return [
        {"model": name, "protocol": key.removesuffix(suffix), "ppl": value}
        for key, value in metrics.items()
        if key.endswith(suffix)
    ]


def write_histogram(rows: list[dict[str, int | float]]) -> None:
    """Write shares of the memory; the columns' names alone for a model without one."""
    if rows:
        write_rows(MEMORY_SHARE, rows)
    else:
        write_text(MEMORY_SHARE, "layer\tmemory_share\tshare_of_pairs\n")


def read_scored(name: str) -> Scored:
    """Read what the stage `<name>_eval` found."""
    metrics, documents, positions = (
        read(Path(file), f"dvc repro {name}_eval")
        for file in (
            f"metrics/{name}_eval.json",
            f"plots/{name}_documents.tsv",
            f"plots/{name}_positions.tsv",
        )
    )
    return Scored(json.loads(metrics), rows_in(documents), rows_in(positions))


def read(path: Path, made_by: str) -> str:
    """Read a file that another stage wrote."""
    check_made(path, made_by)
    return path.read_text(encoding="utf-8")


def rows_in(text: str) -> list[dict[str, str]]:
    """Return the rows of tab-separated values."""
    return list(csv.DictReader(text.splitlines(), delimiter="\t"))


if __name__ == "__main__":
    run_stage(main)
