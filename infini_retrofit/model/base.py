"""The base model in memory, and its folder on disk in Hugging Face form.

Knows neither where a base comes from (`base_sources`) nor what is inside a model.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, NonNegativeInt
from tokenizers import Tokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from infini_retrofit.model import base_attention
from infini_retrofit.model.families import check_family
from infini_retrofit.model.weights import check_sizes, load_whole, read_by_transformers
from infini_retrofit.pipeline.files import MANIFEST, check_folder, read_json, verify_manifest

_MADE_BY = "dvc repro prepare_base"
# Words, numbers, blanks, signs, letters in two parts, other scripts: what tokenizers cut apart.
_PROBE = "It's 1984:\n\n 12,345   km/h\tnai\u0308ve na\u00efve\r\n \u6f22\u5b57 \U0001f600 x_1 <b>."


def load_base(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Load a base in evaluation mode, after comparing it with its manifest.

    Raises:
        FileNotFoundError: if the folder, its manifest or a file is missing.
        ValueError: if a file was changed or is damaged.
    """
    check_base(folder)
    verify_manifest(folder, _MADE_BY)
    load, options = AutoModelForCausalLM.from_pretrained, {"local_files_only": True}
    options |= {"dtype": dtype, "attn_implementation": base_attention.NAME}
    model = load_whole(load, load_weightless(folder), folder, _advice(folder), **options)
    clean_generation_config(model)
    return model.eval()


def clean_generation_config(model: PreTrainedModel) -> list[str]:
    """Take from a model's settings of `generate` what transformers reads and never writes.

    Such are settings of a way of sampling that is off. Returns their names.
    """
    try:
        model.generation_config.validate(strict=True)
    except ValueError as error:
        names = sorted(set(re.findall(r"^- `(\w+)`:", str(error), re.MULTILINE)))
        for name in names:
            setattr(model.generation_config, name, None)
        model.generation_config.validate(strict=True)
        return names
    return []


def load_weightless(folder: Path) -> PreTrainedModel:
    """Build a base's modules without weights, to count sizes."""
    return weightless(_own_config(folder), folder, _MADE_BY)


def vocab_size(folder: Path) -> int:
    """Return how many token ids a base has."""
    return _own_config(folder).vocab_size


def _own_config(folder: Path) -> PretrainedConfig:
    """Read a base's configuration, after comparing it with the manifest."""
    check_base(folder)
    verify_manifest(folder, _MADE_BY, ["config.json"])
    return open_config(folder, _MADE_BY)


def weightless(config: PretrainedConfig, folder: Path, made_by: str) -> PreTrainedModel:
    """Build the modules that a folder's configuration describes, on the device `meta`."""
    source = folder / "config.json"
    with read_by_transformers(source, _advice(folder, made_by)), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def open_config(folder: Path, made_by: str) -> PretrainedConfig:
    """Read the configuration of a folder in Hugging Face form, and check that of generation.

    Raises:
        ValueError: if either is damaged; `made_by` is the command that makes the folder.
    """
    path, advice = folder / "config.json", _advice(folder, made_by)
    about = read_json(path, dict[str, Any], made_by)
    check_family(about.get("model_type"), path, f": {advice}")
    if "quantization_config" in about:
        raise ValueError(f"{path} must describe plain weights, got quantized ones: {advice}")
    check_sizes(about, path, advice)
    if (other := folder / "generation_config.json").is_file():
        read_json(other, dict[str, Any], made_by)
        with read_by_transformers(other, advice):
            GenerationConfig.from_pretrained(folder).validate()
    with read_by_transformers(path, advice):
        return AutoConfig.from_pretrained(folder, local_files_only=True)


@dataclass(frozen=True, kw_only=True)
class BaseAbout:
    """The file base.json: what a base is and where it comes from."""

    name: Annotated[str, Field(min_length=1)]  # a key of `models` in params.yaml
    source: str
    note: str  # how the weights were stored or made
    num_parameters: NonNegativeInt


def read_about(folder: Path) -> BaseAbout:
    """Read base.json; of a folder of one's own without it, only its name is known."""
    path = folder / "base.json"
    if path.is_file():
        return read_json(path, BaseAbout, _MADE_BY)
    source = f"a folder named {folder.name}"
    return BaseAbout(name=folder.name, source=source, note="none", num_parameters=0)


def check_base(folder: Path) -> None:
    """Refuse a folder that holds no base, or no manifest."""
    check_folder(folder, "config.json", "base model", _MADE_BY)
    if not (folder / MANIFEST).is_file():
        raise FileNotFoundError(
            f"{folder / MANIFEST} is missing: run `{_MADE_BY}` to make it, or "
            "`infini_retrofit.write_manifest` for a folder of your own"
        )


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Load the tokenizer of a base; its tokens are those of tokenizer.json."""
    return open_tokenizer(folder)[0]


def open_tokenizer(folder: Path) -> tuple[PreTrainedTokenizerFast, bool]:
    """Load a tokenizer, and return whether it is of the class that its files name.

    transformers makes some classes by their own rules, whatever tokenizer.json says. Where these
    give other tokens, the class is left out.
    """
    source = f"tokenizer.json or tokenizer_config.json of {folder}"
    with read_by_transformers(source, _advice(folder)):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        own = Tokenizer.from_file(str(folder / "tokenizer.json"))
        wanted = own.encode(_PROBE, add_special_tokens=False).ids
        if tokenizer.encode(_PROBE, add_special_tokens=False) == wanted:
            return tokenizer, True
        return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True), False


def _advice(folder: Path, made_by: str = _MADE_BY) -> str:
    return f"delete {folder} and run `{made_by}`"
