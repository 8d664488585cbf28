"""What the control is and what rivals carry: equal where a memory's form makes no difference."""

from dataclasses import replace
from itertools import cycle

import pytest
import torch

from infini_retrofit.evaluation.evaluation import evaluate
from infini_retrofit.evaluation.protocols import EvalParams, Setting
from infini_retrofit.evaluation.rival import Rival, rival_of
from infini_retrofit.model.base import load_weightless
from infini_retrofit.pipeline import tokens as texts
from infini_retrofit.pipeline.files import read_sealed, write_manifest, write_sealed
from infini_retrofit.training.control import Control, ControlParams, make_control, plan_control
from infini_retrofit.training.finetuning import Finetuning, LrScale
from tests.reference import infini_params
from tests.tiny import FAMILIES, random_ids, tiny_model
from tests.tiny_project import LINEAR, SMALL, contents, run_stage, write_params
from tests.tiny_training import SEGMENT, TOKENS, finetune_params, run

NUM_LAYERS = 3
TEXT = texts.TestText(random_ids(67, 5 * SEGMENT), random_ids(67, 2, TOKENS), ["a", "b"])
EVAL = EvalParams(window=2 * SEGMENT, stride=SEGMENT, sliding_tokens=5 * SEGMENT, documents=2)
SAME = ControlParams(trainable="same", lr="same")
EVEN = LrScale(memory=1.0, infini=1.0, rest=1.0)
MEMORIES = [
    {"update_rule": "delta"},
    {"feature_map": "hedgehog", "num_features": 4, "gate": "query", "decay": "feature"},
    {"insertion": "parallel", "feature_map": "hedgehog"},
    {"local": "linear", "positions": "none", "heads": "single", "init": "random_attention"},
    {"bptt_segments": 1, "decay": "feature"},
]


def planned(over: dict[str, object] | None = None, **params: object) -> Control:
    infini = infini_params(**{"layers": "all", "segment_length": SEGMENT} | (over or {}))
    finetune = finetune_params(**{"lr_scale": EVEN} | params)
    return plan_control(infini, finetune, SAME, NUM_LAYERS)


@pytest.mark.parametrize("memory", MEMORIES, ids=str)
def test_forms_that_differ_in_their_memory_have_one_control(memory):
    for over in ({"layers": "all"}, {"layers": [0]}):
        assert planned(over | memory) == planned(over)
        assert planned(over | memory, lr_scale=replace(EVEN, memory=100.0)) == planned(over)


def test_layers_count_by_what_they_are_not_by_how_they_are_named():
    everywhere = planned({"layers": "all"})
    assert everywhere == planned({"layers": [2, 0, -2]}) == planned(trainable="attention")
    assert planned({"layers": [-1]}) == planned({"layers": [2]}) != planned({"layers": [0]})
    one = planned({"layers": [0]}, trainable="attention")
    none = planned({"layers": []}, trainable="attention")
    assert one != none != everywhere != one


DIFFERENT = [
    ({"local_context": 2}, {}),
    ({"segment_length": 16}, {}),
    ({"init": "random_layer"}, {}),
    ({}, {"trainable": "all"}),
    ({}, {"trainable": "lora"}),
    ({}, {"trainable": "memory"}),
    ({}, {"lr": 1e-3}),
    ({}, {"lr_scale": replace(EVEN, infini=2.0)}),
    ({"local_context": 2, "bptt_segments": 1}, {}),
]


def test_what_makes_a_difference_to_the_control_is_kept():
    plans = {str(planned(infini, **params)) for infini, params in [({}, {}), *DIFFERENT]}
    assert len(plans) == 1 + len(DIFFERENT)
    own = ControlParams(trainable="all", lr=1e-3)
    plan = plan_control(infini_params(), finetune_params(lr_scale=EVEN), own, NUM_LAYERS)
    assert (plan.finetune.trainable, plan.finetune.lr) == ("all", 1e-3)


PLANS = [
    ({"layers": "all"}, {}),
    ({"layers": [0]}, {"trainable": "attention"}),
    ({"layers": [1], "init": "random_layer"}, {}),
    ({"layers": "all", "local_context": 2}, {}),
    ({"layers": [0], "feature_map": "hedgehog", "gate": "query"}, {"trainable": "lora"}),
]
IN_TURNS = [(family, *plan) for family, plan in zip(cycle(FAMILIES), PLANS, strict=False)]


@pytest.mark.parametrize(("family", "over", "params"), IN_TURNS, ids=str)
def test_a_planned_control_trains_as_one_of_the_retrofit_s_own_form(family, over, params, tmp_path):
    infini = infini_params(**{"segment_length": SEGMENT} | over)
    finetune = finetune_params(**{"lr_scale": EVEN, "epochs": 1, "lr": 1e-3} | params)
    plan, found = plan_control(infini, finetune, SAME, NUM_LAYERS), []
    for form, part in ((infini, finetune), (plan.infini, plan.finetune)):
        model = tiny_model(family)
        make_control(model, form)
        task = Finetuning(model, form, part, torch.float32)
        metrics = run(task, tmp_path / str(len(found)), **{"epochs": 1, "lr": 1e-3} | params)
        setting = Setting(EVAL, TEXT, rival_of(model, infini))
        scored = evaluate("control", model, setting).metrics
        assert scored["sliding_test_ppl"] > 1
        found.append(metrics | scored)
    assert found[1] == pytest.approx(found[0], rel=1e-6)


@pytest.mark.parametrize("over", [{}, {"layers": [0]}, {"local_context": 3, "memory": "off"}])
def test_rivals_of_a_base_are_counted_without_its_weights(over, tmp_path):
    base, infini = tiny_model("llama"), infini_params(**over)
    base.save_pretrained(tmp_path)
    write_manifest(tmp_path)
    bare = load_weightless(tmp_path)
    assert all(p.is_meta for p in bare.parameters())
    want = rival_of(base, infini)
    assert rival_of(bare, infini) == want
    assert want.num_tokens > 0


def test_plans_come_back_from_their_files(tmp_path):
    path, rival = tmp_path / "plan.json", Rival(segment_length=8, num_tokens=2)
    for plan in (planned(), planned({"layers": [0]}), rival):
        write_sealed(path, plan)
        assert read_sealed(path, type(plan), "dvc repro") == plan
    path.write_text(path.read_text()[:-3])
    with pytest.raises(ValueError, match=r"plan\.json is not valid JSON .* run `dvc repro`"):
        read_sealed(path, Rival, "dvc repro")


def test_another_memory_leaves_the_files_as_they_are_and_another_layer_does_not(project):
    before = contents(project / "data")
    for change, changed in (
        ({"infini.gate": "query", "finetune.lr_scale.memory": 9.0}, set()),
        ({"infini.layers": [1]}, {"control.json"}),
    ):
        write_params(project, SMALL | LINEAR | change)
        run_stage("prepare_comparison")
        after = contents(project / "data")
        assert {name for name in before if after[name] != before[name]} == changed
