"""The equations of the memory, what a layer keeps around them, and the ways others got them wrong.

Their values are compared with the loop over tokens in test_forms.
"""

import math
from collections.abc import Iterator
from dataclasses import replace

import jaxtyping
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from infini_retrofit.layer.compressive_memory import (
    LONGEST_HALF_LIFE,
    SHORTEST_HALF_LIFE,
    CompressiveMemory,
)
from infini_retrofit.layer.feature_maps import FEATURES_PER_CHANNEL, FeatureMaps, elu1
from infini_retrofit.layer.memory import (
    MemoryState,
    UpdateRule,
    Write,
    empty_state,
    memory_share,
    mix,
    prefix_states,
    quotient,
    retrieve,
    scan_states,
    slot_states,
    with_slots,
    write_segments,
)
from tests.reference import SHAPE, infini_params, largest, recall, without_conflicts

BATCH, SEGMENTS, HEADS, TOKENS, KEY, VALUE = 2, 5, 3, 4, 7, 6
GRID = (BATCH, SEGMENTS, SHAPE.num_kv_heads, TOKENS, SHAPE.head_dim)  # of `make_memory`
MANY_SEGMENTS = 10_000
every_rule = pytest.mark.parametrize("rule", ["linear", "delta", "delta_gamma"])
every_border = pytest.mark.parametrize("every", [None, 1, 2, SEGMENTS, 99])


@pytest.fixture
def _shapes_unchecked() -> Iterator[None]:
    """Skip the checks of shapes, which take most of the time of many small calls."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype)


def draw_write() -> Write:
    grid = (BATCH, SEGMENTS, HEADS, TOKENS)
    feature, value = elu1(draw(*grid, KEY)), draw(*grid, VALUE)
    return Write(feature.requires_grad_(), value.requires_grad_())


def draw_initial() -> MemoryState:
    normalizer = torch.rand(BATCH, HEADS, KEY, dtype=torch.float64)
    return MemoryState(draw(BATCH, HEADS, KEY, VALUE).requires_grad_(), normalizer.requires_grad_())


def scan(write: Write, rule: UpdateRule, **about: object) -> tuple[MemoryState, MemoryState]:
    return scan_states(write, rule, empty_state(write), **about)


def numbers(states: tuple[MemoryState, MemoryState]) -> Tensor:
    return torch.cat([x.flatten() for state in states for x in (state.matrix, state.normalizer)])


@every_border
def test_all_segments_at_once_equal_one_after_another_for_the_linear_rule(every):
    write, initial = draw_write(), draw_initial()
    inputs = [write.feature, write.value, initial.matrix, initial.normalizer]
    got = numbers(prefix_states(write_segments(write), initial, every))
    want = numbers(scan_states(write, "linear", initial, stop_gradient_every=every))
    assert largest(got - want) < 1e-12
    about = {"materialize_grads": True}
    gradients = [torch.autograd.grad(x.sin().sum(), inputs, **about) for x in (got, want)]
    for a, b in zip(*gradients, strict=True):
        assert largest(b) > 1e-2 or every == 1
        assert largest(a - b) < 1e-12


def reach(rule: UpdateRule, every: int | None) -> list[list[bool]]:
    """Return for each segment whether its memory has a gradient to the values of each before."""
    write = draw_write()
    memories, end = scan(write, rule, stop_gradient_every=every)
    assert torch.equal(numbers((memories, end)), numbers(scan(write, rule)))
    felt = []
    for matrix in (*memories.matrix.unbind(1), end.matrix):
        if not matrix.requires_grad:
            felt.append([False] * SEGMENTS)
            continue
        about = {"retain_graph": True, "materialize_grads": True}
        (gradient,) = torch.autograd.grad(matrix.sum(), write.value, **about)
        felt.append((gradient.abs().amax(dim=(0, 2, 3, 4)) > 1e-6).tolist())
    return felt


@every_border
@every_rule
def test_gradients_reach_back_to_the_last_border_that_cuts_them(rule, every):
    step = every or SEGMENTS + 1
    want = [[r // step * step <= w < r for w in range(SEGMENTS)] for r in range(SEGMENTS + 1)]
    assert reach(rule, every) == want


@every_border
def test_gradients_of_slots_reach_back_to_the_same_borders(every):
    feature = draw(BATCH, SEGMENTS, HEADS, TOKENS, KEY).requires_grad_()
    write = Write(feature, torch.ones(BATCH, SEGMENTS, HEADS, TOKENS, 1, dtype=torch.int32))
    initial = with_slots(empty_state(write), SEGMENTS * TOKENS)
    initial = replace(initial, matrix=initial.matrix.requires_grad_())
    memories, end = slot_states(write, initial, every)
    step, inputs = every or SEGMENTS + 1, (feature, initial.matrix)
    about = {"retain_graph": True, "materialize_grads": True, "allow_unused": True}
    for r, matrix in enumerate((*memories.matrix.unbind(1), end.matrix)):
        felt = torch.autograd.grad(matrix.sum(), inputs, **about)
        got = felt[0].abs().amax(dim=(0, 2, 3, 4)) > 0
        assert got.tolist() == [r // step * step <= w < r for w in range(SEGMENTS)]
        assert felt[1].any() == (r < step and r < SEGMENTS)


def read_back(rule: UpdateRule, *values: float, tokens: int = 1) -> float:
    """Write one key once a segment, each time beside unlike keys; return the value it gives."""
    feature = torch.eye(5).repeat(1, len(values), 1, 1, 1)[..., : tokens + 1, :]
    feature[..., :tokens, :] = feature[..., :1, :].clone() * 1.7
    value = torch.tensor(values).view(1, -1, 1, 1, 1).repeat(1, 1, 1, tokens + 1, 1)
    value[..., tokens:, :] = -8.0
    _, end = scan(Write(feature, value), rule)
    return recall(feature[:, 0, :, :1], end).item()


READ_BACK = {  # what a pair gives that was written once, twice, five times, and overwritten
    "linear": (3, 3, 3, 4),
    "delta": (3, 3 / 2, 3 / 2, 5 / 2),  # eq. 9 as printed
    "delta_gamma": (3, 3, 3, 5),
}


@pytest.mark.parametrize(("rule", "want"), READ_BACK.items())
def test_a_pair_written_twice_reads_back_at_one_half_as_printed_and_whole_as_corrected(rule, want):
    written = ([3.0], [3.0] * 2, [3.0] * 5, [3.0, 5.0])
    assert [read_back(rule, *values) for values in written] == pytest.approx(list(want))
    assert read_back(rule, 3.0, tokens=3) == pytest.approx(3)


def test_a_key_that_the_corrected_normalizer_lacks_is_written_whole():
    feature = torch.tensor([[10.0, 0.0], [1.0, 1.0], [0.0, 1.0]]).view(1, 3, 1, 1, 2)
    write = Write(feature, torch.tensor([2.0, 3.0, 5.0]).view(1, 3, 1, 1, 1))
    memories, end = scan(write, "delta_gamma")
    assert memories.normalizer[0, 2, 0].tolist() == [10, 0]
    assert memories.matrix[0, 2, 0].tolist() == [[21], [1]]
    assert end.matrix[0, 0].tolist() == [[21], [1 + 5]]


@pytest.mark.parametrize("divide", [quotient, torch.div])
def test_nothing_over_nothing_is_zero_with_usable_gradients(divide):
    numerator = torch.tensor([[3.0, 5.0], [0.0, 0.0]], requires_grad=True)
    denominator = torch.tensor([[2.0], [0.0]], requires_grad=True)
    found = divide(numerator, denominator)
    found[1].sum().backward()
    assert found[0].tolist() == [1.5, 2.5]
    gradients = (x.grad.isfinite().all() for x in (numerator, denominator))
    assert all([found[1].eq(0).all(), *gradients]) is (divide is quotient)


@every_rule
def test_identical_values_are_recalled_exactly_unless_sums_are_divided_by_other_counts(rule):
    write = draw_write()
    write.value.data[:] = write.value.data[:1, :1, :1, :1].clone()
    written = scan(Write(write.feature[:, :1], write.value[:, :1]), rule)[1]
    query, value = elu1(draw(BATCH, HEADS, 9, KEY)), write.value[0, 0, 0, 0]
    assert largest(recall(query, written) - value) < 1e-12
    averaged = MemoryState(written.matrix / (BATCH * TOKENS), written.normalizer / BATCH)
    assert largest(recall(query, averaged) - value) > 0.1


@pytest.mark.usefixtures("_shapes_unchecked")
@torch.no_grad()
def test_after_ten_thousand_segments_a_state_of_32_bits_still_grows_and_is_overwritten():
    key, value = draw(1, MANY_SEGMENTS, 1, 11, 3), draw(1, MANY_SEGMENTS, 1, 11, 4)
    exact = Write(elu1(key), value)
    query, short = elu1(draw(1, 1, 9, 3)), Write(exact.feature.float(), value.float())
    for rule in ("linear", "delta_gamma"):
        _, want = scan(exact, rule)
        _, full = scan(short, rule)
        _, half = scan(short, rule, state_dtype=torch.bfloat16)
        errors = [end.normalizer / want.normalizer - 1 for end in (full, half)]
        if rule == "delta_gamma":
            errors = [recall(query, x.to(query.dtype)) - recall(query, want) for x in (full, half)]
        assert largest(errors[0]) < 1e-4
        assert largest(errors[1]) > (0.5 if rule == "linear" else 1e-3)


@every_rule
@pytest.mark.parametrize("feature_map", ["elu1", "hedgehog"])
@torch.no_grad()
def test_keys_all_very_negative_are_still_recalled(rule, feature_map):
    maps = FeatureMaps(feature_map, HEADS, HEADS, KEY, FEATURES_PER_CHANNEL[feature_map] * KEY)
    query = torch.full((BATCH, HEADS, 1, KEY), -20.0)
    key = draw(BATCH, 1, HEADS, TOKENS, KEY, dtype=torch.float32) - 20
    value = torch.full((BATCH, 1, HEADS, TOKENS, VALUE), 3.0)
    assert (F.elu(key) + 1).count_nonzero() < key.numel() // 2
    _, state = scan(Write(maps.of_key(key), value), rule)
    assert largest(recall(maps.of_query(query), state) - 3) < 1e-4


@every_rule
def test_gradients_stay_finite_down_to_where_a_memory_counts_as_empty(rule):
    grid = (BATCH, SEGMENTS, HEADS, TOKENS)
    query, key, value = (draw(*grid, n, dtype=torch.float32) for n in (KEY, KEY, VALUE))
    for of_query, of_key in [(n, 0) for n in range(-60, -20)] + [(0, n) for n in (-45, -41, 60)]:
        inputs = [(query + of_query).requires_grad_(), (key + of_key).requires_grad_()]
        memories, _ = scan(Write(elu1(inputs[1]), value), rule)
        numerator, denominator = retrieve(elu1(inputs[0]), memories)
        share = memory_share(denominator, torch.full((HEADS, 1, 1), 5.0))
        out = mix(torch.zeros_like(value), numerator, denominator, share)
        gradients = torch.autograd.grad(out.sum(), inputs)
        assert all(x.isfinite().all() for x in gradients), (of_query, of_key)


GATED = {"update_rule": "gated_delta", "feature_map": "unit"}


def make_memory(**form: object) -> CompressiveMemory:
    memory = CompressiveMemory(SHAPE, infini_params(**form), SHAPE.head_dim).double()
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return memory


def test_half_lives_start_spread_from_the_shortest_to_the_longest():
    memory = CompressiveMemory(SHAPE, infini_params(decay="feature"), SHAPE.head_dim)
    half_lives = math.log(2) / memory.decay_logit.exp()
    assert half_lives.shape == (SHAPE.num_kv_heads, SHAPE.head_dim)
    assert torch.equal(half_lives[:1].expand_as(half_lives), half_lives)
    ends = torch.tensor([SHORTEST_HALF_LIFE, LONGEST_HALF_LIFE])
    torch.testing.assert_close(half_lives[0, [0, -1]], ends, rtol=1e-4, atol=0)
    ratios = half_lives[0, 1:] / half_lives[0, :-1]
    torch.testing.assert_close(ratios, ratios[:1].expand(len(ratios)), rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    "form", [{}, {"decay": "feature"}, {"update_rule": "delta"}, GATED], ids=str
)
@torch.no_grad()
def test_a_state_in_16_bits_is_rounded_at_every_border_and_nowhere_else(form):
    memory, exact = make_memory(state_dtype="bfloat16", **form), make_memory(**form)
    exact.load_state_dict(memory.state_dict())
    feature, value = elu1(draw(*GRID)), draw(*GRID)
    memories, end = memory.states(feature, feature, value, None, None)
    after, state = memories.map(lambda x, y: torch.cat([x[:, 1:], y[:, None]], dim=1), end), None
    for s in range(SEGMENTS):
        own = (x[:, [s]] for x in (feature, feature, value))
        state = exact.states(*own, None, state)[1].to(torch.bfloat16)
        assert torch.equal(after.matrix[:, s], state.matrix.double())
        assert torch.equal(after.normalizer[:, s], state.normalizer.double())
    assert end.matrix.dtype == end.normalizer.dtype == torch.bfloat16
    assert largest(end.matrix - exact.states(feature, feature, value, None, None)[1].matrix) > 1e-4
    recent, last = memory.recent_states(feature, feature, value, None, None)
    assert last.matrix.dtype == torch.bfloat16
    assert torch.equal(recent.matrix.bfloat16().double(), recent.matrix)


@every_rule
@torch.no_grad()
def test_everything_stays_as_it_is_under_autocast(rule, monkeypatch):
    form = without_conflicts({"update_rule": rule, "decay": "feature", "gate": "query"})
    memory = make_memory(**form).float()
    key, value = draw(*GRID).float(), draw(*GRID).float()
    query = draw(BATCH, SEGMENTS, SHAPE.num_heads, TOKENS, SHAPE.head_dim).float()

    def run() -> list[Tensor]:
        memories, end = memory.states(elu1(key), key, value, None, None)
        numerator, denominator, logit = memory.read(query, elu1(query), memories)
        out = mix(query, numerator, denominator, memory_share(denominator, logit))
        return [end.matrix, end.normalizer, logit, out]

    want = run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run()
        monkeypatch.setattr(torch, "autocast", lambda *_, **__: torch.enable_grad())
        unguarded = run()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert largest(unguarded[0] - want[0]) > 1e-3
    assert largest(unguarded[-1] - want[-1]) > 1e-3
