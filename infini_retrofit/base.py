"""The base model in memory, and its folder on disk in Hugging Face form.

Knows neither where a base comes from (`base_sources`) nor what is inside a model.
"""

import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from infini_retrofit import base_attention
from infini_retrofit.report import (
    MANIFEST,
    check_folder,
    verify_manifest,
    write_manifest,
    write_text,
)

_MADE_BY = "dvc repro prepare_base"


@dataclass(frozen=True, kw_only=True)
class BaseModel:
    """A base in memory, as float32.

    Attributes:
        model: the weights.
        tokenizer: adds what its makers chose; this pipeline encodes without special tokens.
        source: where it came from, precise enough to find it again.
        note: what a reader of its perplexity must know about the weights.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    source: str
    note: str


def write_base(base: BaseModel, name: str, out_dir: Path) -> None:
    """Write weights, tokenizer, base.json and the manifest, all of them or nothing.

    Args:
        base: what to write.
        name: what the tables call it.
        out_dir: replaced if it exists.
    """
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out_dir.parent, prefix=".base-") as partial:
        folder = Path(partial) / out_dir.name
        _save(base, name, folder)
        shutil.rmtree(out_dir, ignore_errors=True)
        folder.rename(out_dir)


def load_base(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Load what `bring_base` wrote, in evaluation mode, after comparing it with its manifest."""
    check_base(folder)
    verify_manifest(folder, _MADE_BY)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation=base_attention.NAME, local_files_only=True
    )
    return model.eval()


def load_weightless(folder: Path) -> PreTrainedModel:
    """Build a base's modules without its weights, for what is to be known of their sizes."""
    check_base(folder)
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def check_base(folder: Path) -> None:
    """Refuse a folder that holds no base, before anything is read.

    Raises:
        FileNotFoundError: if it is missing or holds something else, or has no manifest.
    """
    check_folder(folder, "config.json", "base model", _MADE_BY)
    if not (folder / MANIFEST).is_file():
        raise FileNotFoundError(
            f"{folder / MANIFEST} is missing: run `{_MADE_BY}` to make it, or "
            "`infini_retrofit.write_manifest` for a folder of your own"
        )


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Load the tokenizer that `bring_base` wrote."""
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def _save(base: BaseModel, name: str, folder: Path) -> None:
    """Write the files of a base into a new folder."""
    base.model.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
    about = {
        "name": name,
        "source": base.source,
        "note": base.note,
        "num_parameters": base.model.num_parameters(),
    }
    write_text(folder / "base.json", json.dumps(about, indent=2) + "\n")
    write_manifest(folder)
