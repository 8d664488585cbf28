"""Stage `finetune_control`: the base's own attention, fine-tuned alike, without a memory.

Reads:  data/control.json, models/base, data/longdocs
Writes: models/control, metrics/finetune_control.json, plots/finetune_control.tsv
"""

from pathlib import Path

import torch

from infini_retrofit.base import load_base
from infini_retrofit.checkpoints import save_retrofit
from infini_retrofit.finetuning import Control, Finetuning, make_control
from infini_retrofit.imports import first_party_files
from infini_retrofit.params import load_json
from infini_retrofit.pipeline import run_stage, training_run
from infini_retrofit.report import write_metrics
from infini_retrofit.runtime import start_run
from infini_retrofit.texts import read_documents
from infini_retrofit.training import train

BASE, CONTROL, DOCUMENTS = Path("models/base"), Path("models/control"), Path("data/longdocs")
PLAN = Path("data/control.json")
METRICS, HISTORY = Path("metrics/finetune_control.json"), Path("plots/finetune_control.tsv")


def main() -> None:
    """Run the stage."""
    plan = load_json(Control, PLAN, "dvc repro prepare_comparison")
    infini, params = plan.infini, plan.finetune
    train_documents = read_documents(DOCUMENTS / "train.parquet", params.train_documents)
    val_documents = read_documents(DOCUMENTS / "val.parquet", params.val_documents)
    device, dtype = start_run()
    inputs, code = [BASE, DOCUMENTS], first_party_files(Path(__file__))
    with training_run("finetune_control", inputs, {}, [*code, PLAN]) as run:
        model = load_base(BASE, torch.float32).to(device)
        base = load_base(BASE, dtype).to(device) if params.kl_weight else None
        control = make_control(model, infini)
        trainee = Finetuning(model, infini, params, dtype, base)
        metrics = train(trainee, train_documents, val_documents, params, run.path, HISTORY)
        if run.is_first:
            save_retrofit(model, control, BASE, CONTROL)
            write_metrics(METRICS, metrics)


if __name__ == "__main__":
    run_stage(main)
