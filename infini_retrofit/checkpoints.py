"""A retrofitted model on disk: what differs from its base, and how to put it back.

Knows nothing of where the pipeline keeps its models.
"""

import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, PreTrainedModel

from infini_retrofit.base import load_base
from infini_retrofit.infini_params import InfiniParams
from infini_retrofit.report import verify_manifest, write_manifest, write_text
from infini_retrofit.retrofit import attention_shape, insert_infini, resolve_layers

WEIGHTS, CONFIG = "retrofit.safetensors", "infini_config.json"
_NO_TRAINING_SEED = 2**32  # parameters allow smaller ones only


def save_retrofit(model: PreTrainedModel, params: InfiniParams, base_dir: Path, out: Path) -> None:
    """Write the tensors that inserting into the base does not bring back, and how to insert them.

    What was frozen and rounded for a run is taken from the base again, unrounded.
    """
    out.mkdir(parents=True, exist_ok=True)
    fresh, changed = load_base(base_dir, torch.float32), {}
    # With a seed of its own nothing that starts at random is taken for what would come back.
    insert_infini(fresh, params, _NO_TRAINING_SEED)
    known = fresh.state_dict()
    for name, tensor in model.state_dict().items():
        tensor = tensor.detach().cpu().contiguous()
        is_tied = name == "lm_head.weight" and model.config.tie_word_embeddings
        if is_tied or torch.equal(known[name].to(tensor.dtype), tensor):
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
        dtype: of all weights but those of the memory, which stay float32.
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
    """Refuse layers and sizes that do not fit the base, without loading it.

    Raises:
        ValueError: if there are any; a base that is missing is for others to notice.
    """
    path = base_dir / "config.json"
    if path.is_file():
        config = AutoConfig.from_pretrained(base_dir, local_files_only=True)
        resolve_layers(params.layers, config.num_hidden_layers)
        params.count_features(attention_shape(config).of_heads(params.heads).head_dim)
