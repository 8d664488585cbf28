"""Rows of different lengths in one batch: segments count from each row's first token."""

import pytest
import torch
from torch import Tensor

from infini_retrofit import generation
from infini_retrofit.cache import InfiniCache
from tests.reference import largest
from tests.tiny_generation import (
    SEGMENT,
    all_cases,
    at_once,
    draw_ids,
    generate,
    generating_model,
    name_of,
)

NUMBERS = (3, 21, 10, 16)


def padded_batch() -> tuple[Tensor, Tensor]:
    """Return prompts of different lengths, padded on the left, and where they are tokens."""
    ids = torch.zeros(len(NUMBERS), max(NUMBERS), dtype=torch.long)
    for row, num_tokens in enumerate(NUMBERS):
        ids[row, -num_tokens:] = draw_ids(1, num_tokens, seed=row)[0]
    return ids, (ids != 0).long()


@pytest.mark.parametrize(("family", "other", "form"), all_cases()[::4], ids=name_of)
def test_a_batch_padded_on_the_left_equals_each_prompt_alone(family, other, form):
    # Rectified features have little in common: small denominators magnify float32's rounding.
    dtype = torch.float64 if form.get("feature_map") == "dpfp" else torch.float32
    model = generating_model(family, other, **form).to(dtype)
    ids, mask = padded_batch()
    chunk = 2 * SEGMENT if form["insertion"] == "replace" else None
    got, logits = generate(model, ids, attention_mask=mask, prefill_chunk_size=chunk)
    for row, num_tokens in enumerate(NUMBERS):
        want, want_logits = generate(model, ids[row : row + 1, -num_tokens:])
        assert torch.equal(got[row], want[0])
        assert largest(logits[row] - want_logits[0]) < 1e-5


def test_segments_counted_from_the_padding_are_noticed(monkeypatch):
    model = generating_model()
    ids, mask = padded_batch()
    monkeypatch.setattr(generation, "_padding", lambda mask, num_columns: None)
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


@pytest.mark.parametrize(("family", "other", "form"), all_cases()[1::5], ids=name_of)
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
