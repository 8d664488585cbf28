"""A branch beside an attention or a layer costs nothing at the start; the base stays whole."""

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from infini_retrofit.layer.cut import Cut
from infini_retrofit.model.families import decoder_layers
from infini_retrofit.model.retrofit import alphas, attention_modules, insert_infini
from infini_retrofit.model.running import run_folded, run_in_layer
from tests.reference import (
    MODEL_FORMS,
    both_families,
    infini_params,
    largest,
    name_of,
    retrofitted,
    set_share,
)
from tests.tiny import ids_for, tiny_model

SEGMENT, DOCUMENT = 5, 20
PARALLEL = {"insertion": "parallel"}
# Forms that keep the base's weights.
ON_THE_BASE = [form for form in MODEL_FORMS if "init" not in form]


def open_branches(model: PreTrainedModel, alpha: float = 0.7) -> None:
    for parameter in alphas(model):
        parameter.data[:] = alpha


@both_families
@pytest.mark.parametrize("form", MODEL_FORMS, ids=name_of)
@torch.no_grad()
def test_before_training_a_branch_changes_nothing_and_then_it_does(family, form):
    insertion = "adapter" if form.get("init") == "random_layer" else "parallel"
    base = tiny_model(family)
    if insertion == "parallel" and (window := form.get("local_context")):
        layers = form.get("layers", "all")
        insert_infini(base, infini_params(layers=layers, memory="off", local_context=window))
    base = base.double()
    model = retrofitted(family, **form | {"insertion": insertion}).double()
    ids = ids_for(base, 2, DOCUMENT)
    for run in (run_folded, run_in_layer):
        assert torch.equal(run(model, ids, SEGMENT), run(base, ids, SEGMENT))
    open_branches(model)
    assert largest(run_folded(model, ids, SEGMENT) - run_folded(base, ids, SEGMENT)) > 0.01


@both_families
@torch.no_grad()
def test_the_output_is_the_bases_and_alpha_times_that_of_a_replacing_attention_or_layer(family):
    base, replacing = tiny_model(family).double(), retrofitted(family, layers=[1]).double()
    x = torch.randn(8, SEGMENT, base.config.hidden_size, dtype=torch.float64)
    about = {
        "position_embeddings": base.base_model.rotary_emb(x, torch.arange(SEGMENT)[None]),
        "attention_mask": None,
        "cut": Cut(num_segments=4),
    }
    for insertion, modules in (("parallel", attention_modules), ("adapter", decoder_layers)):
        beside = retrofitted(family, layers=[1], insertion=insertion).double()
        open_branches(beside, -2.5)
        outputs = [modules(m)[1](x, **about) for m in (base, beside, replacing)]
        plain, both, alone = (x if isinstance(x, Tensor) else x[0] for x in outputs)
        assert largest(both - (plain - 2.5 * alone)) < 1e-12
        assert largest(alone - plain) > 0.001


@pytest.mark.parametrize("insertion", ["parallel", "adapter"])
@both_families
@torch.no_grad()
def test_a_copy_has_branches_of_its_own(family, insertion):
    model = retrofitted(family, insertion=insertion).double()
    open_branches(model)
    ids, copied = ids_for(model, 2, DOCUMENT), deepcopy(model)
    want = run_folded(model, ids, SEGMENT)
    assert torch.equal(run_folded(copied, ids, SEGMENT), want)
    open_branches(copied, alpha=9.0)
    owners = attention_modules(copied) if insertion == "parallel" else decoder_layers(copied)
    assert [len(m._forward_hooks) for m in owners] == [1] * 3
    assert torch.equal(run_folded(model, ids, SEGMENT), want)
    assert largest(run_folded(copied, ids, SEGMENT) - want) > 0.01


def nll(model: PreTrainedModel, ids: Tensor) -> float:
    logits = model.get_output_embeddings()(run_folded(model, ids, SEGMENT))
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()


@both_families
@pytest.mark.parametrize("form", ON_THE_BASE, ids=name_of)
@torch.no_grad()
def test_with_base_weights_a_replacing_layer_of_a_small_share_costs_little(family, form):
    form = form | {"insertion": "replace", "local_context": 0}
    base, model = tiny_model(family).double(), retrofitted(family, **form).double()
    ids, moved = ids_for(base, 2, DOCUMENT), []
    for share in (0.02, 0.9):
        set_share(model, share)
        moved.append(abs(nll(model, ids) - nll(base, ids)))
    # Of the perplexity, 2% are 0.02 of its logarithm.
    assert 0 < moved[0] < 0.02
    assert moved[1] > 1.5 * moved[0]
