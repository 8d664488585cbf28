"""Stage `distill`: insert the Infini layers and fit them to the base.

Reads:  params.yaml (infini, distill), models/base, data/wikitext
Writes: models/distilled, metrics/distill.json, plots/distill.tsv, plots/distill_memory.tsv,
        data/distill.manifest.json
"""

from pathlib import Path

import torch

from infini_retrofit.layer.form import InfiniParams
from infini_retrofit.model.base import load_base, vocab_size
from infini_retrofit.model.checkpoints import save_retrofit
from infini_retrofit.pipeline.device import start_run
from infini_retrofit.pipeline.files import seal_results, write_metrics
from infini_retrofit.pipeline.guard import is_first_process, run_stage, training_run
from infini_retrofit.pipeline.params import load_section
from infini_retrofit.pipeline.tokens import read_samples
from infini_retrofit.training.distillation import Distillation, DistillParams
from infini_retrofit.training.loop import outcome, train

BASE, TEXT, DISTILLED = Path("models/base"), Path("data/wikitext"), Path("models/distilled")
METRICS = Path("metrics/distill.json")
HISTORY, MEMORY = Path("plots/distill.tsv"), Path("plots/distill_memory.tsv")


def main() -> str:
    """Run the stage and return what it made."""
    infini, params = load_section(InfiniParams, "infini"), load_section(DistillParams, "distill")
    num_ids, length = vocab_size(BASE), params.tokens_per_sample
    train_samples = read_samples(TEXT / "train.parquet", num_ids, length, params.samples)
    val_samples = read_samples(TEXT / "val.parquet", num_ids, length, params.val_samples)
    device, dtype = start_run()
    with training_run("distill") as folder:
        model = load_base(BASE, torch.float32).to(device)
        task = Distillation(model, infini, params, dtype)
        metrics = train(
            [(task, train_samples)], val_samples, params, folder, HISTORY, MEMORY
        )
        if is_first_process():
            save_retrofit(model, infini, BASE, DISTILLED)
            write_metrics(METRICS, metrics)
            seal_results("distill", [METRICS, HISTORY, MEMORY])
    return f"distill: {outcome(metrics)}"


if __name__ == "__main__":
    run_stage(main)
