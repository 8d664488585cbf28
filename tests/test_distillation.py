"""Distilling: its targets are what the base really computes, and the loss goes towards them."""

import pytest
import torch
from torch import Tensor

from infini_retrofit.model.retrofit import (
    alphas,
    attention_modules,
    infini_modules,
    insert_infini,
)
from infini_retrofit.scoring.score import score_rows, total
from infini_retrofit.training.distillation import Teacher, modules_of, tensor_of
from tests.reference import MODEL_FORMS, both_families, infini_params, largest, record_layers
from tests.tiny import random_ids, tiny_llama, tiny_model
from tests.tiny_training import TOKENS, distillation, run

NOTES = {"layer_output": "returned", "attention_output": "attention"}
both_objectives = pytest.mark.parametrize("objective", NOTES)


def ids_for(family: str = "llama", num_samples: int = 2) -> Tensor:
    return random_ids(tiny_model(family).config.vocab_size, num_samples, TOKENS)


@both_families
@both_objectives
def test_calls_are_what_hooks_in_a_full_forward_pass_record(family, objective):
    model, ids = tiny_model(family), ids_for(family)
    teacher, notes = Teacher(model, [0, 2], objective), record_layers(model, ids)
    insert_infini(model, infini_params(layers=[0, 2], init="random_layer"))
    calls = teacher(ids)
    assert list(calls) == [0, 2]
    for index, call in calls.items():
        want = notes[NOTES[objective]][index]
        assert torch.equal(call.output, want)
        assert call.output.shape != want[0].shape  # that is a row of the batch
        again = modules_of(tiny_model(family), objective)[index](*call.args, **call.kwargs)
        assert torch.equal(tensor_of(again), want)
        assert largest(record_layers(model, ids)[NOTES[objective]][index] - want) > 0.1


@both_families
def test_targets_are_causal_under_eager_attention_too(family):
    sdpa, eager, ids = tiny_model(family), tiny_model(family), ids_for(family)
    eager.set_attn_implementation("eager")
    want, got = (Teacher(m, [1], "attention_output")(ids)[1].output for m in (sdpa, eager))
    assert largest(got - want) < 1e-5
    # Called on its own, without the mask that the model makes, the same module looks ahead.
    given = []
    attention_modules(eager)[1].register_forward_pre_hook(
        lambda _, args, kwargs: given.append((args, kwargs)), with_kwargs=True
    )
    eager(input_ids=ids, use_cache=False)
    args, kwargs = given[0]
    alone = attention_modules(eager)[1](*args, **kwargs | {"attention_mask": None})[0]
    assert largest(alone - want) > 0.1


@both_objectives
def test_distilling_lowers_the_loss_and_needs_no_teacher_in_its_checkpoint(tmp_path, objective):
    task = distillation(objective=objective)
    trained = {name for name, p in task.named_parameters() if p.requires_grad}
    assert set(task.state_dict()) == trained
    before = task.validate(random_ids(67, 3, TOKENS, seed=1))["val_loss"]
    metrics = run(task, tmp_path, objective=objective, epochs=8)
    assert metrics["val_loss"] < 0.9 * before


@both_objectives
def test_targets_are_the_base_s_own_outputs(objective):
    exact = {"memory": "off", "init": "base", "local": "softmax", "positions": "rope"}
    whole = exact | {"segment_length": TOKENS}
    assert distillation(form=whole, objective=objective)(ids_for())["loss"].abs() < 1e-6
    for different in (exact, {"layers": "all"}):
        assert distillation(form=different, objective=objective)(ids_for())["loss"] > 1e-3


@both_objectives
def test_an_error_counts_for_its_own_sample_and_an_attention_s_as_a_share(objective):
    task, ids = distillation(form={"layers": [0, 2]}, objective=objective), ids_for()
    notes, losses = record_layers(tiny_llama(), ids), []
    for index in (0, 2):
        module = modules_of(task.model, objective)[index]
        call = task.teacher(ids)[index]
        error = tensor_of(module(*call.args, **call.kwargs)) - notes[NOTES[objective]][index]
        square = notes[NOTES[objective]][index].square().mean(dim=(1, 2))
        share = square if objective == "attention_output" else torch.ones(2)
        losses.append((error.square().mean(dim=(1, 2)) / share).mean().item())
    loss = task(ids)["loss"].item()
    assert loss == pytest.approx(sum(losses) / 2, rel=1e-5)
    apart = [task(row[None])["loss"].item() for row in ids]
    assert loss == pytest.approx(sum(apart) / 2, rel=1e-5)


def test_validation_weighs_samples_alike_and_scores_the_whole_model():
    task, rows = distillation(), ids_for(num_samples=3)
    metrics = task.run_validation(rows)
    losses = [task(row[None])["loss"].item() for row in rows]
    assert metrics["val_loss"] == pytest.approx(sum(losses) / 3)
    assert metrics["val_ppl"] == pytest.approx(total(score_rows(task.model, rows)).ppl)
    assert metrics["val_ppl"] != pytest.approx(total(score_rows(tiny_llama(), rows)).ppl, rel=1e-4)


@both_families
@pytest.mark.parametrize(
    ("insertion", "objective"),
    [("parallel", "attention_output"), ("parallel", "layer_output"), ("adapter", "layer_output")],
)
def test_a_branch_is_asked_for_what_a_segment_alone_misses(family, insertion, objective):
    form = {"layers": "all", "local": "softmax", "positions": "rope", "init": "base"}
    branch = distillation(family, form | {"insertion": insertion}, objective=objective)
    confined = distillation(family, form | {"memory": "off"}, objective=objective)
    loss = branch(ids_for(family))["loss"]
    assert loss.item() == pytest.approx(confined(ids_for(family))["loss"].item(), rel=1e-4)
    loss.backward()
    assert all(loss > 1e-3 < alpha.grad.abs() * 1e3 for alpha in alphas(branch.model))


def test_the_plain_base_passes_with_nothing_to_do(tmp_path, capsys):
    task, val = distillation(form={"layers": []}), random_ids(67, 3, TOKENS, seed=1)
    metrics = run(task, tmp_path)
    said = capsys.readouterr().out.strip().splitlines()[-1]
    assert said == "nothing is trained, because no parameter is to train"
    want = total(score_rows(tiny_llama(), val)).ppl
    assert (metrics["val_loss"], metrics["val_ppl"]) == (0, want)
    assert metrics["num_trainable_parameters"] == 0
    assert (tmp_path / "memory.tsv").read_text() == "epoch\tquantity\tvalue\n"


@pytest.mark.parametrize("layers", [[-1], "all"])
def test_keys_of_an_earlier_layer_are_distilled_from_what_the_base_gives_it(layers):
    task = distillation(
        form=MODEL_FORMS[-1] | {"layers": layers, "memory_layers": [-1], "key_layer": 0.3}
    )
    alphas(task.model)[0].data.fill_(1.0)
    task(ids_for())["loss"].backward()
    keys = infini_modules(task.model)[2].k_proj.weight
    assert largest(keys.grad) > 0
