"""A base model read from a folder in Hugging Face form, and what is refused there.

Knows nothing of the folder's origin.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from infini_retrofit.model.base import (
    clean_generation_config,
    open_config,
    open_tokenizer,
    weightless,
)
from infini_retrofit.model.families import check_family
from infini_retrofit.model.weights import load_whole
from infini_retrofit.pipeline.files import read_json

WEIGHTS = "model*.safetensors"
_MADE_BY = "hf download REPO_ID --local-dir FOLDER"


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
    plan = weightless(open_config(folder, _MADE_BY), folder, _MADE_BY)
    model = load_whole(
        AutoModelForCausalLM.from_pretrained,
        plan,
        folder,
        f"run `{_MADE_BY}`",
        dtype=torch.float32,
        local_files_only=True,
    )
    stored = config.get("dtype") or config.get("torch_dtype") or "float32"
    note = f"{stored} weights, kept as float32"
    if unused := clean_generation_config(model):
        note += f"; without {', '.join(unused)} of generation_config.json, which had no effect"
    tokenizer, is_of_class = open_tokenizer(folder)
    if not is_of_class:
        note += "; without the class that tokenizer_config.json names, which gives other tokens"
    vocabulary = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()
    if (last := max(vocabulary.values())) >= model.config.vocab_size:
        raise ValueError(
            f"vocab_size of {source} must be more than {last}, the last id of its tokenizer.json, "
            f"got {model.config.vocab_size}"
        )
    return BaseModel(model=model, tokenizer=tokenizer, source=source, note=note)


def check_config(folder: Path, source: str) -> dict[str, Any]:
    """Read a model's configuration, and refuse it before its weights are read."""
    config = read_config(folder)
    if not config:
        raise _missing(folder, source, "config.json")
    check_family(config.get("model_type"), source)
    if "quantization_config" in config:
        raise ValueError(f"{source} must have plain weights, got quantized ones")
    return config


def known_depth(folder: Path, source: str) -> int | None:
    """Return the number of layers by a configuration, if it is there and fits."""
    there = (folder / "config.json").is_file()
    return check_config(folder, source).get("num_hidden_layers") if there else None


def read_config(folder: Path) -> dict[str, Any]:
    """Read config.json; {} where there is none."""
    path = folder / "config.json"
    return read_json(path, dict[str, Any], _MADE_BY) if path.is_file() else {}


def _missing(folder: Path, source: str, pattern: str) -> FileNotFoundError:
    return FileNotFoundError(
        f"{source} ({folder}) holds no {pattern}: a base is a folder in Hugging Face form, which "
        f"`{_MADE_BY}` makes"
    )
