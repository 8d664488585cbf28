"""A GGUF file as a trainable transformers model and its tokenizer.

Knows the file format through transformers only, and nothing of the file's origin.
"""

import re
import struct
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader, LlamaFileType
from tokenizers.normalizers import NFC
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoModelForCausalLM, GgufConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.integrations import GGUF_CONFIG_MAPPING
from transformers.integrations.gguf import read_gguf_metadata
from transformers.modeling_gguf_pytorch_utils import TensorProcessor, get_gguf_hf_weights_map

from infini_retrofit.bases.folder import BaseModel
from infini_retrofit.model.families import check_family

# What transformers reads off the weights instead: their shapes and names.
_BY_WEIGHTS = ("attention.key_length", "attention.value_length", "use_parallel_residual")


def read_gguf(path: Path, source: str) -> BaseModel:
    """Read the weights, unpacked to float32, and the tokenizer."""
    metadata = read_metadata(path)
    check_family(metadata["general.architecture"], source)
    _check_whole(path)
    stored = LlamaFileType(metadata.get("general.file_type", LlamaFileType.GUESSED)).name
    stored = stored.removeprefix("MOSTLY_").removeprefix("ALL_")  # such as Q4_1
    bits = re.search("[0-9]+", stored)
    kind = f"{bits.group()}-bit ({stored}) weights" if bits else "weights of a GGUF file"
    note = f"{kind} unpacked to float32"
    return BaseModel(model=_unpack(path), tokenizer=read_tokenizer(path), source=source, note=note)


def read_metadata(path: Path) -> dict[str, Any]:
    """Read what a file says of its model, by the keys of the GGUF format.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is no whole GGUF file.
    """
    try:
        return read_gguf_metadata(str(path))[0]
    except (struct.error, ValueError) as error:
        raise ValueError(f"{path} must be a whole GGUF file: {error}") from error


def gguf_depth(path: Path) -> int | None:
    """Return how many layers a file's model has, if it says so."""
    metadata = read_metadata(path)
    return metadata.get(f"{metadata['general.architecture']}.block_count")


def read_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """Read the tokenizer with the word splitting of its makers.

    transformers 5.23 does not know the pre-tokenizer `smollm`: single digits, then the words
    of GPT-2. It uses GPT-2's alone, which cuts newlines before a digit differently. Of `qwen2`
    it knows the words, and leaves out that Qwen composes its letters: NFC.
    """
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path.parent, gguf_file=path.name)
    splitting = read_metadata(path).get("tokenizer.ggml.pre")
    if splitting == "smollm":
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
            [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
        )
    if splitting == "qwen2":
        tokenizer.backend_tokenizer.normalizer = NFC()
    return tokenizer


def _check_whole(path: Path) -> None:
    """Refuse a file that ends before its last weight: the reader maps each of them."""
    try:
        GGUFReader(path)
    except ValueError as error:
        raise ValueError(f"{path} must be a whole GGUF file: {error}") from error


def _unpack(path: Path) -> PreTrainedModel:
    """Move the weights into a model of a clean configuration.

    transformers neither saves nor trains its own model of a GGUF file.
    """
    packed, loading = AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        output_loading_info=True,
        # Without this, weights stay packed where the package `kernels` is installed.
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    _check_all_read(path, packed, loading["missing_keys"])
    of_the_file = ("quantization_config", "_name_or_path", "_model_name_or_path")
    settings = {k: v for k, v in packed.config.to_dict().items() if k not in of_the_file}
    with torch.device("meta"):
        clean = type(packed.config).from_dict(settings)
        model = AutoModelForCausalLM.from_config(clean, dtype=torch.float32)
    model.load_state_dict(packed.state_dict(), assign=True)
    model.tie_weights()
    return model


def _check_all_read(path: Path, packed: PreTrainedModel, missing: set[str]) -> None:
    """Refuse weights that transformers makes up, and what it leaves out without a word.

    It leaves out scaled rotations and windows, for one: the model would be another one.
    """
    metadata, names = read_gguf_metadata(str(path))
    family = metadata["general.architecture"]
    for name in sorted(missing):
        raise ValueError(f"{path} must hold the weights {name}, got none")
    known = {f"{family}.{key}" for key in (*GGUF_CONFIG_MAPPING[family], *_BY_WEIGHTS)}
    unread = {key for key in metadata if key.startswith(f"{family}.")} - known
    unread |= set(names) - get_gguf_hf_weights_map(packed, TensorProcessor()).keys()
    for name in sorted(unread):
        raise ValueError(
            f"{path} must hold nothing that transformers does not read, got {name}: give the "
            "model's folder in Hugging Face form"
        )
