"""Adapters: where they are, what trains, and that nothing is left of them in the end."""

import pytest
import torch

from infini_retrofit.model.base import load_base
from infini_retrofit.model.checkpoints import load_retrofit, save_retrofit
from infini_retrofit.model.retrofit import attention_modules, infini_modules, insert_infini
from infini_retrofit.model.running import run_folded
from infini_retrofit.training.control import make_control
from infini_retrofit.training.parameters import Adapters, LoraParams, add_lora
from tests.reference import infini_params, largest
from tests.tiny import FAMILIES, Family, random_ids, tiny_base_folder, tiny_model
from tests.tiny_training import (
    INFINI,
    SEGMENT,
    TOKENS,
    die_in_the_third_validation,
    finetuning,
    run,
)

LORA = LoraParams(rank=2, alpha=6.0)
PROJECTIONS = {
    "llama": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "gpt_neox": {"query_key_value", "dense"},
}
OWN = {"q_proj", "k_proj", "v_proj", "o_proj"}
FORMS = {
    "replace": {},
    "parallel": {"insertion": "parallel"},
    "learnable memory": {"feature_map": "hedgehog", "gate": "query"},
    "no memory": {"memory": "off"},
}


def adapt(family: Family, **form: object) -> tuple[torch.nn.Module, Adapters]:
    model = tiny_model(family)
    insert_infini(model, infini_params(layers=[1], segment_length=SEGMENT, **form))
    return model, add_lora(model, LORA, seed=0)


def train_a_little(adapters: Adapters) -> None:
    """Move everything that trains, so that no adapter is nothing any more."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in (p for group in adapters.groups.values() for p in group):
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", FORMS)
def test_adapters_start_as_nothing_and_merge_to_what_they_did(family, form):
    plain = tiny_model(family)
    insert_infini(plain, infini_params(layers=[1], segment_length=SEGMENT, **FORMS[form]))
    model, adapters = adapt(family, **FORMS[form])
    ids = random_ids(model.config.vocab_size, 2, TOKENS)
    start = run_folded(plain, ids, SEGMENT)
    assert torch.equal(run_folded(model, ids, SEGMENT), start)
    train_a_little(adapters)
    adapted = run_folded(model, ids, SEGMENT)
    adapters.merge()
    assert largest(adapted - start) > 0.1
    assert largest(run_folded(model, ids, SEGMENT) - adapted) < 1e-4
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert not any("lora" in name for name, _ in model.named_modules())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_projection_of_every_layer_is_adapted_and_nothing_else(family):
    model, _ = adapt(family)
    for index, attention in enumerate(attention_modules(model)):
        adapted = {name for name, m in attention.named_children() if hasattr(m, "lora_A")}
        assert adapted == (OWN if index == 1 else PROJECTIONS[family])
    mlps = [name for name, _ in model.named_parameters() if "lora" in name and "mlp" in name]
    assert mlps == []


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", FORMS)
def test_only_adapters_and_what_a_memory_has_of_its_own_train(family, form):
    model, adapters = adapt(family, **FORMS[form])
    groups = adapters.groups
    grouped = {id(p): name for name, group in groups.items() for p in group}
    ids = random_ids(model.config.vocab_size, 2, TOKENS)
    train_a_little(adapters)
    run_folded(model, ids, SEGMENT).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (id(parameter) in grouped), name
        assert (parameter.grad is not None) == parameter.requires_grad, name
        if ".lora_" in name:
            of_infini = ".1." in name and (form != "parallel" or ".infini." in name)
            assert grouped[id(parameter)] == ("infini" if of_infini else "rest"), name
    assert len(grouped) == sum(map(len, groups.values()))
    own = infini_modules(model)[1].memory_parameters()
    for name, parameters in own.items():
        assert {id(p) for p in groups[name]} == {id(p) for p in parameters}
    assert any(own.values()) == (form != "no memory")


def test_what_is_adapted_stays_unrounded_and_the_rest_does_not():
    model = tiny_model("llama")
    insert_infini(model, infini_params(layers=[1], segment_length=SEGMENT))
    adapters = add_lora(model, LORA, seed=0, frozen_dtype=torch.bfloat16)
    adapters.merge()
    want = tiny_model("llama").state_dict()
    for name, tensor in model.state_dict().items():
        projected = name.split(".")[-2] in OWN or "gate_logit" in name
        assert tensor.dtype is (torch.float32 if projected else torch.bfloat16), name
        if name.endswith("q_proj.weight"):
            assert torch.equal(tensor, want[name])


def test_the_seed_decides_the_adapters_and_leaves_other_draws_alone():
    models = [tiny_model("llama") for _ in range(3)]
    torch.manual_seed(3)
    before = torch.rand(1)
    torch.manual_seed(3)
    drawn = [
        add_lora(m, LORA, seed).groups["rest"] for m, seed in zip(models, (0, 0, 1), strict=True)
    ]
    same, again, other = (torch.cat([p.flatten() for p in group]) for group in drawn)
    assert torch.equal(same, again)
    assert not torch.equal(same, other)
    assert torch.equal(torch.rand(1), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_files_know_nothing_of_adapters(family, tmp_path):
    base_dir = tiny_base_folder(tmp_path / "base", family)
    model, params = load_base(base_dir, torch.float32), infini_params(layers=[1])
    insert_infini(model, params)
    adapters = add_lora(model, LORA, seed=0, frozen_dtype=torch.bfloat16)
    train_a_little(adapters)
    adapters.merge()
    save_retrofit(model, params, base_dir, tmp_path / "out")
    loaded, _ = load_retrofit(base_dir, tmp_path / "out", torch.float32)
    want = model.state_dict()
    for name, tensor in loaded.state_dict().items():
        kept = want[name].dtype is torch.float32
        assert torch.equal(tensor.to(want[name].dtype), want[name]), name
        assert kept or torch.equal(tensor, load_base(base_dir, torch.float32).state_dict()[name])


def test_a_killed_run_with_adapters_resumes_to_the_same_weights(tmp_path, monkeypatch):
    whole = finetuning(trainable="lora")
    metrics = run(whole, tmp_path / "whole", epochs=2)
    adapters = whole.adapters.groups["infini"] + whole.adapters.groups["rest"]
    gates = [p for name in ("gate", "alpha", "memory") for p in whole.groups[name]]
    assert metrics["num_trainable_parameters"] == sum(p.numel() for p in adapters + gates)
    assert metrics["num_trainable_parameters"] < 1500

    killed = finetuning(trainable="lora")
    die_in_the_third_validation(killed, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        run(killed, tmp_path / "killed", epochs=2)
    (checkpoint,) = (tmp_path / "killed" / "run").glob("checkpoint-*")
    kilobytes = sum(f.stat().st_size for f in checkpoint.glob("model*")) / 1024
    assert kilobytes < 20
    resumed = finetuning(trainable="lora")
    assert run(resumed, tmp_path / "killed", epochs=2) == metrics
    want = whole.model.state_dict()
    assert all(torch.equal(want[n], x) for n, x in resumed.model.state_dict().items())
    start = finetuning().model.state_dict()
    assert {n for n in want if not torch.equal(want[n], start[n])} == {
        n for n in want if "self_attn" in n and not n.endswith("norm.weight")
    }


def test_a_control_is_adapted_alike():
    model = tiny_model("llama")
    make_control(model, INFINI)
    adapters = add_lora(model, LORA, seed=0)
    retrofit = finetuning(trainable="lora").adapters
    names = ("infini", "rest")
    shapes = [[[p.shape for p in a.groups[n]] for n in names] for a in (adapters, retrofit)]
    assert shapes[0] == shapes[1]
    assert not adapters.groups["gate"]
