"""The equal-bytes rival against a base that runs on a cache of `transformers`."""

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from infini_retrofit.evaluation.rival import Rival, make_rival, rival_of
from infini_retrofit.layer.naive import place_at
from infini_retrofit.model.retrofit import infini_modules, state_bytes
from infini_retrofit.model.running import run_folded
from tests.reference import both_families, infini_params, largest, make_model
from tests.tiny import random_ids, tiny_model

SEGMENT, DOCUMENT = 5, 20


def carried_cache(
    model: PreTrainedModel, cache: DynamicCache, first: DynamicCache, begin: int, num_carried: int
) -> DynamicCache:
    """Keep the last tokens and, next to them, the first, whose key position 0 never turned."""
    at, carried = begin - num_carried, DynamicCache()
    if at <= 0:
        return cache
    tables = model.base_model.rotary_emb(torch.zeros(1, dtype=torch.float64), torch.tensor([[at]]))
    tables = tuple(table[0].expand(at + 1, -1) for table in tables)
    for index, (layer, sink) in enumerate(zip(cache.layers, first.layers, strict=True)):
        window = slice(layer.keys.shape[2] - num_carried + 1, None)
        turned = [place_at(key, at, tables) for key in sink.keys[:, :, 0].flatten(0, 1)]
        sink_key = torch.stack(turned).view_as(sink.keys[:, :, :1])
        key = torch.cat([sink_key, layer.keys[:, :, window]], dim=2)
        value = torch.cat([sink.values[:, :, :1], layer.values[:, :, window]], dim=2)
        carried.update(key, value, index)
    return carried


def loop_with_carried_keys(model: PreTrainedModel, ids: Tensor, num_carried: int) -> Tensor:
    """Run a base segment by segment on a transformers cache of what is carried."""
    outputs, cache, first = [], None, None
    for begin in range(0, DOCUMENT, SEGMENT):
        if cache is not None:
            cache = carried_cache(model, cache, first, begin, num_carried)
        out = model.base_model(
            input_ids=ids[:, begin : begin + SEGMENT],
            position_ids=torch.arange(begin, begin + SEGMENT).expand(len(ids), -1),
            past_key_values=cache,
            use_cache=True,
        )
        cache = out.past_key_values
        first = cache if first is None else first
        outputs.append(out.last_hidden_state)
    return torch.cat(outputs, dim=1)


BRANCH = {"insertion": "parallel", "init": "random_attention"}
# Forms, and how many tokens their bytes buy in each family.
RIVALS = [
    ({"layers": [0]}, {"llama": 3, "gpt_neox": 4}),
    ({}, {"llama": 7, "gpt_neox": 11}),
    ({"layers": [0], "memory": "off", "local_context": 3}, {"llama": 1, "gpt_neox": 1}),
    (BRANCH | {"layers": [0]}, {"llama": 3, "gpt_neox": 4}),
    ({"insertion": "adapter", "layers": [0]}, {"llama": 3, "gpt_neox": 4}),
]


@both_families
@pytest.mark.parametrize(("form", "nums_carried"), RIVALS)
@pytest.mark.parametrize("inserted", [True, False])
@torch.no_grad()
def test_the_rival_carries_keys_and_values_in_every_layer(family, form, nums_carried, inserted):
    base, params = tiny_model(family).double(), infini_params(**form)
    model = make_model(family, form) if inserted else tiny_model(family).double()
    rival = Rival(segment_length=SEGMENT, num_tokens=nums_carried[family])
    assert rival_of(model, params).num_tokens == rival.num_tokens
    ids = random_ids(base.config.vocab_size, 2, DOCUMENT)
    before, made = run_folded(model, ids, SEGMENT), make_rival(model, rival)
    want = loop_with_carried_keys(base, ids, rival.num_tokens)
    assert largest(run_folded(made, ids, SEGMENT) - want) < 1e-9
    assert largest(run_folded(base, ids, SEGMENT) - want) > 0.01
    assert torch.equal(run_folded(model, ids, SEGMENT), before)
    assert not any(name.endswith(("alpha", "gate_logit")) for name in made.state_dict())


@pytest.mark.parametrize(
    "form",
    [
        {"local": "linear", "positions": "none", "heads": "single", "init": "random_layer"},
        {"positions": "alibi", "feature_map": "hedgehog", "gate": "query"},
    ],
    ids=str,
)
def test_the_rival_keeps_a_layers_own_attention_and_weights(form):
    model, params = make_model("llama", {"layers": [0]} | form), infini_params(**form)
    before = dict(infini_modules(model)[0].named_parameters())
    made = make_rival(model, Rival(segment_length=SEGMENT, num_tokens=3))
    modules, shared = infini_modules(made), set(model.parameters())
    after = dict(modules[0].named_parameters())
    assert modules[0].params.local == params.local
    of_memory = {name for name in before if name.startswith("memory.")}
    assert before.keys() - after.keys() == of_memory | {"gate_logit"}
    assert all(after[name] is before[name] for name in after)
    assert all("attn" in name for name, weight in made.named_parameters() if weight not in shared)
    assert dict(infini_modules(model)[0].named_parameters()).keys() == before.keys()
    assert [(m.local_context, m.memory) for m in modules.values()] == [(3, None)] * 3


@pytest.mark.parametrize(
    "form",
    [
        {},
        {"layers": [0, 2], "local_context": 2},
        {"layers": [0], "feature_map": "hedgehog", "insertion": "parallel"},
        {"state_dtype": "bfloat16", "local_context": 2},
    ],
    ids=str,
)
def test_the_rival_spends_no_less_than_the_retrofit_and_one_token_less_would(form):
    model, params = tiny_model("llama"), infini_params(**form, segment_length=16)
    budget, rival = state_bytes(model, params), rival_of(model, params)
    spent = state_bytes(make_rival(model, rival))
    assert spent / rival.num_tokens * (rival.num_tokens - 1) < budget <= spent
