"""What generation refuses, and where what the other layers see is read from."""

import pytest
import torch
from transformers import DynamicCache

from infini_retrofit.generation.cache import InfiniCache
from infini_retrofit.generation.generation import enable_generation, segment_length
from tests.reference import largest
from tests.tiny_generation import draw_ids, filled, generate, generating_model, retrofitted_model


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prefill_chunk_size": 7}, "prefill_chunk_size must be a multiple of segment_length=5"),
        ({"cache_implementation": "static"}, "cache_implementation"),
        ({"prompt_lookup_num_tokens": 2}, "generate must run without an assistant"),
        ({"past_key_values": DynamicCache()}, "past_key_values must be an InfiniCache"),
    ],
    ids=str,
)
def test_what_an_infini_cache_cannot_do_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        generate(generating_model(), draw_ids(1, 4), **options)


def test_a_prompt_that_would_be_skipped_or_taken_for_the_whole_text_is_refused():
    model, ids = generating_model(), draw_ids(1, 40)
    cache = filled(model, ids[:, :33])
    with pytest.raises(ValueError, match=r"must come with a cache that has seen 33 tokens, got no"):
        generate(model, ids, past_key_values=cache)
    for prompt in (ids[:, 33:37], ids[:, :33]):
        mask, message = torch.ones_like(prompt), rf"the 33 tokens .* got {prompt.shape[1]}: pass"
        with pytest.raises(ValueError, match=message):
            generate(model, prompt, past_key_values=cache, attention_mask=mask)
    assert cache.num_seen == 33


def test_a_cache_of_other_rows_is_refused():
    model = generating_model()
    cache = filled(model, draw_ids(2, 4))
    for use in (lambda ids: model(ids, past_key_values=cache), cache.mask_for):
        with pytest.raises(ValueError, match="a row for each of the 3 of the batch, got 2: repeat"):
            use(draw_ids(3, 4))
    cache.batch_repeat_interleave(2)
    model(draw_ids(4, 4), past_key_values=cache)


def test_other_layers_come_from_the_configuration_and_go_there():
    model, params = retrofitted_model(layers=[1])
    model.config.other_layers = "full"
    enable_generation(model, params)
    assert not InfiniCache(model).is_bounded
    model, params = retrofitted_model(layers=[1])
    enable_generation(model, params)
    assert InfiniCache(model).is_bounded
    assert model.config.other_layers == "segment"
    with pytest.raises(ValueError, match="other_layers must be full or segment, got 'none'"):
        enable_generation(model, params, "none")
    with pytest.raises(ValueError, match=r"confined already \(load it again\) .* got 'full'"):
        enable_generation(model, params, "full")


def test_a_model_that_would_not_fill_a_cache_is_refused(tmp_path):
    (model, _), enabled = retrofitted_model(), generating_model()
    path = tmp_path / "book.cache"
    InfiniCache(enabled).save(path, enabled)
    for use in (lambda: filled(model, draw_ids(1, 4)), lambda: InfiniCache.load(path, model)):
        with pytest.raises(ValueError, match=r"call enable_generation\(model, params\) first"):
            use()


def test_a_model_without_infini_layers_is_refused_unless_its_own_are_confined():
    model, params = retrofitted_model(layers=[])
    with pytest.raises(ValueError, match=r"other_layers must be segment .* got 'full'"):
        enable_generation(model, params, "full")
    enable_generation(model, params)
    assert segment_length(model) == params.segment_length
    assert generate(model, draw_ids(1, 4))[0].shape == (1, 7)


@torch.inference_mode()
def test_a_body_takes_its_arguments_by_position_and_may_give_a_tuple():
    model, ids = generating_model(), draw_ids(1, 13)
    body, positions, cache = model.base_model, 2 * torch.arange(13)[None], InfiniCache(model)
    want = body(input_ids=ids, position_ids=positions)[0]
    assert largest(body(ids, None, positions, cache)[0] - want) < 1e-5
    assert largest(body(ids)[0] - want) > 1e-3
    hidden_states, filled = body(ids, None, positions, return_dict=False)
    assert largest(hidden_states - want) < 1e-5
    assert filled.num_seen == cache.num_seen == 13


@pytest.mark.parametrize("shape", [(1, 1, 4, 4), (1, 5)], ids=str)
def test_a_mask_that_says_nothing_of_the_tokens_is_refused(shape):
    with pytest.raises(ValueError, match=r"attention_mask must have 2 axes .* 0 tokens .* 4 new"):
        generating_model()(draw_ids(1, 4), attention_mask=torch.ones(shape))
