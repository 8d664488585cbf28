"""Which parameters train, in which group, and in which number type."""

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from infini_retrofit.model.families import FAMILIES, decoder_layers
from infini_retrofit.model.retrofit import attention_modules, infini_modules, insert_infini
from infini_retrofit.training.parameters import GROUPS, set_trainable
from tests.reference import infini_params
from tests.tiny import tiny_model

both_families = pytest.mark.parametrize("family", sorted(FAMILIES))
FORMS = {
    "published": {},
    "parallel": {"insertion": "parallel", "feature_map": "hedgehog", "decay": "feature"},
    "everything": {
        "feature_map": "hedgehog",
        "gate": "query",
        "decay": "feature",
    },
    "linear": {"local": "linear", "feature_map": "hedgehog", "memory": "off"},
    "nothing": {"memory": "off"},
    "maps that nothing uses": {"memory": "off", "feature_map": "hedgehog"},
}
every_form = pytest.mark.parametrize("form", FORMS)
GATES = ("gate_logit", "decay_logit")
OF_MEMORY = (
    *("query_weight", "key_weight", "query_gate", "write_score"),
    *("recall_gain", "initial_matrix", "initial_logit"),
)


def retrofitted(family: str, form: str, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    model = tiny_model(family).to(dtype)
    insert_infini(model, infini_params(layers=[0, 2], **FORMS[form]))
    return model


def group_of(name: str) -> str:
    """Tell by its name alone in which group a parameter of an Infini layer belongs."""
    last = name.split(".")[-1]
    if last in GATES:
        return "gate"
    if last in OF_MEMORY:
        return "memory"
    return "alpha" if last == "alpha" else "infini"


def parameters_of(modules: list[nn.Module]) -> set[int]:
    return {id(p) for module in modules for p in module.parameters()}


@both_families
@every_form
@pytest.mark.parametrize("part", ["memory", "infini", "attention", "all"])
def test_what_trains_is_float32_and_in_one_group_and_the_rest_is_frozen(family, form, part):
    model = retrofitted(family, form)
    groups = set_trainable(model, part)
    assert tuple(groups) == GROUPS == ("gate", "alpha", "memory", "infini", "rest")
    infini = list(infini_modules(model).values())
    modules = {"attention": attention_modules(model), "all": [model]}.get(part, infini)
    want = parameters_of(modules)
    if part == "memory":
        want = {id(p) for m in infini for n, p in m.named_parameters() if group_of(n) != "infini"}
    got = [p for group in groups.values() for p in group]
    assert {id(p) for p in got} == want == {id(p) for p in model.parameters() if p.requires_grad}
    assert len(got) == len(want)
    assert all(p.dtype is torch.float32 for p in got)
    of_infini = {id(p): group_of(n) for m in infini for n, p in m.named_parameters()}
    for name, group in groups.items():
        assert all(of_infini.get(id(p), "rest") == name for p in group), name


@both_families
@every_form
def test_the_memory_of_a_form_is_all_that_its_base_has_no_counterpart_of(family, form):
    model = retrofitted(family, form)
    groups = set_trainable(model, "memory")
    layer = infini_modules(model)[0]
    extra = [n for n, _ in layer.named_parameters() if "proj" not in n]
    assert sum(len(groups[n]) for n in ("gate", "alpha", "memory")) == 2 * len(extra)
    assert groups["infini"] == groups["rest"] == []
    assert (len(extra) == 0) is (form in ("nothing", "maps that nothing uses"))


def test_whole_layers_train_their_mlp_and_norms_as_infini():
    model = tiny_model("llama")
    insert_infini(model, infini_params(layers=[1]))
    groups = set_trainable(model, "infini", whole_layers=True)
    want = {id(p) for p in decoder_layers(model)[1].parameters()}
    assert {id(p) for p in groups["gate"] + groups["infini"]} == want
    assert groups["rest"] == []
    confined = set_trainable(model, "memory", whole_layers=True)
    assert [id(p) for p in confined["gate"]] == [id(infini_modules(model)[1].gate_logit)]
    assert confined["infini"] == []


def test_a_branch_leaves_the_base_beside_it_to_the_rest():
    model = retrofitted("llama", "parallel")
    groups = set_trainable(model, "attention")
    branch = {id(p) for m in infini_modules(model).values() for p in m.parameters()}
    base = parameters_of(attention_modules(model)) - branch
    assert {id(p) for p in groups["rest"]} == base
    assert {id(p) for p in set_trainable(model, "infini")["rest"]} == set()


@both_families
@every_form
@pytest.mark.parametrize("part", ["memory", "infini"])
def test_what_is_frozen_becomes_16_bit_but_for_what_belongs_to_the_memory(family, form, part):
    model = retrofitted(family, form, torch.float32)
    exact = {n: p.detach().clone() for n, p in model.named_parameters()}
    set_trainable(model, part, frozen_dtype=torch.bfloat16)
    modules = infini_modules(model).values()
    of_memory = {id(p) for m in modules for n, p in m.named_parameters() if group_of(n) != "infini"}
    for name, parameter in model.named_parameters():
        keeps = parameter.requires_grad or id(parameter) in of_memory
        assert parameter.dtype is (torch.float32 if keeps else torch.bfloat16), name
        assert not keeps or torch.equal(parameter, exact[name])


def test_a_memory_that_is_not_known_as_one_would_be_rounded():
    model = retrofitted("llama", "everything", torch.float32)
    forgetful = infini_modules(model)[0]
    forgetful.memory_parameters = dict
    set_trainable(model, "memory", frozen_dtype=torch.bfloat16)
    assert forgetful.gate_logit.dtype is torch.bfloat16
    assert infini_modules(model)[2].gate_logit.dtype is torch.float32
