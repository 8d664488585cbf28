"""A retrofitted model on disk: the tensors that differ from its base, and its form.

Knows nothing of where the pipeline keeps its models.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from infini_retrofit.layer.form import InfiniParams
from infini_retrofit.model.base import check_base, load_base
from infini_retrofit.model.retrofit import insert_infini
from infini_retrofit.model.weights import check_kinds, kind_of, read_tensors
from infini_retrofit.pipeline.files import (
    MANIFEST,
    check_folder,
    check_made,
    read_json,
    verify_manifest,
    write_manifest,
    write_text,
)

WEIGHTS, CONFIG = "retrofit.safetensors", "infini_config.json"
FORMAT = 8  # older ones know no key_layer
_NO_TRAINING_SEED = 2**32  # parameters allow smaller ones only


@dataclass(frozen=True, kw_only=True)
class _Config:
    """The file that says what a retrofit is."""

    format: int
    base: dict[str, str]  # sha256 of each file of the base's weights
    other_layers: Literal["segment", "full"]  # what the base's own layers see in generation
    infini: InfiniParams
    tensors: dict[str, str]  # type and shape of each, by name


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
    config = _Config(
        format=FORMAT,
        base=base,
        other_layers=getattr(model.config, "other_layers", "segment"),
        infini=params,
        tensors={name: kind_of(changed[name]) for name in sorted(changed)},
    )
    # One entry: safetensors writes several in any order, and equal runs must give equal files.
    save_file(changed, out / WEIGHTS, {"form": _form_of(config)})
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
        ValueError: if a file was changed or damaged, or the base or the format is another.
    """
    config = _read_config(folder, base_dir, made_by)
    model = load_base(base_dir, dtype)
    _insert(model, config.infini, folder, made_by)
    model.load_state_dict(_read_weights(folder / WEIGHTS, config, model, made_by), strict=False)
    model.config.infini = asdict(config.infini)
    model.config.other_layers = config.other_layers
    return model.eval(), config.infini


def base_identity(base_dir: Path) -> dict[str, str]:
    """Return the sha256 of each file of a base's weights, by the file's name."""
    check_base(base_dir)
    digests = read_json(base_dir / MANIFEST, dict[str, str], "dvc repro prepare_base")
    return {name: sha for name, sha in digests.items() if name.endswith(".safetensors")}


def _insert(model: PreTrainedModel, infini: InfiniParams, folder: Path, made_by: str) -> None:
    try:
        insert_infini(model, infini)
    except ValueError as error:
        told = f"{folder / CONFIG} does not fit its base ({error})"
        raise ValueError(f"{told}: delete {folder} and run `{made_by}`") from error


def _form_of(config: _Config) -> str:
    """Return what the weights say of their form, so that no other form reads them."""
    return json.dumps({"infini": asdict(config.infini), "other_layers": config.other_layers})


def _read_weights(
    path: Path, config: _Config, model: PreTrainedModel, made_by: str
) -> dict[str, Tensor]:
    """Read the tensors that `config` lists, for the form that it names."""
    check_made(path, made_by)
    advice = f"delete {path.parent} and run `{made_by}`"
    tensors, about = read_tensors(path, advice)
    if (wanted := about.get("form", "nothing")) != (found := _form_of(config)):
        raise ValueError(
            f"the form of {path.parent / CONFIG} must be {wanted}, as {WEIGHTS} says, got {found}: "
            f"{advice}"
        )
    check_kinds({name: kind_of(x) for name, x in tensors.items()}, config.tensors, path, advice)
    shapes = {name: list(x.shape) for name, x in model.state_dict().items()}
    for name, x in tensors.items():
        if (wanted := shapes.get(name, "no tensor")) != list(x.shape):
            raise ValueError(f"{name} of {path} must be {wanted}, got {list(x.shape)}: {advice}")
    return tensors


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
