"""Token by token, in chunks or at once: with an `InfiniCache` a model computes the same."""

import copy

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from infini_retrofit.generation.cache import InfiniCache
from infini_retrofit.generation.generation import enable_generation, read
from infini_retrofit.layer import streaming as stepping
from infini_retrofit.layer.compressive_memory import CompressiveMemory
from infini_retrofit.layer.state import Carried, Carrier
from infini_retrofit.model.retrofit import infini_modules, insert_infini
from infini_retrofit.model.running import run_folded
from tests.reference import infini_params, largest
from tests.tiny import FAMILIES, tiny_model
from tests.tiny_generation import (
    LENGTHS,
    SEGMENT,
    all_cases,
    assert_same,
    at_once,
    draw_ids,
    generate,
    generating_model,
    name_of,
    retrofitted_model,
)

TOKENS = 22
PARTS = [
    [1, 4, 11, 1, 3, 1, 1],  # up to a border, over two at once, over one token by token
    [1, 3, 1, 1, 5, 6, 5],
    [10, 1, 1, 1, 3, 1, 5],
]
every_case = pytest.mark.parametrize(("family", "other", "form"), all_cases(), ids=name_of)


@torch.inference_mode()
def in_parts(model: PreTrainedModel, ids: Tensor, sizes: list[int]) -> Tensor:
    """Run rows in several calls of some tokens each."""
    cache, logits = InfiniCache(model), []
    for part in ids.split(sizes, dim=1):
        logits.append(model(part, past_key_values=cache, use_cache=True).logits)
    return torch.cat(logits, dim=1)


@every_case
def test_a_prompt_in_parts_equals_one_forward_pass(family, other, form):
    model, ids = generating_model(family, other, **form).double(), draw_ids(2, TOKENS)
    want = at_once(model, ids)
    assert largest(want) > 0.1
    for sizes in PARTS:
        assert largest(in_parts(model, ids, sizes) - want) < 1e-9, sizes


def forgetting(segments, tokens, before, segment_length, num_carried) -> Carried:
    """Go on from the last border, without the segment that has not ended."""
    carried = _carry_on(segments, tokens, before, segment_length, num_carried)
    return Carried(carried.memory, carried.context)


def writing_early(segments, tokens, before, segment_length, num_carried) -> Carried:
    """Write every segment, the one that has not ended as well."""
    carried = _carry_on(segments, tokens, before, segment_length, num_carried)
    return Carried(segments.memory, carried.context, carried.unfinished)


_carry_on = stepping._carry_on


@pytest.mark.parametrize("broken", [forgetting, writing_early])
def test_a_segment_that_is_lost_or_written_early_is_noticed(broken, monkeypatch):
    model, ids = generating_model(), draw_ids(2, 17)
    want = at_once(model, ids)
    monkeypatch.setattr(stepping, "_carry_on", broken)
    assert largest(in_parts(model, ids, [12, 1, 4]) - want) > 1e-3
    assert largest(in_parts(model, ids, [10, 5, 2]) - want) < 1e-5


def test_a_step_attends_once_and_writes_once_a_segment(monkeypatch):
    model, ids = generating_model(), draw_ids(1, 4 * SEGMENT)
    written, rows = [], []
    states, attend = CompressiveMemory.states, stepping.SegmentCut.join
    monkeypatch.setattr(
        CompressiveMemory, "states", lambda *args: written.append(1) or states(*args)
    )
    monkeypatch.setattr(
        stepping.SegmentCut, "join", lambda cut, x: rows.append(x.shape[3]) or attend(cut, x)
    )
    in_parts(model, ids, [1] * (4 * SEGMENT))
    assert len(written) == 3 * (1 + 4)
    assert rows == [1] * (3 * 4 * SEGMENT)


@pytest.mark.parametrize("insertion", ["replace", "parallel"])
@pytest.mark.parametrize("family", FAMILIES)
def test_other_layers_that_are_confined_see_what_they_saw_in_training(family, insertion):
    model, params = retrofitted_model(family, layers=[1], insertion=insertion)
    ids = draw_ids(2, 4 * SEGMENT)
    with torch.no_grad():
        folded = run_folded(model, ids, SEGMENT)
        enable_generation(model, params, "segment")
        confined = model.base_model(ids, use_cache=False).last_hidden_state
        full, _ = retrofitted_model(family, layers=[1], insertion=insertion)
        assert largest(confined - folded) < 1e-5
        assert largest(full.base_model(ids).last_hidden_state - folded) > 1e-2


@pytest.mark.parametrize(("family", "other"), [("llama", "segment"), ("gpt_neox", "full")])
def test_generation_with_a_cache_equals_generation_without_one(family, other):
    model = generating_model(family, other, layers=[1], local_context=2)
    for num_tokens in LENGTHS:
        ids = draw_ids(1, num_tokens, seed=num_tokens)
        want = generate(model, ids, use_cache=False, max_new_tokens=3)
        assert_same(generate(model, ids, max_new_tokens=3), want)


def test_before_generation_is_enabled_every_step_is_computed_anew():
    model, params = tiny_model("llama"), infini_params(layers=[1])
    insert_infini(model.eval(), params)
    ids = draw_ids(1, 2 * SEGMENT + 1)
    want = model.generate(ids, use_cache=False, max_new_tokens=SEGMENT, do_sample=False)
    assert torch.equal(model.generate(ids, max_new_tokens=SEGMENT, do_sample=False), want)
    wrong = model.generate(ids, use_cache=True, max_new_tokens=SEGMENT, do_sample=False)
    assert not torch.equal(wrong, want)


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "temperature": 0.7},
        {"num_beams": 3},
        {"num_beams": 2, "do_sample": True},
        {"num_return_sequences": 2, "do_sample": True, "top_k": 5},
        {"prefill_chunk_size": 2 * SEGMENT},
    ],
    ids=str,
)
@pytest.mark.parametrize("other", ["segment", "full"])
def test_every_way_of_generating_equals_itself_without_a_cache(options, other):
    model = generating_model("llama", other, layers=[0, 2], local_context=2)
    ids = draw_ids(2, 13)
    without = {k: v for k, v in options.items() if k != "prefill_chunk_size"}
    want = generate(model, ids, use_cache=False, **without)
    assert_same(generate(model, ids, **options), want)


def test_beams_that_keep_their_rows_are_noticed(monkeypatch):
    model, ids = generating_model(), draw_ids(1, 13)
    want, _ = generate(model, ids, num_beams=4, max_new_tokens=12)
    monkeypatch.setattr(InfiniCache, "reorder_cache", lambda cache, beam_idx: None)
    got, _ = generate(model, ids, num_beams=4, max_new_tokens=12)
    assert not torch.equal(got, want)


def generation_repeats(cache: InfiniCache) -> None:
    """Leave a row for each prompt."""


def repeated_by_hand(cache: InfiniCache) -> None:
    """Make a row for each beam."""
    cache.batch_repeat_interleave(3)


@pytest.mark.parametrize("other", ["segment", "full"])
def test_a_text_is_read_once_and_asked_many_times(other):
    model, ids = generating_model(other_layers=other, layers=[1]), draw_ids(1, 33)
    cache = InfiniCache(model)
    assert list(read(model, ids, cache, num_segments=2)) == [10, 10, 10, 3]
    for seed in (1, 2):
        prompt = draw_ids(1, 4, seed=seed)
        want = generate(model, torch.cat([ids, prompt], dim=1))
        asked = copy.deepcopy(cache)
        mask = asked.mask_for(prompt)
        assert_same(generate(model, prompt, past_key_values=asked, attention_mask=mask), want)
        assert asked.num_seen == 33 + 4 + 6
    assert cache.num_seen == 33


@pytest.mark.parametrize("repeat", [generation_repeats, repeated_by_hand])
@pytest.mark.parametrize(
    ("other", "options"),
    [
        ("segment", {"num_beams": 3}),
        ("full", {"num_beams": 3}),
        ("segment", {"num_return_sequences": 3, "do_sample": True, "top_k": 5}),
    ],
    ids=str,
)
def test_beams_after_a_text_that_was_read_equal_those_of_all_of_it(other, options, repeat):
    model, ids = generating_model(other_layers=other, layers=[1]), draw_ids(2, 33)
    prompt, cache = draw_ids(2, 4, seed=1), InfiniCache(model)
    want = generate(model, torch.cat([ids, prompt], dim=1), **options)
    list(read(model, ids, cache))
    mask = cache.mask_for(prompt)
    repeat(cache)
    options = options | {"past_key_values": cache, "attention_mask": mask}
    assert_same(generate(model, prompt, **options), want)
    assert cache.batch_size == 6


def test_what_was_read_can_be_trained_on():
    model, cache = generating_model(), InfiniCache(generating_model())
    list(read(model, draw_ids(1, 33), cache))
    model(draw_ids(1, 9), past_key_values=cache).logits.sum().backward()
    assert all(module.gate_logit.grad.abs().sum() > 0 for module in infini_modules(model).values())
    assert not any(x.is_inference() or x.requires_grad for x in cache._tensors().values())


def test_a_conversation_goes_on_in_one_cache():
    model, first, second = generating_model(), draw_ids(2, 7), draw_ids(2, 4, seed=1)
    cache = InfiniCache(model)
    answer, _ = generate(model, first, past_key_values=cache)
    ids = torch.cat([answer[:, -1:], second], dim=1)
    got, _ = generate(model, ids, past_key_values=cache, attention_mask=cache.mask_for(ids))
    want, _ = generate(model, torch.cat([first, answer, second], dim=1))
    assert torch.equal(got, want)


def test_a_whole_text_goes_on_where_a_cache_of_its_beginning_ends():
    model, ids = generating_model(), draw_ids(1, 40)
    want, _ = generate(model, ids)
    cache = InfiniCache(model)
    list(read(model, ids[:, :33], cache))
    got, _ = generate(model, ids, past_key_values=cache, attention_mask=torch.ones_like(ids))
    assert torch.equal(got, want)
    assert cache.num_seen == 40 + 6


def test_a_pass_with_a_carrier_of_its_own_is_left_alone():
    model, ids, cache = generating_model(), draw_ids(1, 7), InfiniCache(generating_model())
    carrier = Carrier(is_open=True)
    got = model(ids, carrier=carrier, past_key_values=cache).logits
    assert largest(got - at_once(model, ids)) < 1e-5
    assert sorted(carrier.after) == [0, 1, 2]
    assert cache.num_seen == 0


def test_a_copy_of_a_model_generates_by_its_own_weights():
    model, ids = generating_model(), draw_ids(1, 13)
    want, _ = generate(model, ids)
    other = copy.deepcopy(model)
    torch.nn.init.zeros_(other.lm_head.weight)
    assert generate(other, ids)[0].eq(0).all()
    assert torch.equal(generate(model, ids)[0], want)
    assert not want.eq(0).all()
