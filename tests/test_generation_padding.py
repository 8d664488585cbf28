"""Rows of different lengths in one batch: segments count from each row's first token."""

from itertools import cycle, product

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from infini_retrofit.generation import generation
from infini_retrofit.generation.cache import InfiniCache
from tests.reference import largest
from tests.tiny import FAMILIES
from tests.tiny_generation import (
    SEGMENT,
    at_once,
    draw_ids,
    generate,
    generating_model,
)

# Tokens of each row, of batches that come one after another.
BATCHES = ((3, 21, 10, 16), (9, 2, 5, 1), (4, 6, 1, 7))
NUMBERS = BATCHES[0]
IN_A_BATCH = {
    "rotated, carried, forgetting": {"layers": [0, 2], "local_context": 2, "decay": "feature"},
    "alibi": {"positions": "alibi", "local_context": 3},
    "delta rule": {"local": "linear", "update_rule": "delta_gamma", "feature_map": "dpfp"},
    "window, beside the base": {"insertion": "parallel", "local": "window_linear", "window": 2},
    "chosen tokens": {"layers": [1], "written_tokens": 2, "initial_state": "learnable"},
}
WITH_HOLES = {
    "rotated, carried": {"layers": [0, 2], "local_context": 2},
    "alibi, beside the base": {"insertion": "parallel", "positions": "alibi", "decay": "head"},
    "window": {"local": "window_linear", "window": 3, "positions": "none"},
    "chosen tokens": {"layers": [1], "written_tokens": 2, "recall_norm": "rms"},
}


def in_turns(forms: dict[str, dict]) -> pytest.MarkDecorator:
    """Give each form a family and what its other layers see."""
    turns = cycle(product(("full", "segment"), FAMILIES))
    cases = [pytest.param(*next(turns), form, id=name) for name, form in forms.items()]
    return pytest.mark.parametrize(("other", "family", "form"), cases)


def padded_batch(number: int = 0) -> tuple[Tensor, Tensor]:
    """Return prompts of different lengths, padded on the left, and where they are tokens."""
    numbers = BATCHES[number]
    ids = torch.zeros(len(numbers), max(numbers), dtype=torch.long)
    for row, num_tokens in enumerate(numbers):
        ids[row, -num_tokens:] = row_of(number, row)
    return ids, (ids != 0).long()


def row_of(batch: int, row: int) -> Tensor:
    """Return one prompt without padding."""
    return draw_ids(1, BATCHES[batch][row], seed=10 * batch + row)[0]


@in_turns(IN_A_BATCH)
def test_a_batch_padded_on_the_left_equals_each_prompt_alone(family, other, form):
    # Rectified features have little in common: small denominators magnify float32's rounding.
    dtype = torch.float64 if form.get("feature_map") == "dpfp" else torch.float32
    model = generating_model(family, other, **form).to(dtype)
    ids, mask = padded_batch()
    chunk = 2 * SEGMENT if form.get("insertion", "replace") == "replace" else None
    got, logits = generate(model, ids, attention_mask=mask, prefill_chunk_size=chunk)
    for row, num_tokens in enumerate(NUMBERS):
        want, want_logits = generate(model, ids[row : row + 1, -num_tokens:])
        assert torch.equal(got[row], want[0])
        assert largest(logits[row] - want_logits[0]) < 1e-5


def test_segments_counted_from_the_padding_are_noticed(monkeypatch):
    model = generating_model()
    ids, mask = padded_batch()
    monkeypatch.setattr(generation, "_padding", lambda *args: None)
    _, logits = generate(model, ids, attention_mask=mask)
    _, alone = generate(model, ids[:1, -NUMBERS[0] :])
    assert largest(logits[:1, 0] - alone[:, 0]) > 1e-3


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_reaches_the_memory_without_a_cache(side):
    model, ids = generating_model(), draw_ids(1, 13)
    padding = torch.full((1, 3), 7)
    row = torch.cat([padding, ids] if side == "left" else [ids, padding], dim=1)
    real = slice(3, None) if side == "left" else slice(0, 13)
    mask = torch.zeros_like(row)
    mask[:, real] = 1
    positions = mask.cumsum(dim=1) - 1
    got = at_once(model, row, attention_mask=mask, position_ids=positions.clamp_min(0))
    assert largest(got[:, real] - at_once(model, ids)) < 1e-5
    got = at_once(model, row, position_ids=positions.clamp_min(0))
    assert largest(got[:, real] - at_once(model, ids)) > 1e-3 or side == "right"


def filled_cache(model: PreTrainedModel) -> InfiniCache:
    """Read two padded batches, one after the other."""
    cache = InfiniCache(model)
    for number in (0, 1):
        ids, mask = padded_batch(number)
        mask = cache.mask_for(ids, mask)
        positions = (mask.cumsum(dim=1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        with torch.inference_mode():
            model(ids, mask, positions, past_key_values=cache)
    return cache


def go_on(model: PreTrainedModel, cache: InfiniCache) -> tuple[Tensor, Tensor]:
    """Generate after a third padded batch."""
    ids, mask = padded_batch(2)
    mask = cache.mask_for(ids, mask)
    return generate(model, ids, past_key_values=cache, attention_mask=mask)


@pytest.mark.parametrize("other", ["segment", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_padded_batches_that_follow_each_other_equal_each_row_alone(family, other, tmp_path):
    model = generating_model(family, other, layers=[1], local_context=2)
    filled_cache(model).save(tmp_path / "cache", model)
    cache, order = InfiniCache.load(tmp_path / "cache", model), torch.tensor([2, 0, 3, 1])
    assert (cache.is_token is None) == cache.is_bounded == (other == "segment")
    got, logits = go_on(model, cache)
    for row in range(len(NUMBERS)):
        alone = torch.cat([row_of(batch, row) for batch in range(len(BATCHES))])
        want, want_logits = generate(model, alone[None])
        assert torch.equal(got[row], want[0])
        assert largest(logits[row] - want_logits[0]) < 1e-5
    mask = cache.mask_for(draw_ids(4, 1))
    cache.batch_select_indices(order)
    assert torch.equal(cache.mask_for(draw_ids(4, 1)), mask[order])


def test_padding_taken_to_lie_all_on_the_left_is_noticed():
    model = generating_model(other_layers="full", layers=[1])
    cache, broken = filled_cache(model), filled_cache(model)
    broken.is_token = torch.arange(broken.num_seen).flip(0) < broken.num_tokens[:, None]
    assert largest(go_on(model, broken)[1] - go_on(model, cache)[1]) > 1e-3


def test_a_cache_of_other_rows_has_no_mask():
    cache = filled_cache(generating_model())
    with pytest.raises(ValueError, match="a row for each of the 3 of the batch, got 4: repeat"):
        cache.mask_for(draw_ids(3, 1))


@in_turns(WITH_HOLES)
def test_padding_may_stand_anywhere_and_calls_may_end_anywhere(family, other, form):
    model = generating_model(family, other, **form).double()
    mask = torch.rand(3, 19, generator=torch.Generator().manual_seed(0)) < 0.7
    mask[0, :11], mask[:, -1] = False, True
    ids, positions = draw_ids(3, 19), (mask.long().cumsum(dim=1) - 1).clamp_min(0)
    cache, logits, begin = InfiniCache(model), [], 0
    for size in (7, 1, 2, 1, 8):
        part = slice(begin, begin := begin + size)
        with torch.inference_mode():
            found = model(
                ids[:, part],
                attention_mask=mask[:, :begin].long(),
                position_ids=positions[:, part],
                past_key_values=cache,
            )
        logits.append(found.logits)
    got = torch.cat(logits, dim=1)
    for row in range(3):
        want = at_once(model, ids[row : row + 1, mask[row]])
        assert largest(got[row, mask[row]] - want[0]) < 1e-9
    assert cache.num_tokens.tolist() == mask.sum(dim=1).tolist()
