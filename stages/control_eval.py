"""Stage `control_eval`: score the control under every protocol.

Reads:  params.yaml (eval), data/rival.json, data/key_tokens.json, models/base, models/control,
        data/wikitext, data/longdocs
Writes: metrics/control_eval.json, plots/control_documents.tsv, plots/control_positions.tsv,
        data/control_eval.manifest.json
"""

from pathlib import Path

from infini_retrofit.evaluation.evaluation import evaluate
from infini_retrofit.evaluation.gains import gap_test_nats
from infini_retrofit.evaluation.key_tokens import read_key_tokens
from infini_retrofit.evaluation.protocols import EvalParams, Setting, read_val_documents
from infini_retrofit.evaluation.rival import Rival
from infini_retrofit.model.base import vocab_size
from infini_retrofit.model.checkpoints import load_retrofit
from infini_retrofit.pipeline.device import start_run
from infini_retrofit.pipeline.files import read_sealed
from infini_retrofit.pipeline.guard import run_stage
from infini_retrofit.pipeline.params import load_section
from infini_retrofit.pipeline.tokens import read_test_text

BASE, CONTROL = Path("models/base"), Path("models/control")
RIVAL = Path("data/rival.json")
TEST_TEXT, KEY_TOKENS = Path("data/wikitext/test.parquet"), Path("data/key_tokens.json")
TEST_DOCUMENTS, VAL_DOCUMENTS = (Path(f"data/longdocs/{n}.parquet") for n in ("test", "val"))


def main() -> str:
    """Run the stage and return what it made."""
    params = load_section(EvalParams, "eval")
    rival = read_sealed(RIVAL, Rival, "dvc repro prepare_comparison")
    num_ids = vocab_size(BASE)
    text = read_test_text(
        TEST_TEXT, TEST_DOCUMENTS, num_ids, params.sliding_tokens, params.documents
    )
    val_documents = read_val_documents(VAL_DOCUMENTS, num_ids, params)
    key_tokens = read_key_tokens(KEY_TOKENS, text.documents)
    device, dtype = start_run()
    model, _ = load_retrofit(BASE, CONTROL, dtype, "dvc repro finetune_control")
    setting = Setting(params, text, rival, val_documents, key_tokens)
    control = evaluate("control", model.to(device), setting)
    control.metrics["gap_test_nats"] = gap_test_nats(control.metrics)
    control.write("control")
    return f"control_eval: control {control}"


if __name__ == "__main__":
    run_stage(main)
