"""A tiny GGUF file like the ones that pretrained bases come in."""

import json
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, LlamaFileType
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

# The word splitting that the makers of a family use, by the names of llama.cpp.
SPLITTING = {"llama": "smollm", "qwen2": "qwen2"}


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    kind: str = "Q4_1",
    leave_out: str = "",
    **more: int | np.ndarray,
) -> None:
    """Write a Llama or Qwen2 whose widths are multiples of 32, its matrices packed as `kind`.

    Weights named `leave_out` are missing. `more` stands in the file, too: whole numbers that say
    something of the model, and weights.
    """
    config = model.config
    writer = gguf.GGUFWriter(path, config.model_type)
    writer.add_file_type(LlamaFileType[f"MOSTLY_{kind}"])
    _add_sizes(writer, config)
    for name, value in more.items():
        if isinstance(value, np.ndarray):
            writer.add_tensor(name, value)
        else:
            writer.add_uint32(f"{config.model_type}.{name}", value)
    _add_tokenizer(writer, tokenizer, SPLITTING[config.model_type])
    weights = {name: x for name, x in model.state_dict().items() if name != leave_out}
    _add_weights(writer, weights, config, GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@torch.no_grad()
def round_matrices(model: PreTrainedModel, kind: str) -> None:
    """Give the matrices the values that they have once packed."""
    how = GGMLQuantizationType[kind]
    for weight in model.parameters():
        if weight.ndim == 2:
            packed = gguf.quants.quantize(weight.numpy(), how)
            weight.copy_(torch.from_numpy(gguf.quants.dequantize(packed, how)))


def _add_sizes(writer: gguf.GGUFWriter, config: PretrainedConfig) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _add_tokenizer(
    writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerFast, splitting: str
) -> None:
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splitting)
    writer.add_token_list([token for token, _ in vocabulary])
    writer.add_token_types([3] + [1] * (len(vocabulary) - 1))
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_eos_token_id(0)


def _add_weights(
    writer: gguf.GGUFWriter,
    weights: dict[str, torch.Tensor],
    config: PretrainedConfig,
    kind: GGMLQuantizationType,
) -> None:
    arch = gguf.MODEL_ARCH[config.model_type.upper()]
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for name, weight in weights.items():
        values = weight.numpy()
        if config.model_type == "llama" and ("q_proj" in name or "k_proj" in name):
            # GGUF keeps the two channels of a rotated pair side by side, transformers apart.
            heads = values.reshape(-1, 2, config.head_dim // 2, values.shape[1])
            values = np.ascontiguousarray(heads.swapaxes(1, 2).reshape(values.shape))
        gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if values.ndim == 1:
            writer.add_tensor(gguf_name, values)
        else:
            writer.add_tensor(gguf_name, gguf.quants.quantize(values, kind), raw_dtype=kind)
