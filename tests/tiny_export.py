"""A tiny retrofit where the pipeline leaves one, and the command that exports it."""

from pathlib import Path

import torch
from transformers import PreTrainedModel

from infini_retrofit.model.base import load_base
from infini_retrofit.model.checkpoints import save_retrofit
from infini_retrofit.model.retrofit import insert_infini
from infini_retrofit.pipeline.guard import run_stage
from infini_retrofit.share.export import main
from tests.reference import infini_params
from tests.tiny import tiny_base_folder


def make_retrofit(folder: Path, family: str, **form: object) -> PreTrainedModel:
    """Write models/base and models/finetuned; return the retrofitted model."""
    base_dir = tiny_base_folder(folder / "models" / "base", family)
    model, params = load_base(base_dir, torch.float32), infini_params(**form)
    insert_infini(model, params)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    save_retrofit(model, params, base_dir, folder / "models" / "finetuned")
    return model


def export(models: Path, out: Path, *options: str) -> Path:
    arguments = [str(models / "finetuned"), str(out), "--base", str(models / "base"), *options]
    run_stage(lambda: main(arguments))
    return out
