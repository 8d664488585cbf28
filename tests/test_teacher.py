"""The targets of distillation are what a full forward pass of the base really computes."""

import pytest
import torch
from torch import Tensor

from infini_retrofit.model.families import FAMILIES, decoder_layers
from infini_retrofit.model.retrofit import attention_modules, infini_modules, insert_infini
from infini_retrofit.model.running import run_folded
from infini_retrofit.training.teacher import DocumentTeacher, LayerTeacher, PredictionTeacher
from tests.reference import infini_params, largest, record_layers
from tests.tiny import random_ids, tiny_model

BATCH, TOKENS = 2, 13
both_families = pytest.mark.parametrize("family", sorted(FAMILIES))


def ids_for(family: str) -> Tensor:
    return random_ids(tiny_model(family).config.vocab_size, BATCH, TOKENS)


@both_families
@pytest.mark.parametrize("layers", [[0], [2], [0, 2]])
def test_calls_are_what_hooks_in_a_full_forward_pass_record(family, layers):
    model = tiny_model(family)
    calls = LayerTeacher(model, layers)(ids_for(family))
    notes = record_layers(model, ids_for(family))
    assert sorted(calls) == layers
    for index, call in calls.items():
        assert torch.equal((*call.args, *call.kwargs.values())[0], notes["given"][index])
        assert torch.equal(call.attention_output, notes["attention"][index])
        assert torch.equal(call.output, notes["returned"][index])
        assert len(call.output) == len(call.attention_output) == BATCH
        first_of_the_batch = notes["returned"][index][0]
        assert call.output.shape != first_of_the_batch.shape


@both_families
def test_a_layer_and_its_attention_asked_the_same_again_answer_the_same(family):
    model = tiny_model(family)
    call = LayerTeacher(model, [1])(ids_for(family))[1]
    again = decoder_layers(model)[1](*call.args, **call.kwargs)
    assert torch.equal(again, call.output)
    again = attention_modules(model)[1](*call.attention_args, **call.attention_kwargs)[0]
    assert torch.equal(again, call.attention_output)


@both_families
def test_the_teacher_outlives_what_insertion_does_to_the_model(family):
    model, untouched = tiny_model(family), tiny_model(family)
    teacher = LayerTeacher(model, [0, 1])
    insert_infini(model, infini_params(layers=[0, 1], init="random_layer"))
    notes, calls = record_layers(untouched, ids_for(family)), teacher(ids_for(family))
    assert torch.equal(calls[1].output, notes["returned"][1])
    student = record_layers(model, ids_for(family))
    assert largest(student["returned"][1] - calls[1].output) > 0.1


@both_families
def test_layers_above_the_last_of_interest_are_not_run(family):
    model, ran = tiny_model(family), []
    for index, layer in enumerate(decoder_layers(model)):
        layer.register_forward_hook(lambda *_, i=index: ran.append(i))
    LayerTeacher(model, [1])(ids_for(family))
    assert set(ran) <= {0, 1}


@both_families
def test_targets_are_causal_under_eager_attention_too(family):
    sdpa, eager = tiny_model(family), tiny_model(family)
    eager.set_attn_implementation("eager")
    want = LayerTeacher(sdpa, [1])(ids_for(family))[1]
    call = LayerTeacher(eager, [1])(ids_for(family))[1]
    assert largest(call.attention_output - want.attention_output) < 1e-5
    # Called on its own, without the mask that the model makes, the same module looks ahead.
    given = []
    hook = attention_modules(eager)[1].register_forward_pre_hook(
        lambda _, args, kwargs: given.append((args, kwargs)), with_kwargs=True
    )
    eager(input_ids=ids_for(family), use_cache=False)
    hook.remove()
    args, kwargs = given[0]
    alone = attention_modules(eager)[1](*args, **kwargs | {"attention_mask": None})[0]
    assert largest(alone - want.attention_output) > 0.1


@both_families
@pytest.mark.parametrize("insertion", ["replace", "parallel"])
@pytest.mark.parametrize("layers", [[], [0, 2]])
def test_the_base_predicts_on_whatever_becomes_of_the_model(family, insertion, layers):
    model, ids = tiny_model(family), ids_for(family)
    want = tiny_model(family).base_model(input_ids=ids, use_cache=False).last_hidden_state
    teacher, layer_teacher = PredictionTeacher(model, layers), LayerTeacher(model, layers)
    insert_infini(model, infini_params(layers=layers, insertion=insertion))
    with torch.no_grad():
        for index, module in infini_modules(model).items():
            module.q_proj.weight += index + 1
            if module.alpha is not None:
                module.alpha += 1
    assert torch.equal(teacher(ids), want)
    assert not teacher(ids).requires_grad
    notes = record_layers(tiny_model(family), ids)
    for index, call in layer_teacher(ids).items():
        assert torch.equal(call.output, notes["returned"][index])
    student = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    assert (largest(student - want) > 0.1) == bool(layers)


@both_families
def test_a_document_is_seen_segment_by_segment_or_whole(family):
    base, segment_length = tiny_model(family), 4
    ids = random_ids(base.config.vocab_size, BATCH, 3 * segment_length)
    with torch.no_grad():
        whole = base.base_model(input_ids=ids, use_cache=False).last_hidden_state
        segments = run_folded(tiny_model(family), ids, segment_length)
    assert torch.equal(DocumentTeacher(tiny_model(family), None)(ids), whole)
    assert torch.equal(DocumentTeacher(tiny_model(family), segment_length)(ids), segments)
    first = slice(0, segment_length)
    assert largest(whole[:, first] - segments[:, first]) < 1e-5
    assert largest(whole - segments) > 0.1
    teacher = DocumentTeacher(base.train(), None)
    assert not teacher.base.training
    assert not any(p.requires_grad for p in base.parameters())
    assert teacher.weight is base.get_output_embeddings().weight
