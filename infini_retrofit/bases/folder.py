"""A base model as a folder in Hugging Face form: read, check, write.

Knows nothing of the folder's origin.
"""

import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from infini_retrofit.model.base import load_tokenizer
from infini_retrofit.model.families import FAMILIES
from infini_retrofit.pipeline.files import write_manifest, write_text

WEIGHTS = "*.safetensors"


@dataclass(frozen=True, kw_only=True)
class BaseModel:
    """A base in memory, as float32.

    Attributes:
        model: the weights.
        tokenizer: may add special tokens; this pipeline encodes without them.
        source: the origin, precise enough to find it again.
        note: how the weights were stored or made, for readers of their perplexity.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    source: str
    note: str


def read_base(folder: Path, source: str) -> BaseModel:
    """Read a folder as float32; missing weights are an error, never random."""
    check_config(folder, source)
    for pattern in (WEIGHTS, "tokenizer.json"):
        if not any(folder.glob(pattern)):
            raise FileNotFoundError(
                f"{source} holds no {pattern}: a base needs config.json, {WEIGHTS} and "
                "tokenizer.json, as save_pretrained of transformers writes them"
            )
    model, loading = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        local_files_only=True,
        use_safetensors=True,
        output_loading_info=True,
    )
    if missing := sorted(loading["missing_keys"]):
        raise ValueError(f"{source} must hold all weights, got none for {', '.join(missing[:3])}")
    config = _read_config(folder)
    stored = config.get("dtype") or config.get("torch_dtype") or "float32"
    return BaseModel(
        model=model,
        tokenizer=load_tokenizer(folder),
        source=source,
        note=f"{stored} weights, kept as float32",
    )


def check_config(folder: Path, source: str) -> None:
    """Refuse a model by its configuration alone, before its weights are read."""
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{source} holds no config.json: it is no model")
    config = _read_config(folder)
    check_family(str(config.get("model_type")), source)
    if "quantization_config" in config:
        raise ValueError(f"{source} must have plain weights, got quantized ones")


def check_family(family: str, source: str) -> None:
    """Refuse a family without a retrofit."""
    if family not in FAMILIES:
        raise ValueError(
            f"the family of {source} must be one of {', '.join(sorted(FAMILIES))}, got {family!r}"
        )


def num_layers_of(folder: Path) -> int | None:
    """Read the number of layers from the configuration, if it is there."""
    if not (folder / "config.json").is_file():
        return None
    return _read_config(folder).get("num_hidden_layers")


def write_base(base: BaseModel, name: str, folder: Path) -> None:
    """Write a base to a folder, whole or not at all.

    The files are weights, tokenizer, base.json and the manifest.

    Args:
        base: the model to write.
        name: its name in tables.
        folder: replaced if it exists.
    """
    about = {
        "name": name,
        "source": base.source,
        "note": base.note,
        "num_parameters": base.model.num_parameters(),
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".base-") as parent:
        partial = Path(parent) / folder.name
        base.model.save_pretrained(partial)
        base.tokenizer.save_pretrained(partial)
        write_text(partial / "base.json", json.dumps(about, indent=2) + "\n")
        write_manifest(partial)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)


def _read_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))
