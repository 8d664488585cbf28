"""The memory against loops, and against the ways in which others got it wrong."""

import pytest
import torch
from jaxtyping import TypeCheckError
from torch import Tensor

from infini_retrofit.layer.feature_maps import elu1
from infini_retrofit.layer.gate import memory_share, mix
from infini_retrofit.layer.memory import (
    MemoryState,
    Write,
    count_state_values,
    prefix_states,
    quotient,
    retrieve,
    write_segments,
)
from tests.reference import largest, naive_recall, recall

BATCH, SEGMENTS, KV_HEADS, GROUP, TOKENS, KEY, VALUE = 2, 3, 2, 3, 5, 7, 4
HEADS = KV_HEADS * GROUP


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def draw_qkv(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    grid = (BATCH, SEGMENTS)
    return (
        draw(*grid, HEADS, TOKENS, KEY, seed=1, dtype=dtype),
        draw(*grid, KV_HEADS, TOKENS, KEY, seed=2, dtype=dtype),
        draw(*grid, KV_HEADS, TOKENS, VALUE, seed=3, dtype=dtype),
    )


def write(key: Tensor, value: Tensor, weight: Tensor | None = None) -> MemoryState:
    return write_segments(Write(elu1(key), value, weight))


def read_and_mix(local: Tensor, query: Tensor, state: MemoryState, gate: Tensor) -> Tensor:
    numerator, denominator = retrieve(elu1(query), state)
    share = memory_share(denominator, gate[:, None, None])
    return mix(local, numerator, denominator, share)


def run_memory(query: Tensor, key: Tensor, value: Tensor, local: Tensor, gate: Tensor) -> Tensor:
    found, _ = prefix_states(write(key, value))
    return read_and_mix(local, query, found, gate)


def run_loop(query: Tensor, key: Tensor, value: Tensor, local: Tensor, gate: Tensor) -> Tensor:
    outputs = local.clone()
    for b in range(BATCH):
        for s in range(1, SEGMENTS):
            for h in range(HEADS):
                past_key, past_value = (x[b, :s, h // GROUP].flatten(0, 1) for x in (key, value))
                share = torch.sigmoid(gate[h])
                for t in range(TOKENS):
                    recalled = naive_recall(query[b, s, h, t], past_key, past_value)
                    outputs[b, s, h, t] = (1 - share) * local[b, s, h, t] + share * recalled
    return outputs


def test_value_and_gradient_equal_a_loop_over_tokens():
    inputs = [*draw_qkv(), draw(BATCH, SEGMENTS, HEADS, TOKENS, VALUE, seed=4), draw(HEADS, seed=5)]
    inputs = [x.requires_grad_() for x in inputs]
    probe = draw(BATCH, SEGMENTS, HEADS, TOKENS, VALUE, seed=6)
    got, want = run_memory(*inputs), run_loop(*inputs)
    assert largest(got - want) < 1e-9
    gradients = [torch.autograd.grad((x * probe).sum(), inputs) for x in (got, want)]
    for a, b in zip(*gradients, strict=True):
        assert largest(b) > 1e-3
        assert largest(a - b) < 1e-9


@pytest.mark.parametrize("repeated", ["repeat_interleave", "repeat"])
def test_grouped_heads_equal_repeated_heads(repeated):
    query, key, value = draw_qkv()
    grouped = recall(elu1(query), write(key, value))
    if repeated == "repeat_interleave":
        key, value = (x.repeat_interleave(GROUP, dim=2) for x in (key, value))
        assert largest(grouped - recall(elu1(query), write(key, value))) < 1e-12
    else:
        key, value = (x.repeat(1, 1, GROUP, 1, 1) for x in (key, value))
        assert largest(grouped - recall(elu1(query), write(key, value))) > 0.1


def broken_prefix(written: MemoryState, initial: MemoryState | None = None):
    total = [x.cumsum(dim=1) for x in (written.matrix, written.normalizer)]
    before = MemoryState(total[0] - written.matrix, total[1] - written.normalizer)
    return before, MemoryState(total[0][:, -1], total[1][:, -1])


def bits_that_own_tokens_move(prefix) -> float:
    """Change the last token of every last segment; return how much what it finds moves."""
    _, key, value = draw_qkv(torch.float32)
    other_key, other_value = key.clone(), value.clone()
    other_key[:, -1, :, -1] += 3
    other_value[:, -1, :, -1] -= 5
    found, _ = prefix(write(key, value))
    other, _ = prefix(write(other_key, other_value))
    parts = [found.matrix - other.matrix, found.normalizer - other.normalizer]
    return max(map(largest, parts))


def test_what_a_segment_finds_does_not_hold_a_bit_of_its_own_tokens():
    assert bits_that_own_tokens_move(prefix_states) == 0
    assert bits_that_own_tokens_move(broken_prefix) > 0


def test_two_halves_equal_the_whole():
    _, key, value = draw_qkv()
    written = write(key, value)
    found, end = prefix_states(written)
    first = MemoryState(written.matrix[:, :2], written.normalizer[:, :2])
    second = MemoryState(written.matrix[:, 2:], written.normalizer[:, 2:])
    middle = prefix_states(first)[1]
    found_later, end_later = prefix_states(second, middle)
    assert largest(found_later.matrix - found.matrix[:, 2:]) < 1e-12
    assert largest(end_later.normalizer - end.normalizer) < 1e-12
    forgotten, _ = prefix_states(second)
    assert largest(forgotten.matrix - found.matrix[:, 2:]) > 0.1


def test_an_empty_memory_gives_exactly_the_local_attention():
    query, _, _ = draw_qkv(torch.float32)
    empty = MemoryState(
        torch.zeros(BATCH, SEGMENTS, KV_HEADS, KEY, VALUE),
        torch.zeros(BATCH, SEGMENTS, KV_HEADS, KEY),
    )
    local = draw(BATCH, SEGMENTS, HEADS, TOKENS, VALUE, dtype=torch.float32)
    gate = torch.linspace(-4, 4, HEADS)
    assert recall(elu1(query), empty).count_nonzero() == 0
    assert torch.equal(read_and_mix(local, query, empty, gate), local)
    as_printed = local * (1 - torch.sigmoid(gate)[:, None, None]) + recall(elu1(query), empty)
    assert not torch.allclose(as_printed, local, rtol=1e-2)


@pytest.mark.parametrize("divide", [quotient, torch.div])
def test_nothing_over_nothing_is_zero_with_usable_gradients(divide):
    numerator = torch.tensor([[3.0, 5.0], [0.0, 0.0]], requires_grad=True)
    denominator = torch.tensor([[2.0], [0.0]], requires_grad=True)
    found = divide(numerator, denominator)
    found[1].sum().backward()
    assert found[0].tolist() == [1.5, 2.5]
    are_usable = [
        found[1].eq(0).all(),
        *(x.grad.isfinite().all() for x in (numerator, denominator)),
    ]
    assert all(are_usable) is (divide is quotient)


def test_identical_values_are_recalled_exactly():
    query, key, value = draw_qkv()
    value[:] = value[:1, :1, :1, :1]
    written = write(key, value)
    assert largest(recall(elu1(query), written) - value[:1, :1, :1, :1]) < 1e-12
    averaged = MemoryState(written.matrix / (BATCH * TOKENS), written.normalizer / BATCH)
    assert largest(recall(elu1(query), averaged) - value[:1, :1, :1, :1]) > 0.1


def test_a_batch_of_two_documents_equals_two_batches_of_one():
    query, key, value = draw_qkv()
    together = recall(elu1(query), prefix_states(write(key, value))[0])
    for b in range(BATCH):
        q, k, v = (x[b : b + 1] for x in (query, key, value))
        alone = recall(elu1(q), prefix_states(write(k, v))[0])
        assert largest(together[b] - alone[0]) < 1e-12
    found, _ = prefix_states(write(key, value))
    mean = MemoryState(
        found.matrix.mean(0, keepdim=True).expand_as(found.matrix),
        found.normalizer.mean(0, keepdim=True).expand_as(found.normalizer),
    )
    assert largest(recall(elu1(query), mean) - together) > 0.1


def test_a_weight_of_one_half_writes_half_a_token():
    _, key, value = draw_qkv()
    half = write(key, value, torch.full((BATCH, SEGMENTS, 1, TOKENS, 1), 0.5, dtype=torch.float64))
    assert largest(2 * half.matrix - write(key, value).matrix) < 1e-12
    assert largest(2 * half.normalizer - write(key, value).normalizer) < 1e-12


def test_padding_is_not_written():
    _, key, value = draw_qkv()
    is_token = torch.ones(BATCH, SEGMENTS, TOKENS, dtype=torch.bool)
    is_token[1, 2, 3:] = False
    written = write(key, value, is_token[:, :, None, :, None].double())
    want = write(key[1:, 2:, :, :3], value[1:, 2:, :, :3])
    assert largest(written.matrix[1, 2] - want.matrix[0, 0]) < 1e-12
    assert largest(written.normalizer[1, 2] - want.normalizer[0, 0]) < 1e-12
    padded = write(key, value)
    assert largest(padded.normalizer[1, 2] - want.normalizer[0, 0]) > 0.1


def test_the_values_of_a_state_are_those_of_its_tensors():
    _, key, value = draw_qkv(torch.float32)
    state = prefix_states(write(key, value))[1]
    num_values = sum(x[0].numel() for x in (state.matrix, state.normalizer))
    assert count_state_values(KV_HEADS, KEY, VALUE) == num_values == 2 * (7 * 4 + 7)


def test_heads_and_tokens_swapped_are_refused():
    _, key, value = draw_qkv()
    with pytest.raises(TypeCheckError):
        write_segments(Write(elu1(key).transpose(2, 3), value))
