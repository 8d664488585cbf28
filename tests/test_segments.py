"""Documents folded into a batch against a plain loop over segments, on whole tiny models."""

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from infini_retrofit.layer import compressive_memory, memory
from infini_retrofit.layer.memory import MemoryState, prefix_states
from infini_retrofit.layer.state import Carrier
from infini_retrofit.model import running as segments
from infini_retrofit.model.families import FAMILIES
from infini_retrofit.model.retrofit import attention_modules, infini_modules, insert_infini
from infini_retrofit.model.running import fold, run_folded, run_in_layer, run_swapped
from tests.reference import infini_params, largest, segment_loop
from tests.tiny import random_ids, tiny_model

SEGMENT, DOCUMENT = 5, 15
both_families = pytest.mark.parametrize("family", sorted(FAMILIES))
FORMS = {
    "published": {},
    "local context": {"local_context": 3},
    "linear": {"local": "linear", "positions": "none"},
    "one layer": {"layers": [1]},
    "16 bits": {"state_dtype": "bfloat16", "decay": "feature"},
}
both_forms = pytest.mark.parametrize("form", sorted(FORMS))


def retrofitted(family: str, dtype: torch.dtype, **over: object) -> PreTrainedModel:
    model = tiny_model(family)
    insert_infini(model, infini_params(**over))
    gates = {module: module.gate_logit.data for module in infini_modules(model).values()}
    model.to(dtype)
    if dtype is torch.bfloat16:
        for module, gate in gates.items():
            module.gate_logit.data = gate
    return model


def ids_for(model: PreTrainedModel, num_rows: int = 2, num_tokens: int = DOCUMENT) -> Tensor:
    return random_ids(model.config.vocab_size, num_rows, num_tokens)


TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 2e-2}


@both_families
@both_forms
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@torch.no_grad()
def test_folded_equals_a_plain_loop_over_segments(family, form, dtype):
    model = retrofitted(family, dtype, **FORMS[form])
    ids = ids_for(model)
    difference = run_folded(model, ids, SEGMENT) - segment_loop(model, ids, SEGMENT)
    assert largest(difference) < TOLERANCES[dtype]


def fold_segments_first(x: Tensor, segment_length: int) -> Tensor:
    return x.unflatten(1, (-1, segment_length)).transpose(0, 1).flatten(0, 1)


def inclusive_prefix(written: MemoryState, initial: MemoryState | None, bptt_segments):
    _, after = prefix_states(written, initial)
    return MemoryState(written.matrix.cumsum(1), written.normalizer.cumsum(1)), after


@both_families
def test_a_wrong_fold_and_a_memory_of_the_segment_itself_are_noticed(family, monkeypatch):
    model = retrofitted(family, torch.float32)
    ids = ids_for(model)
    want = segment_loop(model, ids, SEGMENT).detach()
    with monkeypatch.context() as patch:
        patch.setattr(segments, "fold", fold_segments_first)
        assert largest(run_folded(model, ids, SEGMENT) - want) > 0.1
    monkeypatch.setattr(compressive_memory, "prefix_states", inclusive_prefix)
    assert largest(run_folded(model, ids, SEGMENT) - want) > 0.1


@both_families
def test_the_gradient_of_folded_equals_that_of_the_loop(family):
    model = retrofitted(family, torch.float64)
    ids, gradients = ids_for(model), []
    for run in (run_folded, segment_loop):
        model.zero_grad()
        run(model, ids, SEGMENT)[..., 0].sin().sum().backward()
        gradients.append({n: p.grad for n, p in model.base_model.named_parameters()})
    for name, want in gradients[1].items():
        assert largest(gradients[0][name] - want) < 1e-9, name
        assert largest(want) > 1e-6 or name.endswith(("key.bias", "k_proj.bias")), name


def rounded_prefix(written: MemoryState, initial: MemoryState | None, bptt_segments):
    """Keep the state in bfloat16, segment after segment."""
    found = []
    for x in (written.matrix, written.normalizer):
        states = [torch.zeros_like(x[:, 0]).bfloat16()]
        for added in x.unbind(1):
            states.append(states[-1] + added.bfloat16())
        found.append(torch.stack(states, dim=1).float())
    matrix, normalizer = found
    before = MemoryState(matrix[:, :-1], normalizer[:, :-1])
    return before, MemoryState(matrix[:, -1], normalizer[:, -1])


def rounded_update(state: MemoryState, *args: object) -> MemoryState:
    """Keep the state in bfloat16, as a rule leaves it."""
    new = UPDATE(state, *args)
    return MemoryState(*(x.bfloat16().float() for x in (new.matrix, new.normalizer)))


UPDATE = memory._update


@pytest.mark.parametrize(("rule", "most"), [("linear", 0.8), ("delta", 0.8), ("delta_gamma", 0.9)])
def test_a_bfloat16_model_is_closer_to_float32_than_one_with_a_bfloat16_state(
    rule, most, monkeypatch
):
    form = {"layers": [0], "initial_memory_share": 0.9, "update_rule": rule}
    exact, model = (retrofitted("llama", d, **form) for d in (torch.float32, torch.bfloat16))
    exact.load_state_dict(model.state_dict())
    ids = ids_for(exact, 1, 400 * SEGMENT)
    with torch.no_grad():
        want = run_folded(exact, ids, SEGMENT)
        error = (run_folded(model, ids, SEGMENT) - want).abs().mean()
        monkeypatch.setattr(compressive_memory, "prefix_states", rounded_prefix)
        monkeypatch.setattr(memory, "_update", rounded_update)
        rounded_error = (run_folded(model, ids, SEGMENT) - want).abs().mean()
    assert error < TOLERANCES[torch.bfloat16]
    assert error < most * rounded_error


@both_families
def test_one_infini_layer_alone_is_the_same_in_layer_and_folded(family):
    model = retrofitted(family, torch.float64, local_context=2)
    layer, width = attention_modules(model)[0], model.config.hidden_size
    x = torch.randn(2, DOCUMENT, width, dtype=torch.float64)
    positions = torch.arange(DOCUMENT)[None]
    tables = model.base_model.rotary_emb(x, positions)
    want = layer(x, tables)[0]
    rows = x.view(-1, SEGMENT, width)
    folded = [t.expand(2, -1, -1).reshape(len(rows), SEGMENT, -1) for t in tables]
    got = layer(rows, tuple(folded), Carrier(num_segments=3))[0].view_as(x)
    assert largest(got - want) < 1e-9


def swapped(model: PreTrainedModel, ids: Tensor, segment_length: int) -> Tensor:
    carrier = Carrier(found={})
    run_folded(model, ids, segment_length, carrier=carrier)
    return run_swapped(model, ids, segment_length, carrier.found)


@both_families
def test_swapped_a_document_reads_what_another_wrote_for_itself(family):
    model = retrofitted(family, torch.float64)
    ids = ids_for(model, num_rows=3)
    with torch.no_grad():
        got = swapped(model, ids, SEGMENT)
        for row in range(3):
            other = Carrier(found={})
            run_folded(model, ids[[row - 1]], SEGMENT, carrier=other)
            reader = Carrier(num_segments=3, strangers=other.found)
            positions = torch.arange(DOCUMENT).view(3, SEGMENT)
            about = {"position_ids": positions, "use_cache": False, "carrier": reader}
            want = model.base_model(ids[row].view(3, SEGMENT), **about).last_hidden_state
            assert largest(got[row] - want.flatten(0, 1)) < 1e-9
        assert largest(got - run_folded(model, ids, SEGMENT)) > 0.01
        same = ids[:1].expand(3, -1)
        assert largest(run_folded(model, same, SEGMENT) - swapped(model, same, SEGMENT)) < 1e-9


@both_families
def test_swapped_nothing_of_a_document_comes_back_to_its_later_segments(family):
    model = retrofitted(family, torch.float64)
    ids = ids_for(model, num_rows=2)
    other = ids.clone()
    other[0, :SEGMENT] = (other[0, :SEGMENT] + 1) % model.config.vocab_size
    with torch.no_grad():
        own, borrowed = (
            largest((run(model, other, SEGMENT)[0] - run(model, ids, SEGMENT)[0])[SEGMENT:])
            for run in (run_folded, swapped)
        )
    assert own > 0.01
    assert borrowed == 0


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
@pytest.mark.parametrize("over", [None, {"layers": [1]}])
def test_the_carrier_reaches_every_attention_and_no_mask_is_made(family, over):
    model = tiny_model(family) if over is None else retrofitted(family, torch.float32, **over)
    calls, carrier = spy_on_attention(model), Carrier()
    run_folded(model, ids_for(model, num_rows=1), SEGMENT, carrier=carrier)
    run_in_layer(model, ids_for(model, num_rows=1))
    assert len(calls) == 2 * 3
    assert all(call["carrier"] is carrier for call in calls[:3])
    assert all(isinstance(call["carrier"], Carrier) for call in calls[3:])
    assert all(call["attention_mask"] is None for call in calls)


@both_families
def test_restarting_positions_would_have_made_a_mask_and_padding_would_not_have_arrived(family):
    model = tiny_model(family)
    calls, ids = spy_on_attention(model), ids_for(model, num_rows=1)
    restarting = (torch.arange(DOCUMENT) % SEGMENT)[None]
    model.base_model(input_ids=ids, position_ids=restarting, use_cache=False)
    assert calls[0]["attention_mask"].shape == (1, 1, DOCUMENT, DOCUMENT)
    padding = torch.ones_like(ids)
    model.base_model(input_ids=ids, attention_mask=padding, use_cache=False)
    assert calls[3]["attention_mask"] is None


@both_families
@pytest.mark.parametrize("form", ["published", "local context"])
def test_two_calls_that_hand_over_equal_one(family, form):
    model, cut = retrofitted(family, torch.float64, **FORMS[form]), 2 * SEGMENT
    ids, first = ids_for(model), Carrier()
    whole, end = Carrier(), Carrier()
    with torch.no_grad():
        want = run_folded(model, ids, SEGMENT, carrier=whole)[:, cut:]
        run_folded(model, ids[:, :cut], SEGMENT, carrier=first)

        def go_on(carrier: Carrier, first_position: int = cut) -> float:
            rest = (model, ids[:, cut:], SEGMENT)
            got = run_folded(*rest, carrier=carrier, first_position=first_position)
            return largest(got - want)

        end.before = first.after
        assert go_on(end) < 1e-9
        assert go_on(Carrier()) > 0.01
        restarted = go_on(Carrier(before=first.after), first_position=0)
        assert restarted > 0.01 if form == "local context" else restarted < 1e-5
    for index, carried in whole.after.items():
        assert largest(end.after[index].memory.matrix - carried.memory.matrix) < 1e-9
        if form == "local context":
            assert largest(end.after[index].context.key - carried.context.key) < 1e-9
