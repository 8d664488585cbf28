"""The memory in the number types of real models: sizes that grow, shrink and overflow."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from infini_retrofit.memory import feature_map, mix, prefix_states, recall, write_segments
from tests.reference import largest

BATCH, SEGMENTS, KV_HEADS, GROUP, TOKENS, KEY, VALUE = 2, 3, 2, 3, 5, 7, 4
HEADS = KV_HEADS * GROUP


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def draw_qkv() -> tuple[Tensor, Tensor, Tensor]:
    grid = (BATCH, SEGMENTS)
    return (
        draw(*grid, HEADS, TOKENS, KEY, seed=1),
        draw(*grid, KV_HEADS, TOKENS, KEY, seed=2),
        draw(*grid, KV_HEADS, TOKENS, VALUE, seed=3),
    )


def run_memory(query: Tensor, key: Tensor, value: Tensor, local: Tensor, gate: Tensor) -> Tensor:
    found, _ = prefix_states(write_segments(key, value))
    return mix(local, query, found, gate)


def error_after_many_segments(dtype: torch.dtype) -> float:
    """Write 10,000 segments into a state of one dtype; return the relative error of z."""
    num_segments, num_tokens = 10_000, 11
    key = draw(1, num_segments, 1, num_tokens, 3)
    written = write_segments(key, key)
    exact = feature_map(key.double()).sum(dim=(1, 3))
    if dtype is torch.float32:
        normalizer = prefix_states(written)[1].normalizer
    else:
        normalizer = torch.zeros(1, 1, 3, dtype=dtype)
        for segment in written.normalizer.unbind(1):
            normalizer = normalizer + segment.to(dtype)
    return largest(normalizer.double() / exact - 1)


def test_the_state_still_grows_after_ten_thousand_segments():
    assert error_after_many_segments(torch.float32) < 1e-4
    assert error_after_many_segments(torch.bfloat16) > 0.5


def test_keys_all_very_negative_are_still_recalled():
    _, key, value = draw_qkv()
    query, key = torch.full((BATCH, SEGMENTS, HEADS, 1, KEY), -20.0), key - 20
    value[:] = 3.0
    assert (F.elu(key) + 1).count_nonzero() < key.numel() // 2
    assert largest(recall(query, write_segments(key, value)) - 3) < 1e-5


def test_gradients_stay_finite_down_to_where_a_memory_counts_as_empty():
    gate, local = torch.full((1,), 5.0), torch.zeros(1, 1, 1, 1)
    for exponent in range(-60, -20):
        query = torch.full((1, 1, 1, 1), float(exponent), requires_grad=True)
        key = torch.zeros(1, 1, 1, 1, requires_grad=True)
        state = write_segments(key, torch.ones(1, 1, 1, 1))
        gradients = torch.autograd.grad(mix(local, query, state, gate).sum(), [query, key])
        assert all(x.isfinite().all() for x in gradients), exponent


def test_the_memory_stays_float32_under_autocast():
    query, key, value = draw_qkv()
    local, gate = draw(BATCH, SEGMENTS, HEADS, TOKENS, VALUE), torch.zeros(HEADS)
    want_state = write_segments(key, value)
    want = run_memory(query, key, value, local, gate)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        state = write_segments(key, value)
        got = run_memory(query, key, value, local, gate)
        unguarded = feature_map(key).transpose(-1, -2) @ value
    assert state.matrix.dtype == state.normalizer.dtype == got.dtype == torch.float32
    assert torch.equal(state.matrix, want_state.matrix)
    assert torch.equal(got, want)
    assert unguarded.dtype is torch.bfloat16
    assert largest(unguarded - want_state.matrix) > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_state_of_a_16_bit_model_is_float32(dtype):
    _, key, value = draw_qkv()
    state = write_segments(key.to(dtype), value.to(dtype))
    assert state.matrix.dtype == state.normalizer.dtype == torch.float32
