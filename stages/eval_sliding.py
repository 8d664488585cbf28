"""Stage `eval_sliding`: score the retrofits under every protocol.

The metrics of base and control stand beside them. If distill.epochs is 0, only the finetuned is
scored; `analysis.zero_cost` then measures what insertion costs.

Reads:  params.yaml (eval, infini, distill.epochs), models, data/wikitext, data/longdocs,
        data/key_tokens.json, and of base and control metrics/*_eval.json,
        plots/*_documents.tsv, plots/*_positions.tsv, data/*_eval.manifest.json
Writes: metrics/eval_sliding.json, plots/eval_sliding.tsv, plots/eval_documents.tsv,
        plots/eval_positions.tsv, plots/memory_share.tsv, data/eval_sliding.manifest.json
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from infini_retrofit.evaluation.evaluation import Report, Row, evaluate, share_histogram
from infini_retrofit.evaluation.gains import gains, gap_recovered, gap_test_nats
from infini_retrofit.evaluation.key_tokens import read_key_tokens
from infini_retrofit.evaluation.protocols import EvalParams, Setting, read_val_documents
from infini_retrofit.evaluation.rival import rival_of
from infini_retrofit.layer.form import InfiniParams
from infini_retrofit.model.base import vocab_size
from infini_retrofit.model.checkpoints import load_retrofit
from infini_retrofit.pipeline.device import start_run
from infini_retrofit.pipeline.files import seal_results, verify_manifest, write_metrics, write_rows
from infini_retrofit.pipeline.guard import run_stage
from infini_retrofit.pipeline.params import load_section
from infini_retrofit.pipeline.tokens import read_test_text
from infini_retrofit.scoring.memory_use import run_and_read

BASE = Path("models/base")
DISTILLED, FINETUNED = Path("models/distilled"), Path("models/finetuned")
TEST_TEXT, KEY_TOKENS = Path("data/wikitext/test.parquet"), Path("data/key_tokens.json")
TEST_DOCUMENTS, VAL_DOCUMENTS = (Path(f"data/longdocs/{n}.parquet") for n in ("test", "val"))
METRICS, PERPLEXITIES = Path("metrics/eval_sliding.json"), Path("plots/eval_sliding.tsv")
DOCUMENTS, POSITIONS = Path("plots/eval_documents.tsv"), Path("plots/eval_positions.tsv")
MEMORY_SHARE = Path("plots/memory_share.tsv")
HISTOGRAM_DOCUMENTS = 2  # of 30 layers, they hold 2 million pairs of a query and a head


def main() -> str:
    """Run the stage and return what it made."""
    params, infini = load_section(EvalParams, "eval"), load_section(InfiniParams, "infini")
    epochs = load_section(int, "distill.epochs")
    num_ids = vocab_size(BASE)
    text = read_test_text(
        TEST_TEXT, TEST_DOCUMENTS, num_ids, params.sliding_tokens, params.documents
    )
    val_documents = read_val_documents(VAL_DOCUMENTS, num_ids, params)
    key_tokens = read_key_tokens(KEY_TOKENS, text.documents)
    reports = {"base": Report.read("baseline"), "control": Report.read("control")}
    retrofits = [DISTILLED, FINETUNED] if epochs else [FINETUNED]
    for folder in retrofits:
        verify_manifest(folder)
    device, dtype = start_run()
    for folder in retrofits:
        model = load_retrofit(BASE, folder, dtype)[0].to(device)
        rival = rival_of(model, infini)
        setting = Setting(params, text, rival, val_documents, key_tokens)
        reports[folder.name] = evaluate(folder.name, model, setting)
    # Of the finetuned, the last one.
    documents = text.documents[:HISTOGRAM_DOCUMENTS]
    _, readings = run_and_read(model, documents, infini.segment_length)
    add_gains([reports[folder.name] for folder in retrofits], reports["control"], text.sources)
    write_metrics(METRICS, {name: report.metrics for name, report in reports.items()})
    write_rows(PERPLEXITIES, perplexity_rows(reports))
    write_rows(DOCUMENTS, [row for report in reports.values() for row in report.documents])
    write_rows(POSITIONS, [row for report in reports.values() for row in report.positions])
    columns = ("layer", "memory_share", "share_of_pairs")
    write_rows(MEMORY_SHARE, share_histogram(readings), columns)
    seal_results("eval_sliding", [METRICS, PERPLEXITIES, DOCUMENTS, POSITIONS, MEMORY_SHARE])
    made = "; ".join(f"{folder.name} {reports[folder.name]}" for folder in retrofits)
    return f"eval_sliding: {made}"


def add_gains(retrofits: Sequence[Report], control: Report, sources: Sequence[str]) -> None:
    """Add the gains of its memory to each retrofit's metrics; warn where there is no gap."""
    has_gap = gap_test_nats(control.metrics) > 0
    for report in retrofits:
        report.metrics.update(gains(report.document_nlls(), control.document_nlls(), sources))
        if has_gap:
            report.metrics["gap_recovered"] = gap_recovered(report.metrics, control.metrics)
    if not has_gap:
        print(
            f"warning: gap_recovered is left out: the control scores "
            f"{control.metrics['segment_test_nll']:.4f} nats a token in segments and "
            f"{control.metrics['full_test_nll']:.4f} under full attention, so there is no gap; "
            "documents are probably longer than what the model was trained on",
            file=sys.stderr,
        )


def perplexity_rows(reports: dict[str, Report]) -> list[Row]:
    """Return the perplexities among the models' metrics as rows of a plot."""
    suffix = "_test_ppl"
    return [
        {"model": name, "protocol": key.removesuffix(suffix), "ppl": value}
        for name, report in reports.items()
        for key, value in report.metrics.items()
        if key.endswith(suffix)
    ]


if __name__ == "__main__":
    run_stage(main)
