"""A branch beside the base's attention: it costs nothing at the start and can be taken away."""

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from infini_retrofit.layer.state import Carrier, Read
from infini_retrofit.model import retrofit
from infini_retrofit.model.families import FAMILIES, decoder_layers
from infini_retrofit.model.retrofit import attention_modules, infini_modules, insert_infini
from infini_retrofit.model.running import run_folded, run_in_layer
from tests.reference import infini_params, largest
from tests.tiny import random_ids, tiny_model

SEGMENT, DOCUMENT = 5, 20
both_families = pytest.mark.parametrize("family", sorted(FAMILIES))
every_layers = pytest.mark.parametrize("layers", ["all", [0], [-1], [0, 2]], ids=str)
FORMS = (
    {},
    {"init": "random_attention", "update_rule": "delta_gamma", "feature_map": "hedgehog"},
    {"local": "window_linear", "written_tokens": 2, "initial_state": "learnable"},
    {"local": "linear", "recall_norm": "rms", "decay": "head", "gate": "query"},
)
every_form = pytest.mark.parametrize("form", FORMS)


def retrofitted(family: str, **over: object) -> PreTrainedModel:
    model = tiny_model(family).double()
    insert_infini(model, infini_params(insertion="parallel", **over))
    return model


def ids_for(model: PreTrainedModel) -> Tensor:
    return random_ids(model.config.vocab_size, 2, DOCUMENT)


def open_branches(model: PreTrainedModel, alpha: float = 0.7) -> None:
    for module in infini_modules(model).values():
        module.alpha.data[:] = alpha


@both_families
@every_layers
@every_form
@torch.no_grad()
def test_before_training_a_branch_changes_nothing_and_then_it_does(family, layers, form):
    base, model = tiny_model(family).double(), retrofitted(family, layers=layers, **form)
    ids = ids_for(base)
    for run in (run_folded, run_in_layer):
        want = run(base, ids, SEGMENT)
        assert torch.equal(run(model, ids, SEGMENT), want)
    open_branches(model)
    assert largest(run_folded(model, ids, SEGMENT) - run_folded(base, ids, SEGMENT)) > 0.01


@both_families
@pytest.mark.parametrize("index", [0, 2])
def test_the_output_is_the_bases_attention_and_so_much_of_the_branch(family, index):
    base, model = tiny_model(family).double(), retrofitted(family, layers=[index])
    open_branches(model, 0.7)
    notes: dict[str, Tensor] = {}
    ids = ids_for(base)

    def note(name: str, module: torch.nn.Module) -> None:
        def hook(_, args: tuple, kwargs: dict, output: tuple) -> None:
            notes[name] = output[0]
            notes[f"{name} input"] = (*args, *kwargs.values())[0]

        module.register_forward_hook(hook, with_kwargs=True)

    note("base", attention_modules(base)[index])
    note("whole", attention_modules(model)[index])
    note("branch", infini_modules(model)[index])
    with torch.no_grad():
        run_folded(base, ids, SEGMENT)
        run_folded(model, ids, SEGMENT)
    assert torch.equal(notes["base input"], notes["whole input"])
    assert torch.equal(notes["branch input"], notes["whole input"])
    assert largest(notes["whole"] - notes["base"] - notes["branch"]) < 1e-12
    assert largest(notes["branch"]) > 0.01


@both_families
def test_what_a_branch_adds_is_alpha_times_what_a_replacing_layer_gives(family):
    parallel = retrofitted(family, layers=[1])
    replacing = tiny_model(family).double()
    insert_infini(replacing, infini_params(layers=[1]))
    open_branches(parallel, -2.5)
    x = torch.randn(8, SEGMENT, parallel.config.hidden_size, dtype=torch.float64)
    tables = parallel.base_model.rotary_emb(x, torch.arange(SEGMENT)[None])
    outputs = [
        infini_modules(model)[1](x, tables, Carrier(num_segments=4))[0]
        for model in (parallel, replacing)
    ]
    assert largest(outputs[0] + 2.5 * outputs[1]) < 1e-12
    assert largest(outputs[1]) > 0.01


@both_families
@torch.no_grad()
def test_the_names_of_the_bases_weights_stay(family):
    base, model = tiny_model(family), retrofitted(family, layers=[0, 2]).float()
    old, new = base.state_dict(), model.state_dict()
    assert all(torch.equal(new[name], old[name]) for name in old)
    added = new.keys() - old.keys()
    assert added
    assert all(f".{retrofit.BRANCH}." in name for name in added)
    assert sorted(infini_modules(model)) == [0, 2]


@both_families
@torch.no_grad()
def test_a_copy_has_branches_of_its_own(family):
    model = retrofitted(family)
    open_branches(model)
    ids = ids_for(model)
    copied = deepcopy(model)
    want = run_folded(model, ids, SEGMENT)
    assert torch.equal(run_folded(copied, ids, SEGMENT), want)
    for module in infini_modules(copied).values():
        for parameter in module.parameters():
            parameter += 1
    assert torch.equal(run_folded(model, ids, SEGMENT), want)
    assert largest(run_folded(copied, ids, SEGMENT) - want) > 0.01
    modules = zip(infini_modules(model).values(), infini_modules(copied).values(), strict=True)
    assert all(a is not b for a, b in modules)
    hooks = [len(m._forward_hooks) for m in attention_modules(copied)]
    assert hooks == [1] * len(decoder_layers(model))


@torch.no_grad()
def test_a_hook_that_belongs_to_the_original_is_noticed(monkeypatch):
    """Hang a hook that remembers its branch, as a closure would."""

    def add_module(base: torch.nn.Module, name: str, branch: torch.nn.Module) -> None:
        ADD_MODULE(base, name, branch)
        base.register_forward_hook(
            lambda _, args, kwargs, out: (out[0] + branch(*args, **kwargs)[0], *out[1:]),
            with_kwargs=True,
        )

    monkeypatch.setattr(retrofit, "_add_branch", lambda base, args, kwargs, output: output)
    monkeypatch.setattr(torch.nn.Module, "add_module", add_module)
    model = retrofitted("llama")
    monkeypatch.undo()
    open_branches(model)
    ids, copied = ids_for(model), deepcopy(model)
    open_branches(copied, alpha=9.0)
    difference = run_folded(copied, ids, SEGMENT) - run_folded(model, ids, SEGMENT)
    assert largest(difference) == 0


ADD_MODULE = torch.nn.Module.add_module


def nll(model: PreTrainedModel, ids: Tensor, read: Read = "own") -> float:
    logits = model.get_output_embeddings()(run_folded(model, ids, SEGMENT, read))
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()


REPLACING = (
    {},
    {"update_rule": "delta", "feature_map": "dpfp", "written_tokens": 2, "gate": "query"},
    {"update_rule": "delta_gamma", "recall_norm": "rms"},
    {"decay": "feature", "feature_map": "hedgehog", "num_features": 4, "gate": "query"},
    {"local": "window_linear", "window": SEGMENT, "feature_map": "hedgehog"},
)


@both_families
@every_layers
@pytest.mark.parametrize("over", REPLACING)
@torch.no_grad()
def test_with_base_weights_and_the_memory_unread_a_replacing_layer_costs_nothing_either(
    family, layers, over
):
    base = tiny_model(family).double()
    ids = ids_for(base)
    want, moved = nll(base, ids), []
    for share in (0.02, 0.9):
        model = tiny_model(family).double()
        insert_infini(model, infini_params(layers=layers, initial_memory_share=share, **over))
        off = run_folded(model, ids, SEGMENT, "off")
        assert largest(off - run_folded(base, ids, SEGMENT)) < 1e-9
        moved.append(abs(nll(model, ids) - want))
    if over.get("local") == "window_linear":
        # Its gate weighs sums over all that was written, not means: there is no such share.
        assert moved[0] > 0
        return
    # Of the perplexity, 2% are 0.02 of its logarithm.
    assert 0 < moved[0] < 0.02
    assert moved[1] > 1.5 * moved[0]
