"""Which parameters train, in which group and number type; adapters, and that none is left."""

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from infini_retrofit.model.base import load_base
from infini_retrofit.model.checkpoints import load_retrofit, save_retrofit
from infini_retrofit.model.families import decoder_layers
from infini_retrofit.model.retrofit import BRANCH, attention_modules, infini_modules, insert_infini
from infini_retrofit.model.running import run_folded
from infini_retrofit.training.parameters import GROUPS, LoraParams, add_lora, set_trainable
from tests.reference import both_families, infini_params, largest
from tests.tiny import Family, random_ids, tiny_base_folder, tiny_model
from tests.tiny_training import SEGMENT, TOKENS

FORMS = {
    "published": {},
    "parallel": {"insertion": "parallel", "feature_map": "hedgehog", "decay": "feature"},
    "adapter": {"insertion": "adapter"},
    "query gates": {"feature_map": "hedgehog", "gate": "query"},
    "no memory": {"memory": "off", "feature_map": "hedgehog"},
}
every_form = pytest.mark.parametrize("form", FORMS)
GROUP_OF = {"gate_logit": "gate", "decay_logit": "gate", "alpha": "alpha"} | dict.fromkeys(
    ("query_weight", "key_weight", "query_gate"), "memory"
)
LORA = LoraParams(rank=2, alpha=6.0)
OWN = {"q_proj", "k_proj", "v_proj", "o_proj"}
PROJECTIONS = {"llama": OWN, "gpt_neox": {"query_key_value", "dense"}}


def retrofitted(
    family: Family, form: str = "published", dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    model = tiny_model(family).to(dtype)
    insert_infini(model, infini_params(layers=[0, 2], segment_length=SEGMENT, **FORMS[form]))
    return model


def group_of(name: str) -> str:
    return GROUP_OF.get(name.rpartition(".")[2], "infini")


def owners(model: PreTrainedModel) -> list[nn.Module]:
    """Return the Infini attentions, or the adapters that hold them."""
    layers = decoder_layers(model)
    return [getattr(layers[i], BRANCH, module) for i, module in infini_modules(model).items()]


def ids_of(modules: list[nn.Module]) -> set[int]:
    return {id(p) for module in modules for p in module.parameters()}


@both_families
@every_form
@pytest.mark.parametrize("part", ["memory", "infini", "attention", "all"])
def test_what_trains_is_float32_and_in_one_group_and_the_rest_is_frozen(family, form, part):
    model = retrofitted(family, form, torch.bfloat16)
    groups = set_trainable(model, part)
    assert tuple(groups) == GROUPS == ("gate", "alpha", "memory", "infini", "rest")
    infini = owners(model)
    chosen = {"attention": attention_modules(model) + infini, "all": [model]}.get(part, infini)
    want = ids_of(chosen)
    names = {id(p): group_of(n) for m in infini for n, p in m.named_parameters()}
    if part == "memory":
        want = {key for key, name in names.items() if name != "infini"}
        assert (want == set()) == (form == "no memory")
    got = [p for group in groups.values() for p in group]
    assert {id(p) for p in got} == want == {id(p) for p in model.parameters() if p.requires_grad}
    assert len(got) == len(want)
    assert all(p.dtype is torch.float32 for p in got)
    for name, group in groups.items():
        assert all(names.get(id(p), "rest") == name for p in group), name


def test_whole_layers_train_their_mlp_and_norms_as_infini():
    model = tiny_model("llama")
    insert_infini(model, infini_params(layers=[1]))
    groups = set_trainable(model, "infini", whole_layers=True)
    want = ids_of([decoder_layers(model)[1]])
    assert {id(p) for p in groups["gate"] + groups["infini"]} == want
    assert groups["rest"] == []


@both_families
@every_form
@pytest.mark.parametrize("part", ["memory", "infini"])
def test_what_is_frozen_becomes_16_bit_but_for_what_belongs_to_the_memory(family, form, part):
    model = retrofitted(family, form)
    exact = {n: p.detach().clone() for n, p in model.named_parameters()}
    set_trainable(model, part, frozen_dtype=torch.bfloat16)
    modules = infini_modules(model).values()
    of_memory = {id(p) for m in modules for n, p in m.named_parameters() if group_of(n) != "infini"}
    for name, parameter in model.named_parameters():
        keeps = parameter.requires_grad or id(parameter) in of_memory
        assert parameter.dtype is (torch.float32 if keeps else torch.bfloat16), name
        assert not keeps or torch.equal(parameter, exact[name])


def move(groups: dict[str, list[nn.Parameter]]) -> None:
    """Move everything that trains, so that no adapter is zero any more."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in (p for group in groups.values() for p in group):
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


@both_families
@every_form
def test_adapters_start_as_zero_and_merge_to_what_they_did(family, form):
    plain, model = retrofitted(family, form), retrofitted(family, form)
    tuner, groups = add_lora(model, LORA, seed=0)
    ids = random_ids(model.config.vocab_size, 2, TOKENS)
    start = run_folded(plain, ids, SEGMENT)
    assert torch.equal(run_folded(model, ids, SEGMENT), start)
    move(groups)
    adapted = run_folded(model, ids, SEGMENT)
    tuner.merge_and_unload()
    assert largest(adapted - start) > 0.1
    assert largest(run_folded(model, ids, SEGMENT) - adapted) < 1e-4
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert not any("lora" in name for name, _ in model.named_modules())


@both_families
@every_form
def test_adapters_of_every_projection_and_what_a_memory_has_of_its_own_train(family, form):
    model = retrofitted(family, form)
    _, groups = add_lora(model, LORA, seed=0)
    for index, attention in enumerate(attention_modules(model)):
        adapted = {name for name, m in attention.named_children() if hasattr(m, "lora_A")}
        is_base = index == 1 or form in ("parallel", "adapter")
        assert adapted == (PROJECTIONS[family] if is_base else OWN)
    grouped = {id(p): name for name, group in groups.items() for p in group}
    move(groups)
    ids = random_ids(model.config.vocab_size, 2, TOKENS)
    run_folded(model, ids, SEGMENT).square().sum().backward()
    infini = infini_modules(model)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (id(parameter) in grouped), name
        assert (parameter.grad is not None) == parameter.requires_grad, name
        if ".lora_" in name:
            is_infini = id(parameter) in ids_of(list(infini.values()))
            assert grouped[id(parameter)] == ("infini" if is_infini else "rest"), name
            assert "mlp" not in name
    assert len(grouped) == sum(map(len, groups.values()))
    for layer in infini.values():
        for name, parameters in layer.memory_parameters().items():
            assert {id(p) for p in parameters} <= {id(p) for p in groups[name]}


@both_families
def test_files_know_nothing_of_adapters_and_what_is_adapted_is_saved_unrounded(family, tmp_path):
    base_dir = tiny_base_folder(tmp_path / "base", family)
    model, params = load_base(base_dir, torch.float32), infini_params(layers=[1])
    start = {name: x.clone() for name, x in model.state_dict().items()}
    insert_infini(model, params)
    tuner, groups = add_lora(model, LORA, seed=0, frozen_dtype=torch.bfloat16)
    move(groups)
    tuner.merge_and_unload()
    save_retrofit(model, params, base_dir, tmp_path / "out")
    loaded, _ = load_retrofit(base_dir, tmp_path / "out", torch.float32)
    want = model.state_dict()
    for name, tensor in loaded.state_dict().items():
        is_adapted = name.split(".")[-2] in OWN | PROJECTIONS[family] or "gate_logit" in name
        assert want[name].dtype is (torch.float32 if is_adapted else torch.bfloat16), name
        assert torch.equal(tensor, want[name] if is_adapted else start[name]), name
