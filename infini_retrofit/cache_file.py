"""What the file of a saved `InfiniCache` says of itself, and which model may go on from it.

Knows nothing of what is in a cache.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from infini_retrofit.retrofit import infini_modules

FORMAT = "2"  # 1 did not say where there was padding
_DIGESTED_VALUES = 64  # of each parameter


def check_file(path: Path) -> dict[str, str]:
    """Refuse what is no saved cache, before a model is loaded; return what it says of itself.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no cache, or one of another format.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"{path.absolute()} is missing: InfiniCache.save writes a cache, as does "
            "infini_retrofit.chat with --document and --cache"
        )
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
    except (SafetensorError, OSError):
        about = {}
    if "num_seen" not in about:
        raise ValueError(
            f"{path} must be a cache that InfiniCache.save or infini_retrofit.chat wrote, got "
            "something else"
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


def describe(model: PreTrainedModel) -> dict[str, str]:
    """Return the format, and what must be equal for a model to go on from a cache."""
    modules = infini_modules(model)
    lengths = sorted({module.segment_length for module in modules.values()})
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        # The first values tell weights apart; rounded, they do not depend on the number type.
        first = parameter.detach().flatten()[:_DIGESTED_VALUES].to(torch.bfloat16)
        digest.update(name.encode() + first.view(torch.int16).cpu().numpy().tobytes())
    return {
        "format": FORMAT,
        "segment_length": ", ".join(map(str, lengths)),
        "other_layers": str(getattr(model.config, "other_layers", None)),
        "model": digest.hexdigest(),
    }
