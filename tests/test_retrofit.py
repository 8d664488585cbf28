"""Infini layers in whole models of both families: weights, counts, groups."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from infini_retrofit.layer.form import InfiniParams
from infini_retrofit.layer.probe import Probe
from infini_retrofit.layer.state import LayerState, State
from infini_retrofit.model import families
from infini_retrofit.model.families import FAMILIES, PROJECTIONS, decoder_layers
from infini_retrofit.model.retrofit import (
    check_form,
    has_memory,
    infini_modules,
    insert_infini,
    resolve_layers,
    state_bytes,
)
from infini_retrofit.model.running import run_folded, run_in_layer
from tests.reference import infini_params, largest
from tests.tiny import random_ids, tiny_model

SEGMENT, DOCUMENT = 5, 15
both_families = pytest.mark.parametrize("family", sorted(FAMILIES))


def retrofitted(family: str, params: InfiniParams) -> PreTrainedModel:
    model = tiny_model(family).double()
    insert_infini(model, params)
    return model


def ids_for(model: PreTrainedModel, num_rows: int = 2) -> Tensor:
    return random_ids(model.config.vocab_size, num_rows, DOCUMENT)


def full_difference(family: str, **over: object) -> float:
    """Compare a retrofitted model that sees one segment with the base's plain forward."""
    base, model = tiny_model(family).double(), retrofitted(family, infini_params(**over))
    ids = ids_for(base)
    with torch.no_grad():
        want = base(input_ids=ids).logits
        hidden = run_in_layer(model, ids, segment_length=DOCUMENT)
        return largest(model.get_output_embeddings()(hidden) - want)


@both_families
@pytest.mark.parametrize("layers", ["all", [1], [0, -1]])
def test_softmax_with_rope_and_base_weights_is_the_base_within_one_segment(family, layers):
    assert full_difference(family, layers=layers) < 1e-9
    assert full_difference(family, layers=layers, positions="none") > 0.01
    assert full_difference(family, layers=layers, init="random_attention") > 0.01


def split_by_kind(attention: nn.Module) -> dict[str, Tensor]:
    """Take the fused projection for all q, then all k, then all v."""
    parts = FAMILIES_AS_THEY_ARE["gpt_neox"].split(attention)
    for name, fused in attention.query_key_value.state_dict().items():
        for projection, part in zip(PROJECTIONS, fused.chunk(3), strict=False):
            parts[f"{projection}.{name}"] = part
    return parts


def split_without_bias(attention: nn.Module) -> dict[str, Tensor]:
    parts = FAMILIES_AS_THEY_ARE["gpt_neox"].split(attention)
    return {name: x for name, x in parts.items() if name.endswith("weight")}


FAMILIES_AS_THEY_ARE = dict(FAMILIES)


@pytest.mark.parametrize("split", [split_by_kind, split_without_bias])
def test_a_fused_projection_split_wrongly_is_noticed(split, monkeypatch):
    monkeypatch.setitem(families.FAMILIES, "gpt_neox", replace(FAMILIES["gpt_neox"], split=split))
    assert full_difference("gpt_neox") > 0.01


@both_families
def test_memory_off_is_the_base_with_its_layers_confined(family):
    base = tiny_model(family).double()
    ids = ids_for(base)
    with torch.no_grad():
        want = run_folded(base, ids, SEGMENT)
        model = retrofitted(family, infini_params())
        assert largest(run_folded(model, ids, SEGMENT, Probe(read="off")) - want) < 1e-9
        without = retrofitted(family, infini_params(memory="off"))
        assert largest(run_folded(without, ids, SEGMENT) - want) < 1e-9
        assert largest(run_folded(model, ids, SEGMENT) - want) > 0.01


def test_layers_may_be_counted_from_either_end():
    assert resolve_layers("all", 3) == [0, 1, 2]
    assert resolve_layers([-1, 0], 3) == [0, 2]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([3], r"infini\.layers must be in -3\.\.2 for a base of 3 layers, got 3"),
        ([0, -4], r"infini\.layers must be in -3\.\.2 for a base of 3 layers, got -4"),
        ([0, -3], r"infini\.layers must name each layer once, got \[0, -3\]"),
    ],
)
def test_layers_out_of_range_or_named_twice_are_refused(layers, message):
    with pytest.raises(ValueError, match=message):
        insert_infini(tiny_model("llama"), infini_params(layers=layers))


def changed_names(family: str, init: str) -> set[str]:
    """Return which tensors of layer 1, but for the attention's, an insertion changes."""
    base, model = tiny_model(family), tiny_model(family)
    insert_infini(model, infini_params(layers=[1], init=init))
    old, new = base.state_dict(), model.state_dict()
    names = {name for name in old if name in new and not torch.equal(old[name], new[name])}
    return {name.split("layers.")[-1] for name in names if "attn" not in name}


@both_families
def test_only_a_random_layer_loses_the_mlp_and_norms_of_its_base(family):
    others = {
        n for n in decoder_layers(tiny_model(family))[1].state_dict() if "attention." not in n
    }
    others = {f"1.{name}" for name in others if "attn" not in name}
    assert changed_names(family, "random_attention") == changed_names(family, "base") == set()
    assert changed_names(family, "random_layer") == others


def test_random_weights_come_from_the_seed_alone():
    params, weights = infini_params(init="random_attention"), []
    for seed in (0, 0, 1):
        model, state = tiny_model("llama"), torch.get_rng_state()
        insert_infini(model, params, seed)
        assert torch.equal(torch.get_rng_state(), state)
        weights.append(model.state_dict())
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(weights[0][name], weights[1][name])
    assert not torch.equal(weights[0][name], weights[2][name])


def test_gates_stay_float32_in_a_bfloat16_model():
    model = tiny_model("llama").bfloat16()
    insert_infini(model, infini_params(init="random_attention"))
    dtypes = {name.split(".")[-2]: p.dtype for name, p in model.named_parameters()}
    assert dtypes.pop("self_attn") is torch.float32
    assert set(dtypes.values()) == {torch.bfloat16}


BYTES = [
    {"heads": "single"},
    {"local_context": 3},
    {"memory": "off", "local_context": 3},
    {"memory": "off", "local_context": 3, "heads": "single"},
    {"feature_map": "hedgehog", "update_rule": "delta"},
    {"feature_map": "hedgehog", "num_features": 4, "decay": "feature"},
    {"insertion": "parallel", "init": "random_attention", "local_context": 2},
    {"memory": "off", "local": "linear", "feature_map": "hedgehog", "local_context": 1},
    {"state_dtype": "bfloat16", "decay": "feature", "local_context": 1},
]


@pytest.mark.parametrize("over", BYTES, ids=lambda over: "-".join(map(str, over.values())))
def test_the_bytes_that_cross_a_border_are_those_of_what_is_carried(over):
    form = {"layers": [0, 2], "init": "random_layer", "positions": "none"} | over
    model, params = tiny_model("llama").bfloat16(), infini_params(**form)
    insert_infini(model, params)
    state = State()
    run_folded(model, ids_for(model, 1), SEGMENT, state=state)
    tensors = [x for s in state.after.values() for x in tensors_of(s)]
    want = sum(x.numel() * x.element_size() for x in tensors)
    assert state_bytes(model, params) == want > 0
    assert state_bytes(model) == want


def tensors_of(state: LayerState) -> list[Tensor]:
    memory, context = state.memory, state.context
    tensors = [] if memory is None else [memory.matrix, memory.normalizer]
    return tensors + ([] if context is None else [context.key, context.value])


@pytest.mark.parametrize("insertion", ["replace", "parallel"])
def test_a_model_has_a_memory_if_any_of_its_layers_has_one(insertion):
    base, model, without = (tiny_model("llama") for _ in range(3))
    form = {"insertion": insertion, "layers": [1, 2]}
    insert_infini(model, infini_params(**form))
    insert_infini(without, infini_params(**form, memory="off"))
    assert [has_memory(m) for m in (base, model, without)] == [False, True, False]
    infini_modules(model)[1].drop_memory()
    assert has_memory(model)
    infini_modules(model)[2].drop_memory()
    assert not has_memory(model)


def test_no_layers_are_the_plain_base():
    base, model = tiny_model("llama"), tiny_model("llama")
    params = infini_params(layers=[])
    insert_infini(model, params)
    assert infini_modules(model) == {}
    assert state_bytes(model, params) == 0
    assert base.state_dict().keys() == model.state_dict().keys()
    with torch.no_grad():
        ids = ids_for(base)
        assert torch.equal(run_folded(model, ids, SEGMENT), run_folded(base, ids, SEGMENT))


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ({"layers": [0, 3]}, r"infini\.layers must be in -3\.\.2 for a base of 3 layers, got 3"),
        (
            {"feature_map": "hedgehog", "num_features": 14},
            r"infini\.num_features must be at most 12 for heads of 6 channels, got 14",
        ),
    ],
)
def test_a_form_that_does_not_fit_the_base_is_refused(over, message):
    with pytest.raises(ValueError, match=message):
        check_form(infini_params(**over), tiny_model("llama").config)
