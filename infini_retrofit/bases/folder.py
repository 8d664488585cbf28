"""TODO."""

import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from infini_retrofit.pipeline.files import (
    write_manifest,
    write_text,
)


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
