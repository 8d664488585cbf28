"""Stage `eval_sliding`: score the retrofits under every protocol.

The metrics of base and control stand beside them. If distill.epochs is 0, only the finetuned is
scored; `analysis.zero_cost` then measures what insertion costs.

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
from infini_retrofit.pipeline.files import check_made, verify_manifest, write_metrics, write_rows
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
# The distilled shows what insertion costs. Its memory has not yet learned on documents.
PROTOCOLS_OF = {DISTILLED: ("full", "t2", "segment", "segment_off"), FINETUNED: PROTOCOLS}
# They show a segment's cold start, and what a memory has to beat there.
POSITION_PROTOCOLS = ("segment", "segment_off", "segment_recent", "segment_swapped", "segment_kv")
HISTOGRAM_DOCUMENTS = 2  # of 30 layers, they hold 2 million pairs of a query and a head


class Scored(NamedTuple):
    """The results of another stage for its model."""

    metrics: dict[str, float | int]
    documents: list[dict[str, Any]]
    positions: list[dict[str, Any]]


def main() -> None:
    """Run the stage."""
    params, infini = load_section(EvalParams, "eval"), load_section(InfiniParams, "infini")
    epochs = load_section(int, "distill.epochs")
    text = read_test_text(TEST_TEXT, TEST_DOCUMENTS, params.sliding_tokens, params.documents)
    base, control = read_scored("baseline"), read_scored("control")
    retrofits = [DISTILLED, FINETUNED] if epochs else [FINETUNED]
    for folder in retrofits:
        verify_manifest(folder)
    device, dtype = start_run()
    sections = {"eval": params, "infini": infini, "distill.epochs": epochs}
    length, scored = infini.segment_length, {}
    with unchanged("eval_sliding", sections, stage_code("eval_sliding")):
        for folder in retrofits:
            model = load_retrofit(BASE, folder, dtype)[0].to(device)
            if folder == FINETUNED:  # before `evaluate`, which changes the model
                readings = read_memory(model, text.documents[:HISTOGRAM_DOCUMENTS], length)
            rival, protocols = rival_of(model, infini), PROTOCOLS_OF[folder]
            scored[folder.name] = evaluate(model, rival, params, text, protocols)
    metrics = {"base": base.metrics, "control": control.metrics}
    metrics |= add_gains(scored, control, text.titles)
    write_metrics(METRICS, metrics)
    write_rows(ROWS, [row for name, found in metrics.items() for row in rows_of_ppl(name, found)])
    documents = [r for name, e in scored.items() for r in rows_of_documents(name, e, text.titles)]
    write_rows(DOCUMENTS, base.documents + control.documents + documents)
    positions = rows_of_positions("finetuned", scored["finetuned"], length, POSITION_PROTOCOLS)
    write_rows(POSITIONS, base.positions + control.positions + positions)
    columns = ("layer", "memory_share", "share_of_pairs")
    write_rows(MEMORY_SHARE, share_histogram(readings), columns)


def add_gains(
    scored: dict[str, Evaluation], control: Scored, titles: list[str]
) -> dict[str, dict[str, float | int]]:
    """Return each model's metrics with the gains of its memory."""
    metrics, nlls = {}, read_document_rows(control.documents)
    control_has_gap = has_gap(control.metrics)
    for name, evaluation in scored.items():
        metrics[name] = evaluation.metrics | gains(evaluation.of_documents(), nlls, titles)
        if control_has_gap:
            metrics[name]["gap_recovered"] = gap_recovered(metrics[name], control.metrics)
    return metrics


def rows_of_ppl(name: str, metrics: dict[str, float | int]) -> list[dict[str, float | str]]:
    """Return the perplexities among a model's metrics as rows of a plot."""
    suffix = "_test_ppl"
    return [
        {"model": name, "protocol": key.removesuffix(suffix), "ppl": value}
        for key, value in metrics.items()
        if key.endswith(suffix)
    ]


def read_scored(name: str) -> Scored:
    """Read the results of the stage `<name>_eval`."""
    plots = [Path(f"plots/{name}_{kind}.tsv") for kind in ("documents", "positions")]
    texts = []
    for path in (Path(f"metrics/{name}_eval.json"), *plots):
        check_made(path, f"dvc repro {name}_eval")
        texts.append(path.read_text(encoding="utf-8"))
    metrics, *tables = texts
    rows = (list(csv.DictReader(table.splitlines(), delimiter="\t")) for table in tables)
    return Scored(json.loads(metrics), *rows)


if __name__ == "__main__":
    run_stage(main)
