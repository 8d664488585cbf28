"""A retrofitted model on disk: what differs from its base, and how to put it back.

Knows nothing of where the pipeline keeps its models.
"""

import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from infini_retrofit.base import load_base
from infini_retrofit.infini_params import InfiniParams
from infini_retrofit.report import verify_manifest, write_manifest, write_text
from infini_retrofit.retrofit import insert_infini, resolve_layers

WEIGHTS, CONFIG = "retrofit.safetensors", "infini_config.json"


def save_retrofit(model: PreTrainedModel, params: InfiniParams, base_dir: Path, out: Path) -> None:
    """Write the tensors that the base does not have or has otherwise, and how to insert them."""
    out.mkdir(parents=True, exist_ok=True)
    base, changed = load_base(base_dir, torch.float32).state_dict(), {}
    for name, tensor in model.state_dict().items():
        tensor = tensor.detach().cpu().contiguous()
        is_tied = name == "lm_head.weight" and model.config.tie_word_embeddings
        if is_tied or (name in base and torch.equal(base[name].to(tensor.dtype), tensor)):
            continue
        changed[name] = tensor
    save_file(changed, out / WEIGHTS)
    write_text(out / CONFIG, json.dumps({"infini": asdict(params)}, indent=2) + "\n")
    write_manifest(out)


def load_retrofit(
    base_dir: Path, folder: Path, dtype: torch.dtype, made_by: str = "dvc repro"
) -> tuple[PreTrainedModel, InfiniParams]:
    """Load a base and put into it what `save_retrofit` wrote.

    Args:
        base_dir: the base model's folder.
        folder: the retrofit's folder.
        dtype: of all weights but the gates, which stay float32.
        made_by: the command that makes `folder`, for the message when it is missing.
    """
    verify_manifest(folder, made_by)
    params = InfiniParams(**json.loads((folder / CONFIG).read_text())["infini"])
    model = load_base(base_dir, dtype)
    insert_infini(model, params)
    result = model.load_state_dict(load_file(folder / WEIGHTS), strict=False)
    assert not result.unexpected_keys, result.unexpected_keys
    return model.eval(), params


def check_layers(params: InfiniParams, base_dir: Path) -> None:
    """Refuse layers that the base does not have, without loading it.

    Raises:
        ValueError: if there are any; a base that is missing is for others to notice.
    """
    config = base_dir / "config.json"
    if config.is_file():
        resolve_layers(params.layers, json.loads(config.read_text())["num_hidden_layers"])
