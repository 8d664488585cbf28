"""The forms that tests share, and layers and models of which no parameter has its usual start.

What an Infini layer computes, token by token, is infini_retrofit/layer/naive.py.
"""

import math
import random
from itertools import combinations

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from infini_retrofit.layer.attention import InfiniAttention
from infini_retrofit.layer.form import AttentionShape, InfiniParams
from infini_retrofit.layer.memory import MemoryState, quotient, retrieve
from infini_retrofit.layer.naive import NaiveLayer
from infini_retrofit.layer.probe import Probe
from infini_retrofit.layer.state import State
from infini_retrofit.model.families import decoder_layers, family_of
from infini_retrofit.model.retrofit import alphas, infini_modules, insert_infini
from infini_retrofit.model.running import run_folded
from tests.tiny import FAMILIES, Family, tiny_model

# Sizes of the layer that stands for all forms. No two are equal.
SEGMENT, WIDTH, LAYER = 3, 11, 2
SHAPE = AttentionShape(
    hidden_size=WIDTH, num_heads=4, num_kv_heads=2, head_dim=5, qkv_bias=True, o_bias=True
)
CHOICES = {
    "update_rule": ("linear", "delta", "delta_gamma", "gated_delta"),
    "feature_map": ("elu1", "hedgehog", "unit"),
    "num_features": ("base", 4),
    "local": ("softmax", "linear"),
    "positions": ("rope", "alibi", "none"),
    "heads": ("base", "single"),
    "gate": ("head", "query"),
    "decay": ("none", "feature"),
    "seed_scaling": (False, True),
    "state_dtype": ("float32", "bfloat16"),
    "bptt_segments": ("all", 1, 2),
    "local_context": (0, 1, 2, SEGMENT + 1, 2 * SEGMENT),
}


def infini_params(**over: object) -> InfiniParams:
    return InfiniParams(**{"segment_length": 5} | over)


def without_conflicts(form: dict) -> dict:
    """Return a form without choices that others exclude."""
    form = dict(form)
    if form.get("update_rule") == "gated_delta":
        form |= {"feature_map": "unit", "local": "softmax"}
    elif form.get("feature_map") == "unit":
        form |= {"feature_map": "elu1"}
    if form.get("update_rule", "linear") != "linear":
        form |= {"decay": "none", "seed_scaling": False}
    if form.get("feature_map", "elu1") == "elu1":
        form |= {"num_features": "base"}
    if form.get("heads") == "single":
        form = {"init": "random_attention"} | form
        form |= {"positions": "none"} if form.get("positions", "rope") == "rope" else {}
    if form.get("local") == "linear" and form.get("positions") == "alibi":
        form |= {"positions": "none"}
    return form


def pairwise_forms() -> list[dict]:
    """Return few forms in which any two choices meet, unless one excludes the other."""
    draw, published = random.Random(0), {name: values[0] for name, values in CHOICES.items()}
    others = [{name: draw.choice(values) for name, values in CHOICES.items()} for _ in range(2000)]
    pool = [without_conflicts(form) for form in (published, *others)]
    pairs = [set(combinations(form.items(), 2)) for form in pool]
    missing, best, forms = set.union(*pairs), 0, []
    while missing:
        missing -= pairs[best]
        forms.append(pool[best] | {"segment_length": SEGMENT})
        best = max(range(len(pool)), key=lambda i: len(pairs[i] & missing))
    return forms


FORMS = pairwise_forms()
PUBLISHED = FORMS[0]
# A branch that is a memory and nothing else, of what came next.
MEMORY_BRANCH = {
    "insertion": "parallel",
    "init": "random_attention",
    "local": "none",
    "positions": "none",
    "heads": "single",
    "memory_key": "before",
    "memory_value": "embedding",
    "feature_map": "unit",
}
# Forms of whole models: each choice at least once.
MODEL_FORMS = (
    {},
    {"layers": [1], "local_context": 6, "bptt_segments": 2, "gate": "query"},
    {"layers": [0, -1], "insertion": "parallel", "update_rule": "delta", "state_dtype": "bfloat16"},
    {"feature_map": "hedgehog", "num_features": 4, "decay": "feature", "state_dtype": "bfloat16"},
    {"layers": [0], "insertion": "adapter", "init": "random_layer", "local_context": 2},
    {
        "positions": "alibi",
        "init": "random_attention",
        "update_rule": "delta_gamma",
        "feature_map": "hedgehog",
        "local_context": 1,
    },
    {
        "heads": "single",
        "init": "random_layer",
        "local": "linear",
        "positions": "none",
        "seed_scaling": True,
    },
    {"update_rule": "gated_delta", "feature_map": "unit", "local_context": 3},
    MEMORY_BRANCH
    | {
        "memory_layers": [1],
        "update_rule": "gated_delta",
        "num_features": 6,
        "local_context": 5,
    },
    MEMORY_BRANCH
    | {
        "memory_layers": [1],
        "update_rule": "neural_cache",
        "key_layer": 0.0,
        "num_slots": 7,
        "num_features": 6,
        "state_dtype": "bfloat16",
        "gate": "query",
    },
)


def num_without_memory(form: dict) -> int:
    """Count the segments of a document before which nothing has left what queries attend to."""
    return 1 + form["local_context"] // SEGMENT


def name_of(x: object) -> str:
    """Name a form by its choices, for pytest."""
    return "-".join(map(str, x.values())) if isinstance(x, dict) else str(x)


every_form = pytest.mark.parametrize("form", FORMS, ids=name_of)
every_model_form = pytest.mark.parametrize("form", MODEL_FORMS, ids=name_of)
both_families = pytest.mark.parametrize("family", FAMILIES)


def make_layer(form: dict, dtype: torch.dtype = torch.float64) -> InfiniAttention:
    """Make a layer none of whose parameters has its usual start."""
    return _stirred(InfiniAttention(SHAPE, infini_params(**form), LAYER).to(dtype))


def retrofitted(family: Family = "llama", **form: object) -> PreTrainedModel:
    """Make a tiny model with Infini layers as they start."""
    model = tiny_model(family)
    insert_infini(model, infini_params(**form))
    return model


def make_model(family: Family, form: dict, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """Make a tiny model of which no parameter that its base lacks has its usual start."""
    model = retrofitted(family, **form).to(dtype)
    for module in infini_modules(model).values():
        _stirred(module)
    for alpha in alphas(model):
        alpha.data.fill_(0.7)
    return model.double() if dtype is torch.float64 else model


@torch.no_grad()
def _stirred(layer: InfiniAttention) -> InfiniAttention:
    """Move the parameters that a base's attention lacks."""
    for name, parameter in layer.named_parameters():
        if "proj" not in name:
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return layer


def draw_hidden(num_rows: int, num_tokens: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(num_rows, num_tokens, WIDTH, dtype=dtype)


def run_layer(layer: InfiniAttention, x: Tensor, first: int = 0, **keywords: object) -> Tensor:
    """Run a layer on rows (R T D) whose positions begin at `first`."""
    return layer(x, rope_tables(x.shape[1], first), **keywords)[0]


def run_naive(
    layer: InfiniAttention, form: dict, x: Tensor, memory_of: Tensor | None = None
) -> Tensor:
    """Compute documents (B T D) token by token, each reading its own memory or that of another."""
    tables = tuple(table[0] for table in rope_tables(x.shape[1]))
    naive = NaiveLayer(layer, infini_params(**form))
    others = [None] * len(x) if memory_of is None else memory_of
    tables = tables if form["positions"] == "rope" else None
    return torch.stack([naive(row, tables, of) for row, of in zip(x, others, strict=True)])


def rope_tables(num_tokens: int, first: int = 0) -> tuple[Tensor, Tensor]:
    """Return cosines and sines (1 T 4) of positions from `first` on."""
    positions = torch.arange(first, first + num_tokens).double()
    angles = positions[:, None] * torch.tensor([1.0, 0.3]).repeat(2)
    return angles.cos()[None], angles.sin()[None]


def set_share(module: nn.Module, share: float) -> None:
    """Set the memory's share in every head of a layer or model, in place."""
    for infini in module.modules():
        if isinstance(infini, InfiniAttention) and infini.gate_logit is not None:
            nn.init.constant_(infini.gate_logit, math.log(share / (1 - share)))


def largest(x: Tensor) -> float:
    """Return the largest absolute value; NaN if there is one."""
    return x.detach().abs().max().item() if x.numel() else 0.0


def recall(feature: Tensor, state: MemoryState) -> Tensor:
    """Read a memory once for each query; an empty one reads as zeros."""
    return quotient(*retrieve(feature, state))


def segment_loop(
    model: PreTrainedModel, input_ids: Tensor, segment_length: int, probe: Probe | None = None
) -> Tensor:
    """Run documents one segment after another, handing over what crosses the border."""
    outputs: list[Tensor] = []
    state = State()
    for begin in range(0, input_ids.shape[1], segment_length):
        ids = input_ids[:, begin : begin + segment_length]
        outputs.append(run_folded(model, ids, ids.shape[1], probe, state, begin))
        state = state.next()
    return torch.cat(outputs, dim=1)


def record_layers(model: PreTrainedModel, input_ids: Tensor) -> dict[str, list[Tensor]]:
    """Note what each layer is given, what its attention returns and what it returns."""
    notes: dict[str, list[Tensor]] = {"given": [], "attention": [], "returned": []}
    name = family_of(model.config).attention
    hooks = []
    for layer in decoder_layers(model):
        attention = getattr(layer, name)
        hooks += [
            layer.register_forward_pre_hook(
                lambda _, args, kwargs: notes["given"].append((*args, *kwargs.values())[0]),
                with_kwargs=True,
            ),
            attention.register_forward_hook(lambda _, __, out: notes["attention"].append(out[0])),
            layer.register_forward_hook(lambda _, __, out: notes["returned"].append(out)),
        ]
    with torch.no_grad():
        model(input_ids=input_ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return notes
