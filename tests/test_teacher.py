"""The targets of distillation are what a full forward pass of the base really computes."""

import pytest
import torch
from torch import Tensor

from infini_retrofit.retrofit import FAMILIES, attention_modules, decoder_layers, insert_infini
from infini_retrofit.teacher import LayerTeacher
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
