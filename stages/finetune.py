"""Stage `finetune`: train the distilled model on documents.

Reads:  params.yaml (finetune), models/base, models/distilled, data/longdocs
Writes: models/finetuned, metrics/finetune.json, plots/finetune.tsv, plots/finetune_memory.tsv,
        data/finetune.manifest.json
"""

from pathlib import Path

import torch

from infini_retrofit.model.base import load_base, vocab_size
from infini_retrofit.model.checkpoints import load_retrofit, save_retrofit
from infini_retrofit.pipeline.device import start_run
from infini_retrofit.pipeline.files import seal_results, write_metrics
from infini_retrofit.pipeline.guard import is_first_process, run_stage, training_run
from infini_retrofit.pipeline.params import load_section
from infini_retrofit.pipeline.tokens import read_documents
from infini_retrofit.training.finetuning import FinetuneParams, finetuning_parts
from infini_retrofit.training.loop import outcome, train

BASE, DISTILLED, FINETUNED = (Path("models") / n for n in ("base", "distilled", "finetuned"))
DOCUMENTS = Path("data/longdocs")
METRICS = Path("metrics/finetune.json")
HISTORY, MEMORY = Path("plots/finetune.tsv"), Path("plots/finetune_memory.tsv")


def main() -> str:
    """Run the stage and return what it made."""
    params = load_section(FinetuneParams, "finetune")
    num_ids = vocab_size(BASE)
    train_documents = read_documents(DOCUMENTS / "train.parquet", num_ids, params.train_documents)
    val_documents = read_documents(DOCUMENTS / "val.parquet", num_ids, params.val_documents)
    device, dtype = start_run()
    with training_run("finetune") as folder:
        model, infini = load_retrofit(BASE, DISTILLED, torch.float32, "dvc repro distill")
        base = load_base(BASE, dtype).to(device) if params.kl_weight else None
        parts = finetuning_parts(model.to(device), infini, params, train_documents, dtype, base)
        metrics = train(parts, val_documents, params, folder, HISTORY, MEMORY)
        if is_first_process():
            save_retrofit(model, infini, BASE, FINETUNED)
            write_metrics(METRICS, metrics)
            seal_results("finetune", [METRICS, HISTORY, MEMORY])
    return f"finetune: {outcome(metrics)}"


if __name__ == "__main__":
    run_stage(main)
