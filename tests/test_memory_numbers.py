"""The memory in the number types of real models: sizes that grow, shrink and overflow."""

from collections.abc import Iterator

import jaxtyping
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from infini_retrofit.layer import memory
from infini_retrofit.layer.feature_maps import (
    FEATURES_PER_CHANNEL,
    FeatureMapName,
    FeatureMaps,
    elu1,
)
from infini_retrofit.layer.gate import memory_share, mix
from infini_retrofit.layer.memory import (
    MemoryState,
    UpdateRule,
    Write,
    prefix_states,
    retrieve,
    scan_states,
    write_segments,
)
from tests.reference import largest, recall

BATCH, SEGMENTS, KV_HEADS, GROUP, TOKENS, KEY, VALUE = 2, 3, 2, 3, 5, 7, 4
HEADS = KV_HEADS * GROUP
MANY_SEGMENTS = 10_000
every_rule = pytest.mark.parametrize("rule", ["linear", "delta", "delta_gamma"])


@pytest.fixture
def _shapes_unchecked() -> Iterator[None]:
    """Let many small calls pass without the checks of shapes, which take most of their time."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def draw_qkv() -> tuple[Tensor, Tensor, Tensor]:
    grid = (BATCH, SEGMENTS)
    return (
        draw(*grid, HEADS, TOKENS, KEY, seed=1),
        draw(*grid, KV_HEADS, TOKENS, KEY, seed=2),
        draw(*grid, KV_HEADS, TOKENS, VALUE, seed=3),
    )


def run_memory(rule: UpdateRule, local: Tensor, gate: Tensor) -> Tensor:
    query, key, value = draw_qkv()
    found, _ = scan_states(Write(elu1(key), value), rule)
    return read_and_mix(local, elu1(query), found, gate)


def read_and_mix(local: Tensor, feature: Tensor, state: MemoryState, gate: Tensor) -> Tensor:
    numerator, denominator = retrieve(feature, state)
    share = memory_share(denominator, gate[:, None, None])
    return mix(local, numerator, denominator, share)


def error_of_a_long_sum(dtype: torch.dtype) -> float:
    """Write 10,000 segments into a state of one dtype; return the relative error of z."""
    key = draw(1, MANY_SEGMENTS, 1, 11, 3)
    written = write_segments(Write(elu1(key), key))
    exact = elu1(key.double()).sum(dim=(1, 3))
    if dtype is torch.float32:
        normalizer = prefix_states(written)[1].normalizer
    else:
        normalizer = torch.zeros(1, 1, 3, dtype=dtype)
        for segment in written.normalizer.unbind(1):
            normalizer = normalizer + segment.to(dtype)
    return largest(normalizer.double() / exact - 1)


def test_the_state_still_grows_after_ten_thousand_segments():
    assert error_of_a_long_sum(torch.float32) < 1e-4
    assert error_of_a_long_sum(torch.bfloat16) > 0.5


@torch.no_grad()
def error_of_a_long_scan(dtype: torch.dtype, num_segments: int) -> float:
    """Overwrite for many segments; return how far what is recalled is from float64."""
    key, value, query = draw(1, num_segments, 1, 11, 3), draw(1, num_segments, 1, 11, 4), draw(9, 3)
    recalled = []
    for exact in (dtype, torch.float64):
        write = Write(elu1(key.to(exact)), value.to(exact))
        _, end = scan_states(write, "delta_gamma")
        recalled.append(recall(elu1(query.to(exact))[None, None], end))
    assert largest(recalled[1]) > 0.1
    return largest(recalled[0].double() - recalled[1])


@pytest.mark.usefixtures("_shapes_unchecked")
def test_what_is_overwritten_ten_thousand_times_is_not_lost_to_rounding():
    assert error_of_a_long_scan(torch.float32, MANY_SEGMENTS) < 1e-5
    assert error_of_a_long_scan(torch.bfloat16, num_segments=100) > 1e-3


@every_rule
@pytest.mark.parametrize("feature_map", ["elu1", "hedgehog"])
def test_keys_all_very_negative_are_still_recalled(rule: UpdateRule, feature_map: FeatureMapName):
    maps = FeatureMaps(feature_map, HEADS, KV_HEADS, KEY, FEATURES_PER_CHANNEL[feature_map] * KEY)
    _, key, value = draw_qkv()
    query, key = torch.full((BATCH, SEGMENTS, HEADS, 1, KEY), -20.0), key - 20
    value[:] = 3.0
    assert (F.elu(key) + 1).count_nonzero() < key.numel() // 2
    with torch.no_grad():
        found, _ = scan_states(Write(maps.of_key(key), value), rule)
        recalled = recall(maps.of_query(query), found)[:, 1]
    assert largest(recalled - 3) < 1e-4


def test_gradients_stay_finite_down_to_where_a_memory_counts_as_empty():
    gate, local = torch.full((1,), 5.0), torch.zeros(1, 1, 1, 1)
    for exponent in range(-60, -20):
        query = torch.full((1, 1, 1, 1), float(exponent), requires_grad=True)
        key = torch.zeros(1, 1, 1, 1, requires_grad=True)
        state = write_segments(Write(elu1(key), torch.ones(1, 1, 1, 1)))
        out = read_and_mix(local, elu1(query), state, gate)
        gradients = torch.autograd.grad(out.sum(), [query, key])
        assert all(x.isfinite().all() for x in gradients), exponent


@every_rule
@pytest.mark.parametrize("exponent", [-45.0, -41.0, -20.0, 60.0])
def test_gradients_of_keys_of_any_size_stay_finite(rule: UpdateRule, exponent: float):
    query, key, value = draw_qkv()
    key = (key + exponent).requires_grad_()
    found, _ = scan_states(Write(elu1(key), value), rule)
    gate, local = torch.zeros(HEADS), torch.zeros(BATCH, SEGMENTS, HEADS, TOKENS, VALUE)
    (gradient,) = torch.autograd.grad(read_and_mix(local, elu1(query), found, gate).sum(), key)
    assert gradient.isfinite().all()


@every_rule
def test_the_memory_stays_float32_under_autocast(rule: UpdateRule, monkeypatch):
    _, key, value = draw_qkv()
    local, gate = draw(BATCH, SEGMENTS, HEADS, TOKENS, VALUE), torch.zeros(HEADS)
    write = Write(elu1(key), value)
    want_state = scan_states(write, rule)[1]
    want = run_memory(rule, local, gate)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        state = scan_states(write, rule)[1]
        got = run_memory(rule, local, gate)
        monkeypatch.setattr(memory.torch, "autocast", lambda *_, **__: torch.enable_grad())
        unguarded = scan_states(write, rule)[1]
    assert state.matrix.dtype == state.normalizer.dtype == got.dtype == torch.float32
    assert torch.equal(state.matrix, want_state.matrix)
    assert torch.equal(got, want)
    assert largest(unguarded.matrix - want_state.matrix) > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("feature_map", ["elu1", "hedgehog", "dpfp"])
@every_rule
def test_the_state_of_a_16_bit_model_is_float32(rule, feature_map, dtype):
    _, key, value = draw_qkv()
    maps = FeatureMaps(feature_map, HEADS, KV_HEADS, KEY, FEATURES_PER_CHANNEL[feature_map] * KEY)
    _, state = scan_states(Write(maps.of_key(key.to(dtype)), value.to(dtype)), rule)
    assert state.matrix.dtype == state.normalizer.dtype == torch.float32
