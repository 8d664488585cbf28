"""The base model in memory, and its folder on disk in Hugging Face form.

Knows neither where a base comes from (`base_sources`) nor what is inside a model.
"""

from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from infini_retrofit.model import base_attention
from infini_retrofit.pipeline.files import MANIFEST, check_folder, verify_manifest

_MADE_BY = "dvc repro prepare_base"


def load_base(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Load a base in evaluation mode, after comparing it with its manifest."""
    check_base(folder)
    verify_manifest(folder, _MADE_BY)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation=base_attention.NAME, local_files_only=True
    )
    return model.eval()


def load_weightless(folder: Path) -> PreTrainedModel:
    """Build a base's modules without weights, to count sizes."""
    config = _read_config(folder)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def vocab_size(folder: Path) -> int:
    """Return how many token ids a base has."""
    return _read_config(folder).vocab_size


def _read_config(folder: Path) -> PretrainedConfig:
    """Read a base's configuration, after comparing it with the manifest."""
    check_base(folder)
    verify_manifest(folder, _MADE_BY, ["config.json"])
    return AutoConfig.from_pretrained(folder, local_files_only=True)


def check_base(folder: Path) -> None:
    """Refuse a folder that holds no base, or no manifest."""
    check_folder(folder, "config.json", "base model", _MADE_BY)
    if not (folder / MANIFEST).is_file():
        raise FileNotFoundError(
            f"{folder / MANIFEST} is missing: run `{_MADE_BY}` to make it, or "
            "`infini_retrofit.write_manifest` for a folder of your own"
        )


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Load the tokenizer of a base."""
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)
