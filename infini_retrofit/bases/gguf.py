"""A GGUF file as a trainable transformers model and its tokenizer.

Knows the file format through transformers only, and nothing of the file's origin.
"""

import re
from pathlib import Path

import torch
from gguf import LlamaFileType
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.integrations.gguf import read_gguf_metadata


class GgufFile:
    """One GGUF file: the family and depth of its model, and a note on the weights' bits."""

    def __init__(self, path: Path) -> None:
        metadata, _ = read_gguf_metadata(str(path))
        self.family: str = metadata["general.architecture"]
        self.num_layers: int | None = metadata.get(f"{self.family}.block_count")
        self.note = _describe(metadata.get("general.file_type", LlamaFileType.GUESSED))
        self._pre_tokenizer = metadata.get("tokenizer.ggml.pre", "default")
        self._folder, self._name = path.parent, path.name

    def read_model(self) -> PreTrainedModel:
        """Unpack the weights to float32.

        transformers neither saves nor trains its own model of a GGUF file. So the weights move
        into a model of a clean configuration.
        """
        config = AutoConfig.from_pretrained(self._folder, gguf_file=self._name)
        packed = AutoModelForCausalLM.from_pretrained(
            self._folder,
            gguf_file=self._name,
            config=config,
            # Without this, weights stay packed where the package `kernels` is installed.
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
        )
        of_the_file = ("quantization_config", "_name_or_path", "_model_name_or_path")
        settings = {k: v for k, v in config.to_dict().items() if k not in of_the_file}
        with torch.device("meta"):
            clean = type(config).from_dict(settings)
            model = AutoModelForCausalLM.from_config(clean, dtype=torch.float32)
        model.load_state_dict(packed.state_dict(), assign=True)
        model.tie_weights()
        return model

    def read_tokenizer(self) -> PreTrainedTokenizerFast:
        """Read the tokenizer with the word splitting of its makers.

        transformers 5.23 does not know the pre-tokenizer `smollm`: single digits, then the words
        of GPT-2. It uses GPT-2's alone, which cuts newlines before a digit differently.
        """
        tokenizer = PreTrainedTokenizerFast.from_pretrained(self._folder, gguf_file=self._name)
        if self._pre_tokenizer == "smollm":
            tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
                [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
            )
        return tokenizer


def _describe(file_type: int) -> str:
    """Return a note such as `4-bit (Q4_1) weights unpacked to float32`."""
    stored = LlamaFileType(file_type).name.removeprefix("MOSTLY_").removeprefix("ALL_")
    if bits := re.search("[0-9]+", stored):
        return f"{bits.group()}-bit ({stored}) weights unpacked to float32"
    return "weights of a GGUF file unpacked to float32"
