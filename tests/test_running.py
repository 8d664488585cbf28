"""Whole models of both families: documents folded into a batch against a loop over segments."""

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from infini_retrofit.layer.cut import Cut
from infini_retrofit.layer.probe import Probe
from infini_retrofit.layer.state import State
from infini_retrofit.model import running
from infini_retrofit.model.retrofit import attention_modules
from infini_retrofit.model.running import fold, run_folded, run_in_layer, run_swapped
from tests.reference import (
    both_families,
    every_model_form,
    largest,
    make_model,
    segment_loop,
)
from tests.tiny import random_ids, tiny_model

SEGMENT, DOCUMENT = 5, 15
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def ids_for(model: PreTrainedModel, num_rows: int = 2, num_tokens: int = DOCUMENT) -> Tensor:
    return random_ids(model.config.vocab_size, num_rows, num_tokens)


def dtypes_of(state: State) -> set[torch.dtype]:
    memories = [after.memory for after in state.after.values() if after.memory is not None]
    kept = (x for m in memories for x in (m.matrix, m.normalizer))
    return {x.dtype for x in kept if x.is_floating_point()}


def kept_dtype(form: dict, computed: torch.dtype) -> torch.dtype:
    return torch.bfloat16 if form.get("state_dtype") == "bfloat16" else computed


@both_families
@every_model_form
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@torch.no_grad()
def test_folded_equals_a_loop_over_segments(family, form, dtype):
    model, state = make_model(family, form, dtype), State()
    ids = ids_for(model)
    got, want = run_folded(model, ids, SEGMENT, state=state), segment_loop(model, ids, SEGMENT)
    assert got.dtype is dtype
    assert dtypes_of(state) == {kept_dtype(form, torch.promote_types(dtype, torch.float32))}
    assert largest(got - want) < TOLERANCES[dtype] * largest(want)
    apart = run_folded(model, ids[:, SEGMENT:], SEGMENT, first_position=SEGMENT)
    assert largest(got[:, SEGMENT:] - apart) > 0.01 * largest(got)


@both_families
@every_model_form
def test_the_gradient_of_folded_equals_that_of_the_loop(family, form):
    # In 16 bits a state passes its gradient from call to call in 16 bits, too.
    model = make_model(family, form | {"bptt_segments": "all", "state_dtype": "float32"})
    ids, gradients = ids_for(model), []
    for run in (run_folded, segment_loop):
        model.zero_grad()
        run(model, ids, SEGMENT)[..., 0].sin().sum().backward()
        gradients.append({n: p.grad for n, p in model.base_model.named_parameters()})
    for name, want in gradients[1].items():
        assert largest(gradients[0][name] - want) < 1e-9 * max(1, largest(want)), name
        assert largest(want) > 1e-8 or name.endswith(("key.bias", "k_proj.bias")), name


def fold_segments_first(x: Tensor, segment_length: int) -> Tensor:
    return x.unflatten(1, (-1, segment_length)).transpose(0, 1).flatten(0, 1)


@both_families
@torch.no_grad()
def test_a_fold_in_another_order_is_noticed(family, monkeypatch):
    model = make_model(family, {}, torch.float32)
    ids = ids_for(model)
    want = segment_loop(model, ids, SEGMENT)
    monkeypatch.setattr(running, "fold", fold_segments_first)
    assert largest(run_folded(model, ids, SEGMENT) - want) > 0.1


@both_families
@pytest.mark.parametrize("local_context", [0, 3])
@torch.no_grad()
def test_positions_that_restart_in_a_later_call_matter_to_carried_keys_only(family, local_context):
    model = make_model(family, {"local_context": local_context})
    ids, state, cut = ids_for(model), State(), 2 * SEGMENT
    want = run_folded(model, ids, SEGMENT)[:, cut:]
    run_folded(model, ids[:, :cut], SEGMENT, state=state)
    restarted = run_folded(model, ids[:, cut:], SEGMENT, state=state.next())
    moved = largest(restarted - want)
    assert moved > 0.01 if local_context else moved < 1e-5


@both_families
@every_model_form
@torch.no_grad()
def test_under_autocast_the_state_stays_in_its_number_type(family, form):
    model, state = make_model(family, form, torch.float32), State()
    ids = ids_for(model)
    want = run_folded(model, ids, SEGMENT)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run_folded(model, ids, SEGMENT, state=state)
    assert 0 < (got - want).abs().mean() < 0.05 * largest(want)
    assert dtypes_of(state) == {kept_dtype(form, torch.float32)}


@both_families
@torch.no_grad()
def test_swapped_a_document_reads_what_another_wrote_for_itself(family):
    model = make_model(family, {})
    ids, probe = ids_for(model, num_rows=3), Probe(memories={})
    own = run_folded(model, ids, SEGMENT, probe)
    got = run_swapped(model, ids, SEGMENT, probe.memories)
    for row in range(3):
        other = Probe(memories={})
        run_folded(model, ids[[row - 1]], SEGMENT, other)
        want = run_folded(model, ids[[row]], SEGMENT, Probe(swapped=other.memories))
        assert largest(got[row] - want[0]) < 1e-9
    assert largest(got - own) > 0.01


def test_a_document_that_is_no_whole_number_of_segments_is_refused():
    with pytest.raises(ValueError, match=r"whole number of segments of 5 tokens, got 13 tokens"):
        fold(torch.zeros(2, 13, dtype=torch.long), SEGMENT)


def spy_on_attention(model: PreTrainedModel) -> list[dict]:
    calls: list[dict] = []
    for module in attention_modules(model):
        module.register_forward_pre_hook(
            lambda _, args, kwargs: calls.append(kwargs), with_kwargs=True
        )
    return calls


@both_families
@pytest.mark.parametrize("layers", [[], [1]])
def test_what_a_run_says_reaches_every_attention_and_no_mask_is_made(family, layers):
    model = make_model(family, {"layers": layers})
    calls, state, probe = spy_on_attention(model), State(), Probe()
    run_folded(model, ids_for(model, num_rows=1), SEGMENT, probe, state)
    run_in_layer(model, ids_for(model, num_rows=1), SEGMENT, probe)
    assert len(calls) == 2 * 3
    assert all(call["probe"] is probe for call in calls)
    assert all(call["state"] is state for call in calls[:3])
    assert [call["cut"] for call in calls] == [Cut(num_segments=3)] * 3 + [
        Cut(segment_length=5)
    ] * 3
    assert all(call["attention_mask"] is None for call in calls)


@both_families
def test_restarting_positions_would_have_made_a_mask_and_padding_would_not_have_arrived(family):
    model = tiny_model(family)
    calls, restarting = spy_on_attention(model), (torch.arange(DOCUMENT) % SEGMENT)[None]
    ids = ids_for(model, num_rows=1)
    model.base_model(ids, position_ids=restarting, use_cache=False)
    assert calls[0]["attention_mask"].shape == (1, 1, DOCUMENT, DOCUMENT)
    model.base_model(ids, attention_mask=torch.ones_like(ids), use_cache=False)
    assert calls[3]["attention_mask"] is None
