"""How a memory is updated from segment to segment: each rule, at once and one after another."""

import pytest
import torch
from torch import Tensor

from infini_retrofit.layer import memory
from infini_retrofit.layer.feature_maps import elu1
from infini_retrofit.layer.memory import (
    MemoryState,
    UpdateRule,
    Write,
    prefix_states,
    scan_states,
    write_segments,
)
from tests.reference import largest, recall

BATCH, SEGMENTS, HEADS, TOKENS, KEY, VALUE = 2, 5, 3, 4, 7, 6
every_rule = pytest.mark.parametrize("rule", ["linear", "delta", "delta_gamma"])
every_length = pytest.mark.parametrize("bptt_segments", [None, 1, 2, 3, SEGMENTS, 99])


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def draw_write(weighted: bool = False) -> Write:
    grid = (BATCH, SEGMENTS, HEADS, TOKENS)
    weight = torch.rand(*grid, 1, dtype=torch.float64).requires_grad_() if weighted else None
    return Write(
        elu1(draw(*grid, KEY)).requires_grad_(), draw(*grid, VALUE).requires_grad_(), weight
    )


def draw_initial() -> MemoryState:
    normalizer = torch.rand(BATCH, HEADS, KEY, dtype=torch.float64)
    return MemoryState(draw(BATCH, HEADS, KEY, VALUE).requires_grad_(), normalizer.requires_grad_())


def numbers(states: tuple[MemoryState, MemoryState]) -> Tensor:
    return torch.cat([x.flatten() for state in states for x in (state.matrix, state.normalizer)])


@every_length
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("starts", [False, True])
def test_all_segments_at_once_equal_one_after_another_for_the_linear_rule(
    weighted, starts, bptt_segments
):
    write, initial = draw_write(weighted), draw_initial() if starts else None
    inputs = [write.feature, write.value, *([write.weight] if weighted else [])]
    inputs += [initial.matrix, initial.normalizer] if starts else []
    got = numbers(prefix_states(write_segments(write), initial, bptt_segments))
    want = numbers(scan_states(write, "linear", initial, bptt_segments=bptt_segments))
    assert largest(got - want) < 1e-12
    if not want.requires_grad:
        assert bptt_segments == 1
        assert not starts
        return
    gradients = [
        torch.autograd.grad(x.sin().sum(), inputs, materialize_grads=True) for x in (got, want)
    ]
    for a, b in zip(*gradients, strict=True):
        assert largest(b) > 1e-2 or bptt_segments == 1
        assert largest(a - b) < 1e-12


@every_rule
def test_two_halves_equal_the_whole(rule: UpdateRule):
    write, initial = draw_write(weighted=True), draw_initial()
    found, end = scan_states(write, rule, initial)
    parts = [
        Write(*(x[:, part] for x in (write.feature, write.value, write.weight)))
        for part in (slice(2), slice(2, None))
    ]
    middle = scan_states(parts[0], rule, initial)[1]
    found_later, end_later = scan_states(parts[1], rule, middle)
    assert largest(found_later.matrix - found.matrix[:, 2:]) < 1e-12
    assert largest(end_later.normalizer - end.normalizer) < 1e-12
    forgotten, _ = scan_states(parts[1], rule)
    assert largest(forgotten.matrix - found.matrix[:, 2:]) > 0.1


def read_back(rule: UpdateRule, *values: float, tokens: int = 1) -> float:
    """Write one key once a segment, each time beside unlike keys; return the value it gives."""
    feature = torch.eye(5).repeat(1, len(values), 1, 1, 1)[..., : tokens + 1, :]
    feature[..., :tokens, :] = feature[..., :1, :].clone() * 1.7
    value = torch.tensor(values).view(1, -1, 1, 1, 1).repeat(1, 1, 1, tokens + 1, 1)
    value[..., tokens:, :] = -8.0
    _, end = scan_states(Write(feature, value), rule)
    return recall(feature[:, 0, :, :1], end).item()


@every_rule
def test_a_pair_written_once_reads_back_whole(rule: UpdateRule):
    assert read_back(rule, 3.0) == pytest.approx(3)
    assert read_back(rule, 3.0, tokens=3) == pytest.approx(3)


def test_a_pair_written_twice_reads_back_at_one_half_as_printed_and_whole_as_corrected():
    assert read_back("delta", 3.0, 3.0) == pytest.approx(3 / 2)
    assert read_back("delta", *[3.0] * 5) == pytest.approx(3 / 2)
    assert read_back("delta_gamma", 3.0, 3.0) == pytest.approx(3)
    assert read_back("delta_gamma", *[3.0] * 5) == pytest.approx(3)
    assert read_back("linear", 3.0, 3.0) == pytest.approx(3)


def test_a_new_value_replaces_the_old_one_where_linear_keeps_the_mean():
    assert read_back("delta_gamma", 3.0, 5.0) == pytest.approx(5)
    assert read_back("delta", 3.0, 5.0) == pytest.approx(5 / 2)
    assert read_back("linear", 3.0, 5.0) == pytest.approx(4)


def test_a_normalizer_that_grows_by_known_keys_is_noticed(monkeypatch):
    printed = memory._update
    monkeypatch.setattr(memory, "_update", lambda s, w, rule, kept: printed(s, w, "delta", kept))
    assert read_back("delta_gamma", 3.0, 3.0) == pytest.approx(3 / 2)


@every_rule
@pytest.mark.parametrize("num_rates", [1, KEY])
def test_what_is_kept_fades_before_the_segment_is_added(rule: UpdateRule, num_rates):
    write = draw_write()
    retention = torch.rand(BATCH, SEGMENTS, HEADS, num_rates, dtype=torch.float64)
    found, end = scan_states(write, rule, draw_initial(), retention)
    for index in range(SEGMENTS - 1):
        state = MemoryState(found.matrix[:, index], found.normalizer[:, index])
        kept, after = (
            scan_states(Write(write.feature[:, [index]], write.value[:, [index]]), rule, state, r)
            for r in (None, retention[:, [index]])
        )
        lost = (1 - retention[:, index]) * state.normalizer
        assert largest(kept[1].normalizer - lost - found.normalizer[:, index + 1]) < 1e-12
        assert largest(after[1].matrix - found.matrix[:, index + 1]) < 1e-12
    assert largest(scan_states(write, rule, draw_initial())[1].matrix - end.matrix) > 0.1


def reach(rule: UpdateRule, bptt_segments: int | None, at_once: bool) -> list[list[bool]]:
    """Tell for each segment whether what it finds is felt by the values of each one before."""
    write = draw_write()
    if at_once:
        found, end = prefix_states(write_segments(write), bptt_segments=bptt_segments)
    else:
        found, end = scan_states(write, rule, bptt_segments=bptt_segments)
    felt = []
    for matrix in (*found.matrix.unbind(1), end.matrix):
        if not matrix.requires_grad:
            felt.append([False] * SEGMENTS)
            continue
        (gradient,) = torch.autograd.grad(
            matrix.sum(), write.value, retain_graph=True, materialize_grads=True
        )
        felt.append((gradient.abs().amax(dim=(0, 2, 3, 4)) > 1e-6).tolist())
    return felt


@every_length
@pytest.mark.parametrize(
    ("rule", "at_once"), [("linear", True), ("linear", False), ("delta", False)]
)
def test_gradients_reach_back_to_the_last_border_that_cuts_them(rule, at_once, bptt_segments):
    every = bptt_segments or SEGMENTS + 1
    want = [[r // every * every <= w < r for w in range(SEGMENTS)] for r in range(SEGMENTS + 1)]
    assert reach(rule, bptt_segments, at_once) == want


@every_rule
@every_length
def test_cutting_gradients_leaves_values_as_they_are(rule: UpdateRule, bptt_segments):
    write, initial = draw_write(), draw_initial()
    got = numbers(scan_states(write, rule, initial, bptt_segments=bptt_segments))
    assert torch.equal(got, numbers(scan_states(write, rule, initial)))


@pytest.mark.parametrize("at_once", [True, False])
def test_what_a_document_starts_with_is_learned_even_where_every_border_cuts(at_once):
    write, initial = draw_write(), draw_initial()
    if at_once:
        found, _ = prefix_states(write_segments(write), initial, 1)
    else:
        found, _ = scan_states(write, "delta", initial, bptt_segments=1)
    (gradient,) = torch.autograd.grad(found.matrix.sum(), initial.matrix)
    assert largest(gradient - 1) < 1e-12
