"""Rows of different lengths in one batch: segments count from each row's first token."""

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from infini_retrofit.generation import generation
from infini_retrofit.generation.cache import InfiniCache
from infini_retrofit.generation.versions import CACHE
from infini_retrofit.layer.cut import Cut
from tests.reference import largest
from tests.tiny_generation import (
    SEGMENT,
    assert_same,
    at_once,
    both_others,
    draw_ids,
    every_case,
    generate,
    generating_model,
)

# Tokens of each row, of batches that come one after another.
BATCHES = ((9, 2, 5, 1), (4, 6, 1, 7), (3, 21, 10, 16))


def row_of(batch: int, row: int) -> Tensor:
    return draw_ids(1, BATCHES[batch][row], seed=10 * batch + row)[0]


def padded_batch(batch: int) -> tuple[Tensor, Tensor]:
    """Return prompts of different lengths, padded on the left, and where they are tokens."""
    ids = torch.zeros(len(BATCHES[batch]), max(BATCHES[batch]), dtype=torch.long)
    for row, num_tokens in enumerate(BATCHES[batch]):
        ids[row, -num_tokens:] = row_of(batch, row)
    return ids, (ids != 0).long()


def positions_of(mask: Tensor) -> Tensor:
    return (mask.cumsum(dim=1) - 1).clamp_min(0)


@torch.inference_mode()
def in_calls(model: PreTrainedModel, ids: Tensor, mask: Tensor, sizes: list[int]) -> Tensor:
    """Run padded rows in several calls of some columns each."""
    cache, logits = InfiniCache(model), []
    for part in ids.split(sizes, dim=1):
        begin, end = cache.num_seen, cache.num_seen + part.shape[1]
        positions = positions_of(mask)[:, begin:end]
        logits.append(model(part, mask[:, :end], positions, past_key_values=cache).logits)
    assert cache.num_tokens.tolist() == mask.sum(dim=1).tolist()
    return torch.cat(logits, dim=1)


@every_case
def test_padding_may_stand_anywhere_and_calls_may_end_anywhere(family, other, form):
    model, ids = generating_model(family, other, **form).double(), draw_ids(3, 19)
    mask = (torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) < 0.7).long()
    mask[0, :7] = mask[1, 12:] = 0
    mask[:, [7, 10]] = 1  # steps of one token in every row
    whole = at_once(model, ids, attention_mask=mask, position_ids=positions_of(mask))
    in_parts = in_calls(model, ids, mask, [7, 1, 2, 1, 8])
    for row, is_token in enumerate(mask.bool()):
        want = at_once(model, ids[row : row + 1, is_token])[0]
        assert largest(whole[row, is_token] - want) < 1e-9
        assert largest(in_parts[row, is_token] - want) < 1e-9


def test_segments_counted_from_the_padding_are_noticed(monkeypatch):
    model, (ids, mask) = generating_model(), padded_batch(0)
    about = {"attention_mask": mask, "position_ids": positions_of(mask)}
    want = at_once(model, ids, **about)[:, -1]
    monkeypatch.setattr(generation, "Cut", lambda is_open, is_token: Cut(is_open=is_open))
    assert largest(at_once(model, ids, **about)[:, -1] - want) > 1e-3


def filled_cache(model: PreTrainedModel, num_batches: int = 2) -> InfiniCache:
    cache = InfiniCache(model)
    for batch in range(num_batches):
        ids, mask = padded_batch(batch)
        mask = cache.mask_for(ids, mask)
        with torch.inference_mode():
            model(ids, mask, positions_of(mask)[:, -ids.shape[1] :], past_key_values=cache)
    return cache


def go_on(
    model: PreTrainedModel, cache: InfiniCache, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    ids, mask = padded_batch(2)
    about = {"past_key_values": cache, "attention_mask": cache.mask_for(ids, mask)}
    return generate(model, ids, prefill_chunk_size=chunk, **about)


@pytest.mark.parametrize(("num_batches", "chunk"), [(0, None), (0, 2 * SEGMENT), (2, None)])
@both_others
def test_padded_batches_that_follow_each_other_equal_each_row_alone(num_batches, chunk, other):
    model = generating_model("llama", other, layers=[1], local_context=2)
    cache = filled_cache(model, num_batches)
    tokens, logits = go_on(model, cache, chunk)
    batches = [*range(num_batches), 2]
    for row in range(len(BATCHES[0])):
        alone = torch.cat([row_of(batch, row) for batch in batches])[None]
        assert_same((tokens[row : row + 1], logits[row : row + 1]), generate(model, alone))


@both_others
def test_a_cache_of_padded_batches_is_saved_and_sorted_with_its_padding(other, tmp_path):
    model = generating_model("gpt_neox", other, layers=[1])
    cache, order, more = filled_cache(model), torch.tensor([2, 0, 3, 1]), draw_ids(4, 1)
    assert (cache.is_token is None) == cache.is_bounded == (other == "segment")
    mask = cache.mask_for(more)
    assert mask.sum(dim=1).tolist() == [14, 9, 7, 9]
    cache.save(tmp_path / "cache", model)
    loaded, turned = (InfiniCache.load(tmp_path / "cache", model) for _ in range(2))
    turned.batch_select_indices(order)
    assert torch.equal(turned.mask_for(more), mask[order])
    assert_same(go_on(model, loaded), go_on(model, cache))


def test_padding_taken_to_lie_all_on_the_left_is_noticed():
    model = generating_model(other_layers="full", layers=[1])
    cache, broken = filled_cache(model), filled_cache(model)
    broken.is_token = torch.arange(broken.num_seen).flip(0) < broken.num_tokens[:, None]
    assert largest(go_on(model, broken)[1] - go_on(model, cache)[1]) > 1e-3


@both_others
def test_rows_that_end_early_read_no_padding_and_go_on_as_if_alone(other):
    model = generating_model("llama", other, layers=[1], local_context=2)
    ids, mask = padded_batch(0)
    alone = [generate(model, row_of(0, row)[None], max_new_tokens=12)[0][0] for row in range(4)]
    end = int(alone[0][4])  # ends the first row early
    options = {"max_new_tokens": 12, "eos_token_id": end}
    cache, answers = InfiniCache(model), []
    found, _ = generate(model, ids, attention_mask=mask, **{CACHE: cache}, **options)
    for row in range(4):
        answer = found[row].tolist()
        answers.append(answer[: answer.index(end) + 1] if end in answer else answer)
    lengths = [len(answer) for answer in answers]
    assert min(lengths) < max(lengths) == found.shape[1]
    # The last column was not read; a row that ended earlier has read all of its answer.
    read = [min(n, found.shape[1] - 1) for n in lengths]
    assert cache.num_tokens.tolist() == [n + m for n, m in zip(BATCHES[0], read, strict=True)]
    tokens, logits = go_on(model, cache)
    for row, answer in enumerate(answers):
        parts = row_of(0, row), torch.tensor(answer[: read[row]]), row_of(2, row)
        whole = torch.cat(parts)[None]
        want = generate(model, whole, attention_mask=torch.ones_like(whole))
        assert_same((tokens[row : row + 1], logits[row : row + 1]), want)


def test_prompts_that_end_with_padding_are_refused():
    model, (ids, mask) = generating_model(), padded_batch(0)
    with pytest.raises(ValueError, match="attention_mask must end with a token in each row"):
        generate(model, ids.flip(1), attention_mask=mask.flip(1))
