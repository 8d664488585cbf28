"""The equal-bytes rival against a base that runs on a cache of `transformers`."""

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from infini_retrofit.evaluation.rival import carried_tokens, make_rival
from infini_retrofit.layer.naive import place_at
from infini_retrofit.model.families import FAMILIES
from infini_retrofit.model.retrofit import infini_modules, insert_infini, state_bytes
from infini_retrofit.model.running import run_folded
from tests.reference import infini_params, largest
from tests.tiny import random_ids, tiny_model

SEGMENT, DOCUMENT = 5, 15
both_families = pytest.mark.parametrize("family", sorted(FAMILIES))


def carried_cache(
    model: PreTrainedModel, cache: DynamicCache, first: DynamicCache, begin: int, num_carried: int
) -> DynamicCache:
    """Keep of a cache the last tokens and, next to them, the document's first.

    The first token's key was never turned: it stood at position 0.
    """
    at, carried = begin - num_carried, DynamicCache()
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


RIVALS = {
    "as many tokens as fit": {"layers": [0]},
    "a whole segment": {},
    "one token": {"layers": [0], "memory": "off", "local_context": 3},
}


@both_families
@pytest.mark.parametrize("form", RIVALS)
@pytest.mark.parametrize("inserted", [True, False])
def test_the_equal_bytes_rival_carries_keys_and_values_in_every_layer(family, form, inserted):
    base, model = tiny_model(family).double(), tiny_model(family).double()
    params = infini_params(**RIVALS[form])
    num_carried = carried_tokens(model, params)
    assert num_carried in {"one token": (1,), "a whole segment": (5,)}.get(form, (2, 3, 4))
    if inserted:
        insert_infini(model, params)
    make_rival(model, num_carried, SEGMENT)
    ids = random_ids(base.config.vocab_size, 2, DOCUMENT)
    with torch.no_grad():
        got, want = run_folded(model, ids, SEGMENT), loop_with_carried_keys(base, ids, num_carried)
        confined = run_folded(base, ids, SEGMENT)
    assert largest(got - want) < 1e-9
    assert largest(confined - want) > 0.01


KEPT = [
    {"local": "linear", "positions": "none", "heads": "single", "init": "random_layer"},
    {"feature_map": "hedgehog", "gate": "query"},
    {"positions": "alibi", "decay": "feature"},
]


@pytest.mark.parametrize("form", KEPT, ids=lambda form: "-".join(map(str, form.values())))
def test_the_rival_keeps_a_layers_own_attention_and_weights(form):
    model, params = tiny_model("llama"), infini_params(layers=[0], **form)
    insert_infini(model, params)
    layer = infini_modules(model)[0]
    before = dict(layer.named_parameters())
    of_memory = {name for name in before if name.startswith("memory.")}
    make_rival(model, 3, SEGMENT)
    assert infini_modules(model)[0] is layer
    after = dict(layer.named_parameters())
    assert before.keys() - after.keys() == of_memory | {"gate_logit"}
    assert all(after[name] is before[name] for name in after)
    assert layer.local == params.local
    modules = infini_modules(model).values()
    assert [m.local_context for m in modules] == [3] * 3
    assert all(m.memory is None for m in modules)


@both_families
@pytest.mark.parametrize("layers", ["all", [0]])
def test_the_rival_of_a_parallel_branch_is_that_of_the_base(family, layers):
    base, model = tiny_model(family).double(), tiny_model(family).double()
    params = infini_params(insertion="parallel", init="random_attention", layers=layers)
    insert_infini(model, params)
    for module in infini_modules(model).values():
        module.alpha.data[:] = 3
    num_carried = carried_tokens(base, params)
    assert carried_tokens(model, params) == num_carried
    make_rival(model, num_carried, SEGMENT)
    ids = random_ids(base.config.vocab_size, 2, DOCUMENT)
    with torch.no_grad():
        got, want = run_folded(model, ids, SEGMENT), loop_with_carried_keys(base, ids, num_carried)
    assert largest(got - want) < 1e-9
    assert not any(name.endswith("alpha") for name, _ in model.named_parameters())


SPENDING = [
    {},
    {"layers": [0]},
    {"local_context": 2},
    {"layers": [0, 2]},
    {"layers": [1], "feature_map": "hedgehog"},
    {"layers": [0], "feature_map": "hedgehog", "insertion": "parallel"},
    {"state_dtype": "bfloat16", "local_context": 2},
]


@pytest.mark.parametrize("over", SPENDING)
def test_the_rival_spends_no_less_than_the_retrofit_and_one_token_less_would(over):
    model, params = tiny_model("llama"), infini_params(**over, segment_length=16)
    budget, num_carried = state_bytes(model, params), carried_tokens(model, params)
    make_rival(model, num_carried, params.segment_length)
    spent = state_bytes(model)
    assert spent / num_carried * (num_carried - 1) < budget <= spent
