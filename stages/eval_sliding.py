"""Stage `eval_sliding`: base, control, distilled and finetuned under every protocol, side by side.

Reads:  params.yaml (eval, infini), models, data/wikitext, data/longdocs,
        metrics/baseline_eval.json, plots/baseline_documents.tsv, plots/baseline_positions.tsv
Writes: metrics/eval_sliding.json, plots/eval_sliding.tsv, plots/eval_documents.tsv,
        plots/eval_positions.tsv, plots/memory_share.tsv
"""

import csv
import json
from pathlib import Path
from typing import Any

from infini_retrofit.checkpoints import load_retrofit
from infini_retrofit.diagnostics import read_memory, share_histogram
from infini_retrofit.evaluation import (
    EvalParams,
    Evaluation,
    TestText,
    evaluate,
    rows_of_documents,
    rows_of_positions,
)
from infini_retrofit.gains import gains, gap_recovered, gap_test_nats
from infini_retrofit.imports import first_party_files
from infini_retrofit.infini_params import InfiniParams
from infini_retrofit.params import load_section
from infini_retrofit.pipeline import run_stage, unchanged
from infini_retrofit.report import verify_manifest, write_metrics, write_rows, write_text
from infini_retrofit.runtime import start_run
from infini_retrofit.texts import read_documents, read_stream, read_titles

BASE = Path("models/base")
RETROFITS = {name: Path("models") / name for name in ("control", "distilled", "finetuned")}
TEST_TEXT, TEST_DOCUMENTS = Path("data/wikitext/test.parquet"), Path("data/longdocs/test.parquet")
BASELINE = Path("metrics/baseline_eval.json")
BASE_DOCUMENTS = Path("plots/baseline_documents.tsv")
BASE_POSITIONS = Path("plots/baseline_positions.tsv")
METRICS, ROWS = Path("metrics/eval_sliding.json"), Path("plots/eval_sliding.tsv")
DOCUMENTS, POSITIONS = Path("plots/eval_documents.tsv"), Path("plots/eval_positions.tsv")
MEMORY_SHARE = Path("plots/memory_share.tsv")
# Where a segment's cold start shows, what full attention predicts at the same places, and what a
# memory has to beat there.
POSITION_PROTOCOLS = {
    "control": ("segment", "full", "segment_kv"),
    "finetuned": ("segment", "segment_off", "segment_recent", "segment_swapped", "segment_kv"),
}
HISTOGRAM_DOCUMENTS = 2  # of 30 layers, they hold 2 million pairs of a query and a head


def main() -> None:
    """Run the stage."""
    params, infini = load_section(EvalParams, "eval"), load_section(InfiniParams, "infini")
    text = TestText(
        read_stream(TEST_TEXT, params.sliding_tokens),
        read_documents(TEST_DOCUMENTS, params.documents),
        read_titles(TEST_DOCUMENTS, params.documents),
    )
    base = json.loads(read_baseline(BASELINE))
    documents, positions = (read_base_rows(path) for path in (BASE_DOCUMENTS, BASE_POSITIONS))
    for folder in RETROFITS.values():
        verify_manifest(folder)
    device, dtype = start_run()
    sections, length = {"eval": params, "infini": infini}, infini.segment_length
    with unchanged("eval_sliding", sections, first_party_files(Path(__file__))):
        found = {}
        for name, folder in RETROFITS.items():
            model = load_retrofit(BASE, folder, dtype)[0].to(device)
            if name == "finetuned":
                readings = read_memory(model, text.documents[:HISTOGRAM_DOCUMENTS], length)
            found[name] = evaluate(model, infini, params, text)
    metrics = {"base": base} | compare(found, text.titles)
    write_metrics(METRICS, metrics)
    write_rows(ROWS, [r for name, m in metrics.items() for r in rows_of_metrics(name, m)])
    for name, evaluation in found.items():
        documents += rows_of_documents(name, evaluation, text.titles)
        protocols = POSITION_PROTOCOLS.get(name, ())
        positions += rows_of_positions(name, evaluation, length, protocols)
    write_rows(DOCUMENTS, documents)
    write_rows(POSITIONS, positions)
    write_histogram(share_histogram(readings))


def compare(found: dict[str, Evaluation], titles: list[str]) -> dict[str, dict[str, float | int]]:
    """Return each model's metrics, those of retrofitted models with what their memory gains."""
    metrics = {name: dict(evaluation.metrics) for name, evaluation in found.items()}
    control = metrics["control"]
    control["gap_test_nats"] = gap_test_nats(control)
    for name in ("distilled", "finetuned"):
        if control["gap_test_nats"] > 0:
            metrics[name]["gap_recovered"] = gap_recovered(metrics[name], control)
        metrics[name] |= gains(found[name], found["control"], titles)
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


def read_baseline(path: Path) -> str:
    """Read what the base scored, which is measured already."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: run `dvc repro baseline_eval` to make it")
    return path.read_text(encoding="utf-8")


def read_base_rows(path: Path) -> list[dict[str, Any]]:
    """Read rows of the base's plots, values as text."""
    return list(csv.DictReader(read_baseline(path).splitlines(), delimiter="\t"))


if __name__ == "__main__":
    run_stage(main)
