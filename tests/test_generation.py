"""Token by token, in chunks or at once: with an `InfiniCache` a model computes the same."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from infini_retrofit.generation.cache import InfiniCache
from infini_retrofit.generation.generation import enable_generation, read
from infini_retrofit.layer import attention, tokens
from infini_retrofit.layer.attention import InfiniAttention
from infini_retrofit.layer.compressive_memory import CompressiveMemory
from infini_retrofit.layer.cut import Cut, Layout
from infini_retrofit.layer.state import LayerState, State, state_after
from infini_retrofit.model.families import decoder_layers
from infini_retrofit.model.retrofit import infini_modules
from infini_retrofit.model.running import run_folded, run_in_layer
from tests.reference import largest
from tests.tiny_generation import (
    SEGMENT,
    assert_same,
    at_once,
    both_others,
    draw_ids,
    every_case,
    filled,
    generate,
    generating_model,
    retrofitted_model,
)

PARTS = [
    [1, 4, 11, 1, 3, 1, 4],  # up to a border, over two at once, over one token by token
    [1, 3, 1, 1, 5, 6, 8],
    [10, 1, 1, 1, 3, 1, 8],
]
# k * SEGMENT + {-1, 0, 1} for k = 0..4.
LENGTHS = [1] + [k * SEGMENT + d for k in range(1, 5) for d in (-1, 0, 1)]


@torch.inference_mode()
def in_parts(model: PreTrainedModel, ids: Tensor, sizes: list[int]) -> Tensor:
    """Run rows in several calls of some tokens each."""
    cache, logits = InfiniCache(model), []
    for part in ids.split(sizes, dim=1):
        logits.append(model(part, past_key_values=cache, use_cache=True).logits)
    return torch.cat(logits, dim=1)


@every_case
@torch.no_grad()
def test_a_prompt_in_parts_or_at_once_equals_the_run_that_is_trained(family, other, form):
    model, params = retrofitted_model(family, **form)
    model, ids = model.double(), draw_ids(2, 5 * SEGMENT)
    runs, head = {"segment": run_folded, "full": run_in_layer}, model.get_output_embeddings()
    trained = {name: head(run(model, ids, SEGMENT)) for name, run in runs.items()}
    enable_generation(model, params, other)
    for got in (at_once(model, ids), *(in_parts(model, ids, sizes) for sizes in PARTS)):
        assert largest(got - trained[other]) < 1e-9
    is_beside = params.insertion == "parallel" and not params.local_context
    has_others = params.layers != "all" or is_beside
    assert (largest(trained["full"] - trained["segment"]) > 1e-2) == has_others


def forgetting(*args: object) -> LayerState:
    """Go on from the last border, without the segment that has not ended."""
    return replace(state_after(*args), unfinished=None)


def writing_early(segments: attention.Segments, *args: object) -> LayerState:
    """Write every segment, the one that has not ended as well."""
    return replace(state_after(segments, *args), memory=segments.memory)


@pytest.mark.parametrize("broken", [forgetting, writing_early])
def test_a_segment_that_is_lost_or_written_early_is_noticed(broken, monkeypatch):
    model, ids = generating_model(), draw_ids(2, 17)
    want = at_once(model, ids)
    monkeypatch.setattr(attention, "state_after", broken)
    assert largest(in_parts(model, ids, [12, 1, 4]) - want) > 1e-3
    assert largest(in_parts(model, ids, [10, 5, 2]) - want) < 1e-5


def test_a_step_attends_once_and_writes_once_a_segment(monkeypatch):
    model, num_tokens = generating_model(), 4 * SEGMENT
    written, lengths, rotated = [], [], []
    states, join = CompressiveMemory.states, Layout.join
    monkeypatch.setattr(CompressiveMemory, "states", lambda *a: written.append(1) or states(*a))
    monkeypatch.setattr(Layout, "join", lambda cut, x: lengths.append(x.shape[3]) or join(cut, x))
    rotate = tokens.rotate
    monkeypatch.setattr(tokens, "rotate", lambda x, *a: rotated.append(x.shape[1]) or rotate(x, *a))
    in_parts(model, draw_ids(1, num_tokens), [1] * num_tokens)
    # No key is rotated twice, but that of a first call's token.
    assert sorted(rotated) == [1] * (3 * (num_tokens - 2)) + [2] * 3
    assert len(written) == 3 * (1 + 4)  # the first call may read a whole prompt
    assert lengths == [1] * (3 * num_tokens)


def test_before_generation_is_enabled_every_step_is_computed_anew():
    model, ids = retrofitted_model(layers=[1])[0], draw_ids(1, 2 * SEGMENT + 1)
    want, _ = generate(model, ids, use_cache=False)
    assert torch.equal(generate(model, ids)[0], want)
    assert not torch.equal(generate(model, ids, use_cache=True)[0], want)


@pytest.mark.parametrize(("family", "other"), [("llama", "segment"), ("gpt_neox", "full")])
def test_generation_with_a_cache_equals_generation_without_one(family, other):
    model = generating_model(family, other, layers=[1], local_context=2)
    for num_tokens in LENGTHS:
        ids = draw_ids(1, num_tokens, seed=num_tokens)
        want = generate(model, ids, use_cache=False, max_new_tokens=3)
        assert_same(generate(model, ids, max_new_tokens=3), want)


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "temperature": 0.7},
        {"num_beams": 3},
        {"num_return_sequences": 2, "do_sample": True, "top_k": 5},
    ],
    ids=str,
)
@both_others
def test_every_way_of_generating_equals_itself_without_a_cache(options, other):
    model, ids = generating_model("llama", other, layers=[0, 2], local_context=2), draw_ids(2, 13)
    want = generate(model, ids, use_cache=False, **options)
    assert_same(generate(model, ids, **options), want)


@both_others
def test_a_prompt_of_embeddings_is_continued_like_its_tokens(other):
    model, ids = generating_model("llama", other, layers=[1]), draw_ids(2, 13)
    options = {"max_new_tokens": 7, "do_sample": False, "pad_token_id": 0}
    got = model.generate(inputs_embeds=model.get_input_embeddings()(ids), **options)
    assert torch.equal(got, generate(model, ids)[0])


def test_beams_that_keep_their_rows_are_noticed(monkeypatch):
    model, ids = generating_model(), draw_ids(1, 13)
    _, want = generate(model, ids, num_beams=4)
    monkeypatch.setattr(InfiniCache, "reorder_cache", lambda cache, beam_idx: None)
    assert largest(generate(model, ids, num_beams=4)[1] - want) > 1e-3


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"num_return_sequences": 3, "do_sample": True, "top_k": 5}],
    ids=str,
)
@both_others
def test_a_text_is_read_once_and_asked_many_times(other, options):
    model, ids = generating_model(other_layers=other, layers=[1]), draw_ids(2, 33)
    cache = InfiniCache(model)
    assert list(read(model, ids, cache, num_segments=2)) == [10, 10, 10, 3]
    for seed, by_hand in enumerate((False, True)):
        prompt, asked = draw_ids(2, 4, seed=seed), copy.deepcopy(cache)
        want = generate(model, torch.cat([ids, prompt], dim=1), **options)
        mask = asked.mask_for(prompt)
        if by_hand and options:
            asked.batch_repeat_interleave(3)
        about = {"past_key_values": asked, "attention_mask": mask}
        assert_same(generate(model, prompt, **options, **about), want)
        assert (asked.num_seen, asked.batch_size) == (33 + 4 + 6, 6 if options else 2)
    assert (cache.num_seen, cache.batch_size) == (33, 2)


@every_case
def test_reading_keeps_what_a_whole_pass_keeps_and_spares_the_last_layer(
    family, other, form, monkeypatch
):
    model, ids = generating_model(family, other, **form), draw_ids(2, 33)
    whole, attended = InfiniCache(model), []
    with torch.no_grad():
        for part in ids.split(4 * SEGMENT, dim=1):
            model(part, past_key_values=whole)
    attend = InfiniAttention._attend_locally
    with monkeypatch.context() as patch:
        patch.setattr(
            InfiniAttention,
            "_attend_locally",
            lambda self, *args: attended.append(self.layer_index) or attend(self, *args),
        )
        read_only = filled(model, ids)
    want, got = whole._tensors(), read_only._tensors()
    assert want.keys() == got.keys()
    assert all(torch.equal(x, got[name]) for name, x in want.items())
    last = decoder_layers(model)[-1].modules()
    assert not {m.layer_index for m in last if isinstance(m, InfiniAttention)} & set(attended)


@pytest.mark.parametrize("num_tokens", [2, SEGMENT + 2, 2 * SEGMENT, 2 * SEGMENT + 3])
def test_reading_a_little_keeps_what_waits_in_the_window(num_tokens):
    model, ids = generating_model(local_context=SEGMENT + 1), draw_ids(2, num_tokens)
    whole = InfiniCache(model)
    with torch.no_grad():
        model(ids, past_key_values=whole)
    want, got = whole._tensors(), filled(model, ids)._tensors()
    assert all(torch.equal(x, got[name]) for name, x in want.items())


def test_a_conversation_goes_on_by_its_new_tokens_or_by_all_of_it():
    model, first, second = generating_model(), draw_ids(2, 7), draw_ids(2, 4, seed=1)
    cache = InfiniCache(model)
    answer, _ = generate(model, first, past_key_values=cache)
    text = torch.cat([first, answer, second], dim=1)
    want, new = generate(model, text), text[:, cache.num_seen :]
    for ids, mask in ((new, cache.mask_for(new)), (text, torch.ones_like(text))):
        asked = copy.deepcopy(cache)
        assert_same(generate(model, ids, past_key_values=asked, attention_mask=mask), want)
        assert asked.num_seen == text.shape[1] + 6


def test_what_was_read_can_be_trained_on():
    model = generating_model()
    cache = filled(model, draw_ids(1, 33))
    assert not any(x.is_inference() for x in cache._tensors().values())
    for num_tokens in (1, 9):
        model(draw_ids(1, num_tokens), past_key_values=cache).logits.sum().backward()
    assert all(module.gate_logit.grad.abs().sum() > 0 for module in infini_modules(model).values())


def test_a_pass_with_a_cut_of_its_own_is_left_alone():
    model, ids, state = generating_model(), draw_ids(1, 7), State()
    cache = InfiniCache(model)
    got = model(ids, cut=Cut(is_open=True), state=state, past_key_values=cache).logits
    assert largest(got - at_once(model, ids)) < 1e-5
    assert sorted(state.after) == [0, 1, 2]
    assert cache.num_seen == 0


def test_a_copy_of_a_model_generates_by_its_own_weights():
    model, ids = generating_model(), draw_ids(1, 13)
    want, other = generate(model, ids)[0], copy.deepcopy(model)
    torch.nn.init.zeros_(other.lm_head.weight)
    assert generate(other, ids)[0].eq(0).all()
    assert torch.equal(generate(model, ids)[0], want)
    assert not want.eq(0).all()
