"""Infini layers in whole models of both families: weights, counts, groups."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from infini_retrofit.layer.state import State
from infini_retrofit.model import families
from infini_retrofit.model.families import FAMILIES, PROJECTIONS
from infini_retrofit.model.retrofit import (
    BRANCH,
    attention_modules,
    check_form,
    has_memory,
    infini_modules,
    insert_infini,
    resolve_layers,
    state_bytes,
)
from infini_retrofit.model.running import run_folded, run_in_layer
from tests.reference import MODEL_FORMS, both_families, infini_params, largest, name_of, retrofitted
from tests.tiny import ids_for, tiny_model

SEGMENT, DOCUMENT = 5, 15


@torch.no_grad()
def full_difference(family: str, **form: object) -> float:
    """Compare a retrofitted model that sees one segment with the base's plain forward."""
    base, model = tiny_model(family).double(), retrofitted(family, **form).double()
    hidden = run_in_layer(model, ids_for(base), segment_length=DOCUMENT)
    return largest(model.get_output_embeddings()(hidden) - base(ids_for(base)).logits)


@both_families
@pytest.mark.parametrize("layers", ["all", [1], [0, -1]])
def test_softmax_with_rope_and_base_weights_is_the_base_within_one_segment(family, layers):
    assert full_difference(family, layers=layers) < 1e-9
    assert full_difference(family, layers=layers, positions="none") > 0.01
    assert full_difference(family, layers=layers, init="random_attention") > 0.01


SPLIT = FAMILIES["gpt_neox"].split


def split_by_kind(attention: nn.Module) -> dict[str, Tensor]:
    """Take the fused projection for all q, then all k, then all v."""
    parts = SPLIT(attention)
    for name, fused in attention.query_key_value.state_dict().items():
        for projection, part in zip(PROJECTIONS, fused.chunk(3), strict=False):
            parts[f"{projection}.{name}"] = part
    return parts


def test_a_fused_projection_split_wrongly_is_noticed(monkeypatch):
    wrong = replace(FAMILIES["gpt_neox"], split=split_by_kind)
    monkeypatch.setitem(families.FAMILIES, "gpt_neox", wrong)
    with pytest.raises(ValueError, match=r"must start as its base, got .* differ by"):
        retrofitted("gpt_neox")
    retrofitted("gpt_neox", positions="none")


@both_families
@torch.no_grad()
def test_memory_off_or_no_layers_are_the_base_confined_to_segments(family):
    base = tiny_model(family)
    want = run_folded(base, ids_for(base), SEGMENT)
    for form, exact in (({"memory": "off"}, 1e-5), ({"layers": []}, 0)):
        model = retrofitted(family, **form)
        assert largest(run_folded(model, ids_for(base), SEGMENT) - want) <= exact
        assert state_bytes(model) == 0
    assert base.state_dict().keys() == model.state_dict().keys()
    assert largest(run_folded(retrofitted(family), ids_for(base), SEGMENT) - want) > 0.01


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"layers": [3]}, r"infini\.layers must be in -3\.\.2 for a base of 3 layers, got 3"),
        ({"layers": [0, -4]}, r"infini\.layers must be in -3\.\.2 for a base of 3 layers, got -4"),
        ({"layers": [0, -3]}, r"infini\.layers must name each layer once, got \[0, -3\]"),
        (
            {"feature_map": "hedgehog", "num_features": 14},
            r"infini\.num_features must be at most 12 for heads of 6 channels, got 14",
        ),
        (
            MODEL_FORMS[-1] | {"key_layer": 0.7},
            r"infini\.key_layer must not come after .* got layer 2 for a memory in layer 1",
        ),
    ],
    ids=str,
)
def test_a_form_that_does_not_fit_the_base_is_refused(form, message):
    assert resolve_layers("all", 3) == [0, 1, 2]
    assert resolve_layers([-1, 0], 3) == [0, 2]
    with pytest.raises(ValueError, match=message):
        check_form(infini_params(**form), tiny_model("llama"))
    with pytest.raises(ValueError, match=message):
        retrofitted("llama", **form)


@pytest.mark.parametrize(("key_layer", "index"), [("own", 2), (0.5, 1), (0.3, 0), (0.7, 2)])
@both_families
@torch.no_grad()
def test_keys_are_projections_of_what_their_layer_attends_with(family, key_layer, index):
    form = MODEL_FORMS[-1] | {"memory_layers": [-1], "key_layer": key_layer}
    model, found = retrofitted(family, **form), []
    seen, memory = attention_modules(model)[index], infini_modules(model)[2]
    seen.register_forward_pre_hook(
        lambda _, args, kwargs: found.append(args[0] if args else kwargs["hidden_states"]),
        with_kwargs=True,
    )
    memory.k_proj.register_forward_pre_hook(lambda _, args: found.append(args[0]))
    run_in_layer(model, ids_for(model), SEGMENT)
    assert torch.equal(*found)


@both_families
def test_keys_of_an_earlier_layer_refuse_checkpoints_that_would_lose_their_gradient(family):
    form = MODEL_FORMS[-1] | {"memory_layers": [-1], "key_layer": 0.3}
    model = retrofitted(family, **form).train()
    ids, parameters = ids_for(model), list(model.parameters())

    def gradient() -> Tensor:
        loss = run_folded(model, ids, SEGMENT).square().mean()
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        return torch.cat([x.flatten() for x in found if x is not None])

    want = gradient()
    model.activation_checkpointing_enable({"use_reentrant": False})
    assert torch.equal(gradient(), want)
    model.activation_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.raises(ValueError, match=r"^gradient checkpointing must have use_reentrant=False"):
        run_folded(model, ids, SEGMENT).square().mean().backward()


@both_families
@pytest.mark.parametrize("none", [{"layers": [], "memory_layers": []}, {"memory_layers": []}])
def test_a_model_without_a_memory_reads_embeddings_alone(family, none):
    model = retrofitted(family, **(MODEL_FORMS[-1] | none))
    ids = ids_for(model)
    embeddings = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embeddings).logits, model(ids).logits)


@both_families
def test_only_a_random_layer_loses_the_mlp_and_norms_of_its_base(family):
    old = tiny_model(family).state_dict()
    attention = f".{FAMILIES[family].attention}."
    others = {name for name in old if "layers.1." in name and attention not in name}
    for init in ("base", "random_attention", "random_layer"):
        new = retrofitted(family, layers=[1], init=init).state_dict()
        changed = {name for name in old if name in new and not torch.equal(old[name], new[name])}
        outside = {name for name in changed if attention not in name}
        assert outside == (others if init == "random_layer" else set())
    for insertion in ("parallel", "adapter"):
        new = retrofitted(family, layers=[1], insertion=insertion).state_dict()
        assert all(torch.equal(new[name], x) for name, x in old.items())
        added = new.keys() - old.keys()
        assert added
        assert all(".1." in name and f".{BRANCH}." in name for name in added)


def test_random_weights_come_from_the_seed_alone():
    weights = []
    for seed in (0, 0, 1):
        model, state = tiny_model("llama"), torch.get_rng_state()
        insert_infini(model, infini_params(init="random_attention"), seed)
        assert torch.equal(torch.get_rng_state(), state)
        weights.append(infini_modules(model)[0].q_proj.weight)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("form", [*MODEL_FORMS, {"memory": "off", "local_context": 3}], ids=name_of)
def test_the_bytes_that_cross_a_border_are_those_of_what_is_carried(form):
    model, params, state = tiny_model("llama").bfloat16(), infini_params(**form), State()
    insert_infini(model, params)
    run_folded(model, ids_for(model, 1), SEGMENT, state=state)
    memories = [after.memory for after in state.after.values() if after.memory]
    contexts = [after.context for after in state.after.values() if after.context]
    tensors = [x for memory in memories for x in (memory.matrix, memory.normalizer)]
    tensors += [x for context in contexts for x in (context.key, context.value)]
    want = sum(x.numel() * x.element_size() for x in tensors)
    assert state_bytes(tiny_model("llama"), params) == state_bytes(model) == want > 0


def test_a_model_has_a_memory_if_any_of_its_layers_has_one():
    model = retrofitted("llama", layers=[1, 2])
    assert not has_memory(retrofitted("llama", memory="off"))
    for index in (1, 2):
        assert has_memory(model)
        infini_modules(model)[index].drop_memory()
    assert not has_memory(model)
