"""What the file of a saved `InfiniCache` says, and which model may continue from it.

Knows nothing of the tensors in a cache.
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

# 1 did not say where there was padding, 2 not how the memory is kept, 3 had other forms.
FORMAT = "4"
_VALUES_AT_ONCE = 2**22  # of a parameter, for its digest
# These choices say where the weights came from. They change nothing that is computed.
_OF_TRAINING = ("init", "bptt_segments")


def check_file(path: Path) -> dict[str, str]:
    """Refuse a file that is no saved cache, or of another format; return what it says."""
    if not path.exists():
        raise FileNotFoundError(
            f"{path.absolute()} is missing: InfiniCache.save writes a cache, and so does "
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
    """Refuse a cache that another model filled, by the first difference."""
    for name, expected in describe(model).items():
        if (found := about.get(name)) != expected:
            raise ValueError(
                f"{name} of {path} must be {expected}, as in the model that continues from it, "
                f"got {found}"
            )


def check_place(path: Path) -> None:
    """Make a cache's folder, and refuse a place where no file can be written."""
    probe = path.with_name(path.name + ".probe")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OSError(f"cannot write to {path}: {error.strerror}") from error


def describe(model: PreTrainedModel) -> dict[str, str]:
    """Return the format, and all that must be equal for a model to continue from a cache.

    That is every choice of form and every weight, rounded to bfloat16. So models loaded in float32
    and in bfloat16 are equal. Weights that differ by less than a rounding are taken for equal.
    """
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
    """Hash the name, shape and bfloat16 values of every parameter."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {list(parameter.shape)}".encode())
        for part in parameter.detach().flatten().split(_VALUES_AT_ONCE):
            digest.update(part.to(torch.bfloat16).view(torch.int16).cpu().numpy())
    return digest.hexdigest()
