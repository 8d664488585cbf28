"""A base model read from a folder in Hugging Face form, and what is refused there.

Knows nothing of the folder's origin.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from infini_retrofit.model.base import load_tokenizer
from infini_retrofit.model.families import FAMILIES

WEIGHTS = "*.safetensors"


@dataclass(frozen=True, kw_only=True)
class BaseModel:
    """A base in memory, as float32."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    source: str  # precise enough to find it again
    note: str  # how the weights were stored or made, for readers of their perplexity


def read_base(folder: Path, source: str) -> BaseModel:
    """Read a folder as float32; missing weights are an error, never random."""
    config = check_config(folder, source)
    for pattern in (WEIGHTS, "tokenizer.json"):
        if not any(folder.glob(pattern)):
            raise _missing(folder, source, pattern)
    model, loading = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        local_files_only=True,
        use_safetensors=True,
        output_loading_info=True,
    )
    if missing := sorted(loading["missing_keys"]):
        raise ValueError(f"{source} must hold all weights, got none for {', '.join(missing[:3])}")
    stored = config.get("dtype") or config.get("torch_dtype") or "float32"
    note = f"{stored} weights, kept as float32"
    return BaseModel(model=model, tokenizer=load_tokenizer(folder), source=source, note=note)


def check_config(folder: Path, source: str) -> dict[str, Any]:
    """Read a model's configuration, and refuse it before its weights are read."""
    config = read_config(folder)
    if not config:
        raise _missing(folder, source, "config.json")
    check_family(config.get("model_type"), source)
    if "quantization_config" in config:
        raise ValueError(f"{source} must have plain weights, got quantized ones")
    return config


def check_family(family: str | None, source: str) -> None:
    """Refuse a family without a retrofit."""
    if family not in FAMILIES:
        raise ValueError(
            f"the family of {source} must be one of {', '.join(sorted(FAMILIES))}, got {family!r}"
        )


def read_config(folder: Path) -> dict[str, Any]:
    """Read config.json; {} where there is none."""
    path = folder / "config.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _missing(folder: Path, source: str, pattern: str) -> FileNotFoundError:
    return FileNotFoundError(
        f"{source} ({folder}) holds no {pattern}: a base is a folder in Hugging Face form, which "
        "`hf download REPO_ID --local-dir FOLDER` makes"
    )
