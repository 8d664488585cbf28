"""What a retrofit of each model family differs by from `transformers`, on tiny random models.

Each column is the largest difference of two ways to compute the same, in float64; that of an
exported folder in float32. Prints a table; docs/families.md has it.

segment   a retrofit that sees one segment, beside the base
streaming one token at a time with a cache, beside all segments at once
control   the base confined to segments, beside the base run segment by segment
rival     keys and values of all tokens carried, beside the base that sees the whole document
loss      nats of the next token by hidden states, beside those of the base's own logits
export    a folder that `transformers` opens, beside the retrofit that it was made from
generate  the logits of `generate` there, beside those of one forward pass
"""

import argparse
import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging

from infini_retrofit.evaluation.rival import Rival, make_rival
from infini_retrofit.generation.cache import InfiniCache
from infini_retrofit.generation.generation import enable_generation
from infini_retrofit.generation.versions import CACHE
from infini_retrofit.layer.form import InfiniParams
from infini_retrofit.model.base import load_base
from infini_retrofit.model.checkpoints import load_retrofit, save_retrofit
from infini_retrofit.model.retrofit import infini_modules, insert_infini
from infini_retrofit.model.running import run_folded, run_in_layer
from infini_retrofit.pipeline.files import write_manifest
from infini_retrofit.scoring.score import next_token_nlls
from infini_retrofit.share.card import About
from infini_retrofit.share.exported_folder import export_model

SEGMENT, DOCUMENT = 5, 15  # tokens
_SIZES = {
    "vocab_size": 61,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_MOVING = {"rope_theta": 1e4, "factor": 4.0}
_LONG = {"original_max_position_embeddings": 7, "short_factor": [1.5] * 6, "long_factor": [3.0] * 6}
# What each family can do beside the others: every line is a model.
MODELS: dict[str, dict[str, object]] = {
    "gemma": {"head_dim": 16},
    "gpt_neox": {"rotary_pct": 0.5},
    "granite": {"attention_multiplier": 0.1, "logits_scaling": 4.0, "residual_multiplier": 0.5},
    "llama": {"attention_bias": True},
    "llama dynamic": {
        "max_position_embeddings": DOCUMENT,
        "rope_parameters": {"rope_type": "dynamic", **_MOVING},
    },
    "mistral": {"sliding_window": 3},
    "olmo": {"clip_qkv": 0.5},
    "olmo2": {},
    "phi": {"partial_rotary_factor": 0.5, "qk_layernorm": True},
    "phi3": {"sliding_window": 6},
    "phi3 longrope": {
        "original_max_position_embeddings": 7,
        "rope_parameters": {"rope_type": "longrope", **_MOVING, **_LONG},
    },
    "qwen2": {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1},
    "qwen3": {"head_dim": 16},
    "smollm3": {"no_rope_layers": [1, 0]},
    "stablelm": {"partial_rotary_factor": 0.5, "qk_layernorm": True, "use_qkv_bias": True},
    "starcoder2": {"use_bias": True, "sliding_window": 3},
}
COLUMNS = ("segment", "streaming", "control", "rival", "loss", "export", "generate")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure each family and print a row of the table."""
    argparse.ArgumentParser(
        "python -m analysis families",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args(arguments)
    logging.disable_progress_bar()
    print(f"| model | {' | '.join(COLUMNS)} |\n| --- |{' --: |' * len(COLUMNS)}")
    for name in MODELS:
        found = differences(name)
        print(f"| {name} | {' | '.join(f'{found[column]:.0e}' for column in COLUMNS)} |")


def make_base(name: str) -> PreTrainedModel:
    """Make a tiny model of which no weight has its usual start."""
    config = AutoConfig.for_model(name.split()[0], **_SIZES | MODELS[name])
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight_name, weight in model.named_parameters():
            is_norm = weight.ndim == 1 and weight_name.endswith("weight")
            weight.copy_(is_norm + 0.2 * torch.randn(weight.shape, generator=generator))
    return model.eval()


@torch.no_grad()
def differences(name: str) -> dict[str, float]:
    """Return the largest difference in each column of the table."""
    ids = torch.randint(_SIZES["vocab_size"], (2, DOCUMENT), generator=torch.manual_seed(0))
    make = functools.partial(make_base, name)
    base, form = make().double(), InfiniParams(segment_length=SEGMENT, local_context=2)
    first, whole = ids[:, :SEGMENT], base(ids, use_cache=False).logits
    own, model = base(first, use_cache=False), make().double()
    insert_infini(model, form)
    head, states = model.get_output_embeddings(), run_in_layer(model, first)
    found = {"segment": head(states) - own.logits}
    one_row = next_token_nlls(model, first[0], states[0])
    found["loss"] = one_row - F.cross_entropy(own.logits[0, :-1], first[0, 1:], reduction="none")
    stir(model)
    folded = head(run_folded(model, ids, SEGMENT))
    enable_generation(model, form)
    found["streaming"] = stream(model, ids) - folded
    control = make().double()
    insert_infini(control, InfiniParams(segment_length=SEGMENT, memory="off"))
    segments = [base(x, use_cache=False).logits for x in ids.split(SEGMENT, dim=1)]
    found["control"] = head(run_folded(control, ids, SEGMENT)) - torch.cat(segments, dim=1)
    rival = make_rival(base, Rival(segment_length=SEGMENT, num_tokens=DOCUMENT - SEGMENT))
    found["rival"] = head(run_folded(rival, ids, SEGMENT)) - whole
    with tempfile.TemporaryDirectory() as folder:
        found |= exported(make(), form, ids, Path(folder))
    return {column: x.abs().max().item() for column, x in found.items()}


def stir(model: PreTrainedModel) -> None:
    """Move what a base's attention lacks from its start."""
    generator = torch.Generator().manual_seed(1)
    for module in infini_modules(model).values():
        for group in module.memory_parameters().values():
            for weight in group:
                weight.add_(0.3 * torch.randn(weight.shape, generator=generator))


def stream(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Return the logits of tokens that are read one at a time."""
    cache, tokens = InfiniCache(model), ids.split(1, dim=1)
    outs = [model(token, use_cache=True, **{CACHE: cache}) for token in tokens]
    return torch.cat([out.logits for out in outs], dim=1)


def exported(
    base: PreTrainedModel, form: InfiniParams, ids: Tensor, folder: Path
) -> dict[str, Tensor]:
    """Save, export and open a retrofit; compare its logits, and those of `generate`."""
    base_dir, retrofit, out = (folder / name for name in ("base", "retrofit", "out"))
    base.save_pretrained(base_dir)
    tokens = {str(i): i for i in range(base.config.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(tokens, unk_token="0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(base_dir)
    write_manifest(base_dir)
    model = load_base(base_dir, torch.float32)
    insert_infini(model, form)
    stir(model)
    save_retrofit(model, form, base_dir, retrofit)
    model, _ = load_retrofit(base_dir, retrofit, torch.float32)
    enable_generation(model, form)
    export_model(base_dir, retrofit, out, About(metrics={}, training={}))
    opened = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    logits = opened(ids, use_cache=False).logits
    prompt, how = ids[:, :SEGMENT], {"do_sample": False, "max_new_tokens": DOCUMENT}
    more = opened.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        output_logits=True,
        return_dict_in_generate=True,
        **how,
    )
    again = opened(more.sequences, use_cache=False).logits[:, SEGMENT - 1 : -1]
    return {
        "export": logits - model(ids, use_cache=False).logits,
        "generate": torch.stack(more.logits, dim=1) - again,
    }


if __name__ == "__main__":
    main()
