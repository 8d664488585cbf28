"""What the file of a saved `InfiniCache` says of itself, and which model may go on from it.

Knows nothing of what is in a cache.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from infini_retrofit.layer.form import InfiniParams
from infini_retrofit.model.families import decoder_layers
from infini_retrofit.model.retrofit import resolve_layers

FORMAT = "3"  # 1 did not say where there was padding, 2 not how the memory is kept
# The method of transformers' GenerationMixin that `enable_generation` replaces.
PREPARE = "_prepare_cache_for_generation"
_VALUES_AT_ONCE = 2**22  # digested
# Where the weights came from, not what is computed with them.
_OF_TRAINING = ("init", "initial_memory_share", "bptt_segments")


def check_file(path: Path) -> dict[str, str]:
    """Refuse what is no saved cache, before a model is loaded; return what it says of itself.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no cache, or one of another format.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"{path.absolute()} is missing: InfiniCache.save writes a cache, as does "
            "infini_retrofit.generation.chat with --document and --cache"
        )
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
    except (SafetensorError, OSError):
        about = {}
    if "num_seen" not in about:
        raise ValueError(
            f"{path} must be a cache that InfiniCache.save or infini_retrofit.generation.chat "
            "wrote, got something else"
        )
    if (found := about.get("format")) != FORMAT:
        raise ValueError(
            f"the format of {path} must be {FORMAT}, which this version of infini-retrofit "
            f"writes, got {found}: read the text again"
        )
    return about


def check_model(path: Path, about: Mapping[str, str], model: PreTrainedModel) -> None:
    """Refuse a cache that another model filled.

    Raises:
        ValueError: if there is a difference; it is named.
    """
    for name, expected in describe(model).items():
        if (found := about.get(name)) != expected:
            raise ValueError(
                f"{name} of {path} must be {expected}, as of the model that is to go on from "
                f"it, got {found}"
            )


def check_enabled(model: PreTrainedModel) -> None:
    """Refuse a model that would not fill a cache.

    Raises:
        ValueError: if `enable_generation` was not called.
    """
    if PREPARE not in vars(model):
        raise ValueError(
            "model must be one that generates with an InfiniCache, got one that does not: call "
            "enable_generation(model, params) first"
        )


def check_place(path: Path) -> None:
    """Find out whether a cache can be written, before a text is read; make its folder.

    Raises:
        OSError: if it cannot.
    """
    probe = partial_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OSError(f"cannot write to {path}: {error.strerror}") from error


def partial_path(path: Path) -> Path:
    """Return where a file is written before it is whole."""
    return path.with_name(path.name + ".partial")


def describe(model: PreTrainedModel) -> dict[str, str]:
    """Return the format, and what must be equal for a model to go on from a cache.

    That is every choice of form, and every weight as rounded to bfloat16: models loaded in float32
    and bfloat16 are equal, and weights that differ by less than a rounding are taken for equal.

    Raises:
        ValueError: if the model would not fill a cache.
    """
    check_enabled(model)
    form = asdict(InfiniParams(**model.config.infini))
    form["layers"] = resolve_layers(form["layers"], len(decoder_layers(model)))
    rope = getattr(model.config, "rope_parameters", None)
    choices = {f"infini.{name}": x for name, x in form.items() if name not in _OF_TRAINING}
    return {
        "format": FORMAT,
        "other_layers": model.config.other_layers,
        **{name: json.dumps(x, sort_keys=True) for name, x in choices.items()},
        "model": _digest(model),
        "rope_parameters": json.dumps(rope, sort_keys=True),
    }


def _digest(model: PreTrainedModel) -> str:
    """Hash the name and shape of every parameter, and its values as rounded to bfloat16."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {list(parameter.shape)}".encode())
        for part in parameter.detach().flatten().split(_VALUES_AT_ONCE):
            digest.update(part.to(torch.bfloat16).view(torch.int16).cpu().numpy())
    return digest.hexdigest()
