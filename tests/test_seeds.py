"""The recipes of the seeds: as published where they say so, and nowhere else."""

import re
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from infini_retrofit.layer.form import InfiniParams
from infini_retrofit.model.families import decoder_layers
from infini_retrofit.model.retrofit import infini_modules, insert_infini
from infini_retrofit.pipeline.params import read_params
from infini_retrofit.pipeline.schema import leaves
from recipes.overlays import overrides, read_overlay, recipe_names
from tests.tiny_checkout import make_checkout
from tests.tiny_project import ROOT, run_stage, write_params

SEEDS = ("v1", "v2", "two-stage")
PUBLISHED = {
    "v1": {
        "distill.epochs": 10,
        "distill.patience": 10,  # no early stop
        "finetune.epochs": 5,
        "finetune.patience": 5,
        "finetune.trainable": "infini",
    },
    "v2": {
        "distill.epochs": 50,
        "distill.patience": 2,
        "finetune.epochs": 50,
        "finetune.patience": 2,
        "finetune.trainable": "infini",
    },
    "two-stage": {
        "distill.epochs": 10,
        "finetune.epochs": 30,
        "finetune.patience": 1,
        "finetune.trainable": "all",
        "finetune.lr_scale.infini": 2.0,
        "finetune.lr_scale.rest": 0.5,
    },
}
PAGE = (ROOT / "docs" / "seeds.md").read_text()


def parameters(recipe: str) -> dict[str, Any]:
    return dict(leaves(read_params(ROOT / "params.yaml"))) | read_overlay(recipe)


def differing(one: str, other: str) -> set[str]:
    values, others = parameters(one), parameters(other)
    return {key for key in values if values[key] != others[key]}


@pytest.mark.parametrize("name", SEEDS)
def test_what_is_published_is_taken_over_and_a_twin_differs_in_its_labels_alone(name):
    published = PUBLISHED[name] | {"infini.segment_length": 256, "infini.layers": [0]}
    assert published.items() <= parameters(name).items()
    assert differing(name, f"{name}-fixed") == {"finetune.label_shift"}


def test_the_recipes_differ_as_the_reports_do_and_distil_alike_where_they_did():
    assert {key.split(".")[-1] for key in differing("v1", "v2")} == {"epochs", "patience"}
    assert {key.split(".")[0] for key in differing("v1", "two-stage")} == {"finetune"}


def test_no_other_recipe_and_no_default_repeats_their_mistakes():
    for name in recipe_names():
        values = parameters(name)
        assert values["finetune.label_shift"] == (2 if name in SEEDS else 1), name
        assert values["infini.seed_scaling"] == (name.removesuffix("-fixed") in SEEDS), name


def pythia_70m() -> GPTNeoXForCausalLM:
    config = GPTNeoXConfig(
        vocab_size=50304,
        hidden_size=512,
        num_hidden_layers=6,
        num_attention_heads=8,
        intermediate_size=2048,
        tie_word_embeddings=False,
    )
    return GPTNeoXForCausalLM(config)


def num_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def seeds_form(**over: object) -> InfiniParams:
    form = {k.split(".")[1]: v for k, v in read_overlay("v2").items() if k.startswith("infini.")}
    return InfiniParams(**form | {"init": "random_layer"} | over)


def test_on_pythia_70m_the_parameters_are_as_many_as_the_reports_say():
    model = pythia_70m()
    num_base = num_parameters(model)
    assert num_base == 70_426_624
    insert_infini(model, seeds_form())
    num_layer = num_parameters(decoder_layers(model)[0])
    attention = infini_modules(model)[0]
    assert (attention.shape.num_heads, attention.shape.head_dim) == (1, 512)
    assert num_layer == 3_150_337
    assert num_base + num_layer == 73_576_961  # as they counted: the old layer 0 is still in it
    assert num_parameters(model) == 70_424_577
    for number in (num_layer, num_base + num_layer, num_parameters(model)):
        assert f"{number:,}" in PAGE


@pytest.mark.parametrize("over", [{"heads": "base"}, {"memory": "off"}], ids=str)
def test_another_form_of_the_layer_has_another_number_of_parameters(over):
    model = pythia_70m()
    insert_infini(model, seeds_form(**over))
    assert num_parameters(decoder_layers(model)[0]) != 3_150_337


def settings(text: str) -> list[str]:
    return re.findall(r"-S (\S+=\S+?)(?=[\")\s])", text)


ALIBI = ["infini.local=softmax", "infini.positions=alibi"]


@pytest.mark.parametrize("given", [settings(PAGE), ALIBI], ids=["pythia", "alibi"])
def test_the_settings_for_pythia_and_for_alibi_pass_all_checks(given, tmp_path, monkeypatch):
    assert len(given) >= 2
    make_checkout(tmp_path, monkeypatch)
    assert set(given) < set(overrides("v2", read_params(), {}, given))
    Path("given.yaml").write_text("".join(f"{v.replace('=', ': ', 1)}\n" for v in given))
    write_params(Path.cwd(), read_overlay("v2") | dict(leaves(read_params(Path("given.yaml")))))
    run_stage("check_params")
