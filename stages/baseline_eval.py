"""Stage `baseline_eval`: the base model under every protocol, and what it must at least beat.

Reads:  params.yaml (eval, infini), models/base, data/wikitext, data/longdocs
Writes: metrics/baseline_eval.json, plots/baseline_documents.tsv, plots/baseline_positions.tsv
"""

from pathlib import Path

from infini_retrofit.base import load_base
from infini_retrofit.evaluation import (
    EvalParams,
    TestText,
    check_fit,
    evaluate,
    rows_of_documents,
    rows_of_positions,
)
from infini_retrofit.imports import first_party_files
from infini_retrofit.infini_params import InfiniParams
from infini_retrofit.params import load_section
from infini_retrofit.perplexity import score_unigram
from infini_retrofit.pipeline import run_stage, unchanged
from infini_retrofit.report import write_metrics, write_rows
from infini_retrofit.runtime import start_run
from infini_retrofit.texts import read_documents, read_stream, read_titles

BASE = Path("models/base")
TRAIN_TEXT, TEST_TEXT = Path("data/wikitext/train.parquet"), Path("data/wikitext/test.parquet")
TEST_DOCUMENTS = Path("data/longdocs/test.parquet")
METRICS = Path("metrics/baseline_eval.json")
DOCUMENTS = Path("plots/baseline_documents.tsv")
POSITIONS = Path("plots/baseline_positions.tsv")


def main() -> None:
    """Run the stage."""
    params, infini = load_section(EvalParams, "eval"), load_section(InfiniParams, "infini")
    text = TestText(
        read_stream(TEST_TEXT, params.sliding_tokens),
        read_documents(TEST_DOCUMENTS, params.documents),
        read_titles(TEST_DOCUMENTS, params.documents),
    )
    device, dtype = start_run()
    model = load_base(BASE, dtype).to(device)
    check_fit(model, infini, text)
    unigram = score_unigram(read_stream(TRAIN_TEXT), text.stream, model.config.vocab_size)
    sections = {"eval": params, "infini": infini}
    with unchanged("baseline_eval", sections, first_party_files(Path(__file__))):
        base = evaluate(model, infini, params, text)
    write_metrics(METRICS, base.metrics | {"unigram_test_ppl": unigram.ppl})
    write_rows(DOCUMENTS, rows_of_documents("base", base, text.titles))
    write_rows(POSITIONS, rows_of_positions("base", base, infini.segment_length))


if __name__ == "__main__":
    run_stage(main)
