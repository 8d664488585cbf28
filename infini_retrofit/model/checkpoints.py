"""A retrofitted model on disk: the tensors that differ from its base, and its form.

Knows nothing of where the pipeline keeps its models.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from infini_retrofit.layer.form import InfiniParams
from infini_retrofit.model.base import check_base, load_base
from infini_retrofit.model.retrofit import insert_infini
from infini_retrofit.pipeline.files import (
    MANIFEST,
    check_folder,
    read_json,
    verify_manifest,
    write_manifest,
    write_text,
)

WEIGHTS, CONFIG = "retrofit.safetensors", "infini_config.json"
FORMAT = 4  # older ones have choices of form that no longer exist
_NO_TRAINING_SEED = 2**32  # parameters allow smaller ones only


@dataclass(frozen=True, kw_only=True)
class _Config:
    """The file that says what a retrofit is."""

    format: int
    base: dict[str, str]  # sha256 of each file of the base's weights
    other_layers: Literal["segment", "full"]  # what the base's own layers see in generation
    infini: InfiniParams


def save_retrofit(model: PreTrainedModel, params: InfiniParams, base_dir: Path, out: Path) -> None:
    """Write the tensors that differ from a fresh insertion, and the form.

    Weights that were frozen and rounded for a run come from the base again, unrounded. The form
    keeps `model.config.other_layers`, if it is there.

    Raises:
        ValueError: if the model has weights of another form.
    """
    base = base_identity(base_dir)
    fresh = AutoModelForCausalLM.from_pretrained(base_dir, dtype="auto", local_files_only=True)
    # Another seed than training's: weights that start at random always differ, and are saved.
    insert_infini(fresh, params, _NO_TRAINING_SEED)
    known = fresh.state_dict()
    if strange := sorted(model.state_dict().keys() ^ known.keys()):
        has = "without" if strange[0] in known else "with"
        raise ValueError(
            "model must have the weights that inserting `params` into its base makes, and be saved "
            f"before `enable_generation` confines other layers, got one {has} {strange[0]}"
        )
    changed = {}
    for name, tensor in model.state_dict().items():
        tensor = tensor.detach().cpu().contiguous()
        is_tied = name == "lm_head.weight" and model.config.tie_word_embeddings
        if not is_tied and not torch.equal(known[name].to(tensor.dtype), tensor):
            changed[name] = tensor
    out.mkdir(parents=True, exist_ok=True)
    save_file(changed, out / WEIGHTS)
    other_layers = getattr(model.config, "other_layers", "segment")
    config = _Config(format=FORMAT, base=base, other_layers=other_layers, infini=params)
    write_text(out / CONFIG, json.dumps(asdict(config), indent=2) + "\n")
    write_manifest(out)


def load_retrofit(
    base_dir: Path, folder: Path, dtype: torch.dtype, made_by: str = "dvc repro"
) -> tuple[PreTrainedModel, InfiniParams]:
    """Load a base and insert what `save_retrofit` wrote.

    All weights but those of the memory, which stay float32, are in `dtype`. `made_by` is the
    command that makes `folder`, for the message when it is missing. `model.config.infini` holds
    the form, `model.config.other_layers` what other layers see in generation.

    Raises:
        FileNotFoundError: if a folder or its manifest is missing, or holds something else.
        ValueError: if a file was changed, or the base or the format is another.
    """
    config = _read_config(folder, base_dir, made_by)
    model = load_base(base_dir, dtype)
    insert_infini(model, config.infini)
    result = model.load_state_dict(load_file(folder / WEIGHTS), strict=False)
    assert not result.unexpected_keys, result.unexpected_keys
    model.config.infini = asdict(config.infini)
    model.config.other_layers = config.other_layers
    return model.eval(), config.infini


def base_identity(base_dir: Path) -> dict[str, str]:
    """Return the sha256 of each file of a base's weights, by the file's name."""
    check_base(base_dir)
    digests = json.loads((base_dir / MANIFEST).read_text(encoding="utf-8"))
    return {name: sha for name, sha in digests.items() if name.endswith(".safetensors")}


def _read_config(folder: Path, base_dir: Path, made_by: str) -> _Config:
    """Read the form of a retrofit, and refuse another folder, format or base."""
    if (folder / "modeling.py").is_file():
        raise FileNotFoundError(
            f"{folder} must be the folder of a retrofit, got an exported model: name the folder "
            "that it was exported from, or open it with AutoModelForCausalLM.from_pretrained("
            f'"{folder}", trust_remote_code=True)'
        )
    check_folder(folder, CONFIG, "retrofitted model", made_by)
    verify_manifest(folder, made_by)
    path = folder / CONFIG
    if (found := read_json(path, dict, made_by).get("format")) != FORMAT:
        raise ValueError(
            f"the format of {path} must be {FORMAT}, which this version of infini-retrofit reads "
            f"and writes, got {found}: run `{made_by}`, or use the version that wrote it"
        )
    config = read_json(path, _Config, made_by)
    if (found := base_identity(base_dir)) != config.base:
        want, got = (", ".join(sha[:12] for sha in x.values()) for x in (config.base, found))
        raise ValueError(
            f"the base of {folder} must be the one that it was made from, of sha256 {want}, got "
            f"{base_dir} of sha256 {got}"
        )
    return config
