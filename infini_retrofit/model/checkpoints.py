"""A retrofitted model on disk: what differs from its base, and how to put it back.

Knows nothing of where the pipeline keeps its models.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from infini_retrofit.layer.form import InfiniParams
from infini_retrofit.model.base import check_base, load_base
from infini_retrofit.model.retrofit import check_form, insert_infini
from infini_retrofit.pipeline.files import (
    MANIFEST,
    check_folder,
    verify_manifest,
    write_manifest,
    write_text,
)

WEIGHTS, CONFIG = "retrofit.safetensors", "infini_config.json"
FORMAT = 3  # 1 named neither the base nor what the other layers see, 2 no type of the state
# What the layers that are no Infini layers see when the model runs on its own: their segment, as
# in training, or everything.
OTHER_LAYERS = ("segment", "full")
_NO_TRAINING_SEED = 2**32  # parameters allow smaller ones only


def save_retrofit(model: PreTrainedModel, params: InfiniParams, base_dir: Path, out: Path) -> None:
    """Write the tensors that inserting into the base does not bring back, and how to insert them.

    What was frozen and rounded for a run is taken from the base again, unrounded. The base's files
    are compared with, not loaded as a second model.

    Args:
        model: a retrofitted model; `model.config.other_layers` is kept if it is there.
        params: how its layers were inserted.
        base_dir: the base model's folder, with its manifest.
        out: the new folder.

    Raises:
        FileNotFoundError: if the base's folder or its manifest is missing.
        ValueError: if the model has weights of another form.
    """
    base, changed = base_identity(base_dir), {}
    known = _freshly_inserted(base_dir, params)
    if strange := sorted(model.state_dict().keys() ^ known.keys()):
        has = "without" if strange[0] in known else "with"
        raise ValueError(
            "model must have the weights that inserting `params` into its base makes, and be saved "
            f"before `enable_generation` confines other layers, got one {has} {strange[0]}"
        )
    for name, tensor in model.state_dict().items():
        tensor = tensor.detach().cpu().contiguous()
        is_tied = name == "lm_head.weight" and model.config.tie_word_embeddings
        if is_tied or torch.equal(known[name].to(tensor.dtype), tensor):
            continue
        changed[name] = tensor
    out.mkdir(parents=True, exist_ok=True)
    save_file(changed, out / WEIGHTS)
    about = {
        "format": FORMAT,
        "base": base,
        "other_layers": getattr(model.config, "other_layers", OTHER_LAYERS[0]),
        "infini": asdict(params),
    }
    write_text(out / CONFIG, json.dumps(about, indent=2) + "\n")
    write_manifest(out)


def load_retrofit(
    base_dir: Path, folder: Path, dtype: torch.dtype, made_by: str = "dvc repro"
) -> tuple[PreTrainedModel, InfiniParams]:
    """Load a base and put into it what `save_retrofit` wrote.

    `model.config` says what was put in, as `infini`, and what the other layers are to see when the
    model runs on its own, as `other_layers`.

    Args:
        base_dir: the base model's folder.
        folder: the retrofit's folder.
        dtype: of all weights but those of the memory, which stay float32.
        made_by: the command that makes `folder`, for the message when it is missing.

    Raises:
        FileNotFoundError: if a folder or its manifest is missing, or holds something else.
        ValueError: if a file was changed, the base is another, or the format is newer.
    """
    _check_retrofit(folder, made_by)
    verify_manifest(folder, made_by)
    about = _read_config(folder)
    _check_base(about, base_dir, folder)
    params = InfiniParams(**about["infini"])
    model = load_base(base_dir, dtype)
    insert_infini(model, params)
    result = model.load_state_dict(load_file(folder / WEIGHTS), strict=False)
    assert not result.unexpected_keys, result.unexpected_keys
    model.config.infini = asdict(params)
    model.config.other_layers = about.get("other_layers", OTHER_LAYERS[0])
    return model.eval(), params


def base_identity(base_dir: Path) -> dict[str, str]:
    """Return the sha256 of each file of a base's weights, by the file's name.

    Raises:
        FileNotFoundError: if it is no base, or has no manifest to read them from.
    """
    check_base(base_dir)
    digests = json.loads((base_dir / MANIFEST).read_text(encoding="utf-8"))
    return {name: sha for name, sha in digests.items() if name.endswith(".safetensors")}


def check_layers(params: InfiniParams, base_dir: Path) -> None:
    """Refuse layers and sizes that do not fit the base, without loading it.

    Raises:
        ValueError: if there are any; a base that is missing is for others to notice.
    """
    path = base_dir / "config.json"
    if path.is_file():
        config = AutoConfig.from_pretrained(base_dir, local_files_only=True)
        check_form(params, config)


def _freshly_inserted(base_dir: Path, params: InfiniParams) -> dict[str, torch.Tensor]:
    """Return the tensors of the base, of the dtype of its files, after an insertion."""
    fresh = AutoModelForCausalLM.from_pretrained(base_dir, dtype="auto", local_files_only=True)
    # With a seed of its own nothing that starts at random is taken for what would come back.
    insert_infini(fresh, params, _NO_TRAINING_SEED)
    return fresh.state_dict()


def _check_retrofit(folder: Path, made_by: str) -> None:
    """Refuse a folder that holds no retrofit, and an export by what it is."""
    if (folder / "modeling.py").is_file():
        raise FileNotFoundError(
            f"{folder} must be the folder of a retrofit, got an exported model: name the folder "
            "that it was exported from, or open it with AutoModelForCausalLM.from_pretrained("
            f'"{folder}", trust_remote_code=True)'
        )
    check_folder(folder, CONFIG, "retrofitted model", made_by)


def _read_config(folder: Path) -> dict[str, Any]:
    """Read how a retrofit was inserted."""
    about = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    if (found := about.get("format", 1)) > FORMAT:
        raise ValueError(
            f"the format of {folder / CONFIG} must be at most {FORMAT}, the newest that this "
            f"version of infini-retrofit reads, got {found}"
        )
    return about


def _check_base(about: dict[str, Any], base_dir: Path, folder: Path) -> None:
    """Refuse a base whose weights are not those that a retrofit was made from."""
    expected = about.get("base")
    if expected is not None and (found := base_identity(base_dir)) != expected:
        raise ValueError(
            f"the base of {folder} must be the one that it was made from, of sha256 "
            f"{_short(expected)}, got {base_dir} of sha256 {_short(found)}"
        )


def _short(digests: dict[str, str]) -> str:
    """Name digests so that two of them can be told apart by eye."""
    return ", ".join(digest[:12] for digest in digests.values())
