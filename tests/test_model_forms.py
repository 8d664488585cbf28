"""Whole models of both families: documents folded into a batch against a loop over segments.

Update rules, feature maps, families and insertions in full; local attentions and what else a form
may have go round beside them, in numbers without a common divisor.
"""

from itertools import cycle, product

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from infini_retrofit.layer.state import Carrier
from infini_retrofit.model.retrofit import infini_modules, insert_infini
from infini_retrofit.model.running import run_folded
from tests.reference import infini_params, largest, segment_loop, without_conflicts
from tests.tiny import FAMILIES, tiny_model

SEGMENT, DOCUMENT = 5, 15
RULES = ("linear", "delta", "delta_gamma")
FEATURE_MAPS = ("elu1", "hedgehog", "dpfp")
INSERTIONS = ("replace", "parallel")
LOCALS = (
    {"local": "softmax", "positions": "rope"},
    {"local": "softmax", "positions": "alibi"},
    {"local": "softmax", "positions": "none", "layers": [-1]},
    {"local": "linear", "positions": "rope"},
    {"local": "window_linear", "positions": "rope", "layers": [0, 2]},
)
EXTRAS = (
    {},
    {"gate": "query", "decay": "head"},
    {"written_tokens": 2, "initial_state": "learnable"},
    {"recall_norm": "rms", "local_context": 3},
    {"bptt_segments": 2, "decay": "feature"},
    {"init": "random_attention", "local_context": 2, "gate": "query"},
    {"written_tokens": 1, "decay": "head", "recall_norm": "rms"},
)
IN_16_BITS = (
    ("llama", {"state_dtype": "bfloat16", "decay": "feature", "local_context": 1}),
    ("gpt_neox", {"state_dtype": "bfloat16", "update_rule": "delta", "insertion": "parallel"}),
)
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def all_forms() -> list[tuple[str, dict]]:
    locals_, extras, forms = cycle(LOCALS), cycle(EXTRAS), []
    for family, insertion, rule, feature_map in product(FAMILIES, INSERTIONS, RULES, FEATURE_MAPS):
        form = {"insertion": insertion, "update_rule": rule, "feature_map": feature_map}
        form |= next(locals_) | next(extras)
        if feature_map == "hedgehog" and insertion == "replace":
            form["num_features"] = 8
        forms.append((family, without_conflicts(form)))
    return [*forms, *IN_16_BITS]


def name_of(x: object) -> str:
    return "-".join(map(str, x.values())) if isinstance(x, dict) else str(x)


every_form = pytest.mark.parametrize(("family", "form"), all_forms(), ids=name_of)


def retrofitted(family: str, form: dict, dtype: torch.dtype) -> PreTrainedModel:
    """Make a model in which nothing that a base lacks stands at its usual start."""
    model = tiny_model(family).to(dtype)
    insert_infini(model, infini_params(**form))
    with torch.no_grad():
        for module in infini_modules(model).values():
            for group in module.memory_parameters().values():
                for parameter in group:
                    parameter.add_(torch.randn_like(parameter) * 0.3)
            if module.alpha is not None:
                module.alpha.fill_(0.5)
    return model.double() if dtype is torch.float64 else model


def ids_for(model: PreTrainedModel) -> Tensor:
    """Draw documents that name no token twice: equal scores leave open which one is written."""
    vocab_size = model.config.vocab_size
    return torch.stack([torch.randperm(vocab_size)[:DOCUMENT] for _ in range(2)])


@every_form
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@torch.no_grad()
def test_folded_equals_a_loop_over_segments(family, form, dtype):
    model = retrofitted(family, form, dtype)
    ids = ids_for(model)
    got, want = run_folded(model, ids, SEGMENT), segment_loop(model, ids, SEGMENT)
    assert got.dtype is dtype
    assert largest(got - want) < TOLERANCES[dtype] * largest(want)


@every_form
def test_the_gradient_of_folded_equals_that_of_the_loop(family, form):
    # In 16 bits a state passes its gradient from call to call in 16 bits, too.
    over = {"bptt_segments": "all", "state_dtype": "float32"}
    model = retrofitted(family, form | over, torch.float64)
    ids, gradients = ids_for(model), []
    for run in (run_folded, segment_loop):
        model.zero_grad()
        run(model, ids, SEGMENT)[..., 0].sin().sum().backward()
        gradients.append({n: p.grad for n, p in model.base_model.named_parameters()})
    for name, want in gradients[1].items():
        assert largest(gradients[0][name] - want) < 1e-9 * max(1, largest(want)), name


@torch.no_grad()
def test_a_loop_that_hands_over_nothing_is_noticed_in_every_form():
    for family, form in all_forms():
        model = retrofitted(family, form, torch.float32)
        ids = ids_for(model)
        got, apart = run_folded(model, ids, SEGMENT), run_folded(model, ids[:, SEGMENT:], SEGMENT)
        assert largest(got[:, SEGMENT:] - apart) > 0.01 * largest(got), (family, form)


@every_form
@torch.no_grad()
def test_under_autocast_the_state_stays_in_its_number_type(family, form):
    model, carrier = retrofitted(family, form, torch.float32), Carrier()
    ids = ids_for(model)
    want = run_folded(model, ids, SEGMENT)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run_folded(model, ids, SEGMENT, carrier=carrier)
    assert 0 < (got - want).abs().mean() < 0.05 * largest(want)
    states = [c.memory for c in carrier.after.values()]
    want_dtype = getattr(torch, form.get("state_dtype", "float32"))
    assert {x.dtype for s in states for x in (s.matrix, s.normalizer)} == {want_dtype}


ALL_OF_IT = {
    "feature_map": "hedgehog",
    "recall_norm": "rms",
    "gate": "query",
    "decay": "head",
    "written_tokens": 3,
    "initial_state": "learnable",
    "positions": "alibi",
}
OF_MEMORY = {
    *("gate_logit", "feature_maps.query_weight", "feature_maps.key_weight"),
    *("memory.decay_logit", "memory.query_gate", "memory.write_score", "memory.recall_gain"),
    *("memory.initial_matrix", "memory.initial_logit"),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("insertion", INSERTIONS)
def test_a_state_dict_holds_all_that_is_learned_and_no_state(family, insertion):
    form = {"layers": [0, -1], "insertion": insertion} | ALL_OF_IT
    model = retrofitted(family, form, torch.float32)
    ids = ids_for(model)
    with torch.no_grad():
        want = run_folded(model, ids, SEGMENT)
    state = infini_modules(model)[0].state_dict()
    assert {name for name in state if "proj" not in name} == OF_MEMORY | (
        {"alpha"} if insertion == "parallel" else set()
    )
    other = tiny_model(family)
    insert_infini(other, infini_params(**form), seed=9)
    with torch.no_grad():
        assert largest(run_folded(other, ids, SEGMENT) - want) > 0.01
        other.load_state_dict(model.state_dict())
        assert torch.equal(run_folded(other, ids, SEGMENT), want)
