"""Stage `eval_sliding`: base, control, distilled and finetuned under every protocol, side by side.

Reads:  params.yaml (eval, infini), models, data/wikitext, data/longdocs,
        metrics/baseline_eval.json
Writes: metrics/eval_sliding.json, plots/eval_sliding.tsv
"""

import json
from pathlib import Path

from infini_retrofit.attention import InfiniParams
from infini_retrofit.checkpoints import load_retrofit
from infini_retrofit.evaluation import (
    EvalParams,
    TestText,
    evaluate,
    gap_recovered,
    rows_of_metrics,
)
from infini_retrofit.imports import first_party_files
from infini_retrofit.params import load_section
from infini_retrofit.pipeline import run_stage, unchanged
from infini_retrofit.report import verify_manifest, write_metrics, write_rows
from infini_retrofit.runtime import start_run
from infini_retrofit.texts import read_documents, read_stream

BASE = Path("models/base")
RETROFITS = {name: Path("models") / name for name in ("control", "distilled", "finetuned")}
TEST_TEXT, TEST_DOCUMENTS = Path("data/wikitext/test.parquet"), Path("data/longdocs/test.parquet")
BASELINE = Path("metrics/baseline_eval.json")
METRICS, ROWS = Path("metrics/eval_sliding.json"), Path("plots/eval_sliding.tsv")


def main() -> None:
    """Run the stage."""
    params, infini = load_section(EvalParams, "eval"), load_section(InfiniParams, "infini")
    text = TestText(
        read_stream(TEST_TEXT, params.sliding_tokens),
        read_documents(TEST_DOCUMENTS, params.documents),
    )
    baseline = read_baseline()
    for folder in RETROFITS.values():
        verify_manifest(folder)
    device, dtype = start_run()
    sections = {"eval": params, "infini": infini}
    with unchanged("eval_sliding", sections, first_party_files(Path(__file__))):
        metrics = {"base": baseline}
        for name, folder in RETROFITS.items():
            model, _ = load_retrofit(BASE, folder, dtype)
            metrics[name] = evaluate(model.to(device), infini, params, text)
    for name in ("distilled", "finetuned"):
        metrics[name]["gap_recovered"] = gap_recovered(metrics[name], metrics["control"])
    write_metrics(METRICS, metrics)
    write_rows(ROWS, [r for name, m in metrics.items() for r in rows_of_metrics(name, m)])


def read_baseline() -> dict[str, float | int]:
    """Read the base's numbers, which are measured already."""
    if not BASELINE.is_file():
        raise FileNotFoundError(f"{BASELINE} is missing: run `dvc repro baseline_eval` to make it")
    return json.loads(BASELINE.read_text())


if __name__ == "__main__":
    run_stage(main)
