"""Stage `baseline_eval`: score the base under every protocol.

Reads:  params.yaml (eval), data/rival.json, models/base, data/wikitext, data/longdocs
Writes: metrics/baseline_eval.json, plots/baseline_documents.tsv, plots/baseline_positions.tsv,
        data/key_tokens.json, data/baseline_eval.manifest.json
"""

import sys
from pathlib import Path

from infini_retrofit.evaluation.evaluation import evaluate
from infini_retrofit.evaluation.protocols import (
    EvalParams,
    Setting,
    read_val_documents,
    score_unigram,
)
from infini_retrofit.evaluation.rival import Rival
from infini_retrofit.model.base import load_base, vocab_size
from infini_retrofit.pipeline.device import start_run
from infini_retrofit.pipeline.files import read_sealed, write_sealed
from infini_retrofit.pipeline.guard import run_stage
from infini_retrofit.pipeline.params import load_section
from infini_retrofit.pipeline.tokens import read_stream, read_test_text

BASE, RIVAL = Path("models/base"), Path("data/rival.json")
TRAIN_TEXT, TEST_TEXT = Path("data/wikitext/train.parquet"), Path("data/wikitext/test.parquet")
TEST_DOCUMENTS, VAL_DOCUMENTS = (Path(f"data/longdocs/{n}.parquet") for n in ("test", "val"))
KEY_TOKENS = Path("data/key_tokens.json")


def main() -> str:
    """Run the stage and return what it made."""
    params = load_section(EvalParams, "eval")
    rival = read_sealed(RIVAL, Rival, "dvc repro prepare_comparison")
    num_ids = vocab_size(BASE)
    text = read_test_text(
        TEST_TEXT, TEST_DOCUMENTS, num_ids, params.sliding_tokens, params.documents
    )
    val_documents = read_val_documents(VAL_DOCUMENTS, num_ids, params)
    device, dtype = start_run()
    model = load_base(BASE, dtype).to(device)
    num_positions, num_tokens = model.config.max_position_embeddings, text.documents.shape[1]
    if num_tokens > num_positions:
        print(
            f"warning: documents of {num_tokens} tokens exceed the {num_positions} positions that "
            "the base was trained on: full_test_ppl and gap_recovered extrapolate",
            file=sys.stderr,
        )
    unigram = score_unigram(read_stream(TRAIN_TEXT, num_ids), text.stream, num_ids)
    base = evaluate("base", model, Setting(params, text, rival, val_documents))
    base.metrics["unigram_test_ppl"] = unigram.ppl
    base.write("baseline")
    write_sealed(KEY_TOKENS, base.key_tokens)
    return f"baseline_eval: base {base}"


if __name__ == "__main__":
    run_stage(main)
