"""Every family against `transformers` itself; what a retrofit would compute wrongly is refused."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from analysis.families import MODELS, differences, make_base
from infini_retrofit.bases.sources import LocalBase
from infini_retrofit.model import families
from infini_retrofit.model.base import load_base
from infini_retrofit.model.families import FAMILIES, Family
from infini_retrofit.model.retrofit import insert_infini
from infini_retrofit.model.running import run_folded
from infini_retrofit.pipeline.files import write_manifest
from tests.reference import MODEL_FORMS, infini_params, largest, name_of
from tests.tiny import random_ids

# Rotation tables are float32, and so is an export.
MOST = {"control": 1e-4, "export": 0.0, "generate": 1e-4}
KEYS_OF_THE_FIRST = next(x for x in MODEL_FORMS if "key_layer" in x) | {"memory_layers": [-1]}
OTHERS = ("cohere", "gemma2", "gpt2", "gptj", "opt")


def test_every_family_has_a_model():
    assert {name.split()[0] for name in MODELS} == FAMILIES.keys()


@pytest.mark.parametrize("name", MODELS)
def test_a_retrofit_computes_what_transformers_computes(name):
    for column, found in differences(name).items():
        assert found <= MOST.get(column, 1e-12), column


@pytest.mark.parametrize("name", ["olmo2", "smollm3", "stablelm"])
@pytest.mark.parametrize(
    "form", [{"insertion": "parallel"}, {"insertion": "adapter"}, KEYS_OF_THE_FIRST], ids=name_of
)
@torch.no_grad()
def test_a_branch_remembers_the_segments_before(name, form):
    model = make_base(name).double()
    insert_infini(model, infini_params(**form))
    for weight in model.parameters():
        weight += 0.1 * torch.randn_like(weight)
    ids = random_ids(model.config.vocab_size, 1, 10)
    apart = torch.cat([run_folded(model, part, 5) for part in ids.split(5, dim=1)], dim=1)
    assert largest((run_folded(model, ids, 5) - apart)[:, 5:]) > 0.01


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("qwen3", {"norms": lambda *_: {}}, "must have 9,216 weights, .* got 9,248"),
        ("granite", {"scaling": None}, "must start as its base, got .* differ by 0"),
        ("mistral", {"window": None}, "must start as its base"),
        ("olmo", {"clip": None}, "must start as its base"),
        ("smollm3", {"rotates": True}, "must start as its base"),
    ],
)
def test_a_family_that_is_read_wrongly_is_refused(monkeypatch, name, wrong, message):
    shape = Family.shape
    if "norms" in wrong:
        monkeypatch.setattr(Family, "norms", wrong["norms"])
        wrong = {"norms": "none"}
        monkeypatch.setattr(families, "NORMS", ())
    monkeypatch.setattr(Family, "shape", lambda *args: replace(shape(*args), **wrong))
    with pytest.raises(ValueError, match=message):
        insert_infini(make_base(name), infini_params())


def test_layers_that_would_see_a_moving_table_are_refused():
    message = r"^infini\.layers must be all .* \(rope_type dynamic\)"
    for form in ({"layers": [0]}, {"insertion": "adapter"}):
        with pytest.raises(ValueError, match=message):
            insert_infini(make_base("llama dynamic"), infini_params(**form))


@pytest.mark.parametrize("family", OTHERS)
def test_another_family_is_refused_by_name_at_every_door(tmp_path, family):
    config = AutoConfig.for_model(family)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.save_pretrained(tmp_path)
    write_manifest(tmp_path)
    doors = (
        lambda: insert_infini(model, infini_params()),
        lambda: load_base(tmp_path, torch.float32),
        LocalBase(path=str(tmp_path)).known_depth,
        LocalBase(path=str(tmp_path)).load,
    )
    message = rf"^the family of .* must be one of gemma, .*starcoder2, got '{family}'"
    for door in doors:
        with pytest.raises(ValueError, match=message):
            door()
