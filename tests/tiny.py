"""Tiny models of both families that every test can share, and folders like models/base.

Sizes differ wherever the family lets them, and no weight stands at its usual start (norms at one,
biases at zero): a layer that forgets one of them gives other outputs.
"""

import json
from pathlib import Path
from typing import Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from infini_retrofit.model import base_attention
from infini_retrofit.model.base import load_base
from infini_retrofit.pipeline.files import write_manifest

Family = Literal["llama", "gpt_neox"]
FAMILIES: tuple[Family, ...] = ("llama", "gpt_neox")
WEIGHT_STD = 0.2
TOKENIZER_SIZE = 277
_SENTENCES = [
    "The quick brown fox jumps over the lazy dog, and the dog sleeps on.",
    "A memory of fixed size keeps what the segments before had to say.",
    "In 1984 the town had 12,345 inhabitants; the river was 67 km long.",
    "She sells sea shells by the sea shore, and the shells she sells are sea shells.",
]


def tiny_llama(seed: int = 0, **over: object) -> LlamaForCausalLM:
    """Make a Llama of 3 layers with grouped heads: 4 of queries, 2 of keys and values."""
    sizes = {
        "vocab_size": 67,
        "hidden_size": 24,
        "head_dim": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 3,
        "intermediate_size": 37,
        "max_position_embeddings": 512,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return _randomize(LlamaForCausalLM(LlamaConfig(**sizes | over)), seed)


def tiny_neox(seed: int = 0, **over: object) -> GPTNeoXForCausalLM:
    """Make a GPT-NeoX of 3 layers: parallel residual, biases, 4 of 10 head channels rotated."""
    sizes = {
        "vocab_size": 71,
        "hidden_size": 30,
        "num_attention_heads": 3,
        "num_hidden_layers": 3,
        "intermediate_size": 53,
        "max_position_embeddings": 512,
        "use_parallel_residual": True,
        "attention_bias": True,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.4,
        },
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return _randomize(GPTNeoXForCausalLM(GPTNeoXConfig(**sizes | over)), seed)


def tiny_qwen2(seed: int = 0, **over: object) -> Qwen2ForCausalLM:
    """Make a Qwen2 of 2 layers: biases, and rotations of another base than the usual."""
    sizes = {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 2,
        "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "rope_theta": 50.0},
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return _randomize(Qwen2ForCausalLM(Qwen2Config(**sizes | over)), seed)


def tiny_model(family: Family, seed: int = 0, **over: object) -> PreTrainedModel:
    return {"llama": tiny_llama, "gpt_neox": tiny_neox}[family](seed, **over)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer: all 256 bytes, so that no text is out of reach."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENIZER_SIZE,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_SENTENCES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


def tiny_base_folder(folder: Path, family: Family = "llama", seed: int = 0, **over: object) -> Path:
    """Write a folder like models/base and return it; the model's vocabulary is the tokenizer's."""
    tokenizer = tiny_tokenizer()
    model = tiny_model(family, seed, **{"vocab_size": len(tokenizer)} | over)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    about = {
        "name": f"tiny-{family}",
        "source": "tests",
        "note": "random weights",
        "num_parameters": model.num_parameters(),
    }
    (folder / "base.json").write_text(json.dumps(about))
    write_manifest(folder)
    return folder


def assert_same_model(folder: Path, want: PreTrainedModel) -> None:
    got, ids = load_base(folder, torch.float32), random_ids(want.config.vocab_size, 2, 11)
    assert not got.training
    assert got.config._attn_implementation == base_attention.NAME
    torch.testing.assert_close(got(ids).logits, want(ids).logits)
    assert all(torch.equal(got.state_dict()[name], x) for name, x in want.state_dict().items())


def ids_for(model: PreTrainedModel, num_rows: int = 2, num_tokens: int = 15) -> torch.Tensor:
    """Draw token ids that a model knows."""
    return random_ids(model.config.vocab_size, num_rows, num_tokens)


def random_ids(vocab_size: int, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def _randomize(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """Give every parameter a random value; norm weights stay near one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * WEIGHT_STD
            is_norm_weight = parameter.ndim == 1 and name.endswith("weight")
            parameter.copy_(1 + noise if is_norm_weight else noise)
    return model.eval()
