"""Stage `finetune_control`: train the base without a memory.

Reads:  data/control.json, models/base, data/longdocs
Writes: models/control, metrics/finetune_control.json, plots/finetune_control.tsv,
        data/finetune_control.manifest.json
"""

from pathlib import Path

import torch

from infini_retrofit.model.base import load_base, vocab_size
from infini_retrofit.model.checkpoints import save_retrofit
from infini_retrofit.pipeline.device import start_run
from infini_retrofit.pipeline.files import read_sealed, seal_results, write_metrics
from infini_retrofit.pipeline.guard import is_first_process, run_stage, training_run
from infini_retrofit.pipeline.tokens import read_documents
from infini_retrofit.training.control import Control, make_control
from infini_retrofit.training.finetuning import Finetuning
from infini_retrofit.training.loop import outcome, train

BASE, CONTROL, DOCUMENTS = Path("models/base"), Path("models/control"), Path("data/longdocs")
PLAN = Path("data/control.json")
METRICS, HISTORY = Path("metrics/finetune_control.json"), Path("plots/finetune_control.tsv")


def main() -> str:
    """Run the stage and return what it made."""
    plan = read_sealed(PLAN, Control, "dvc repro prepare_comparison")
    infini, params = plan.infini, plan.finetune
    num_ids = vocab_size(BASE)
    train_documents = read_documents(DOCUMENTS / "train.parquet", num_ids, params.train_documents)
    val_documents = read_documents(DOCUMENTS / "val.parquet", num_ids, params.val_documents)
    device, dtype = start_run()
    with training_run("finetune_control") as folder:
        model = load_base(BASE, torch.float32).to(device)
        base = load_base(BASE, dtype).to(device) if params.kl_weight else None
        control = make_control(model, infini)
        task = Finetuning(model, infini, params, dtype, base)
        metrics = train([(task, train_documents)], val_documents, params, folder, HISTORY)
        if is_first_process():
            save_retrofit(model, control, BASE, CONTROL)
            write_metrics(METRICS, metrics)
            seal_results("finetune_control", [METRICS, HISTORY])
    return f"finetune_control: {outcome(metrics)}"


if __name__ == "__main__":
    run_stage(main)
