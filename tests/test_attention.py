"""What the output of the Infini layer means, in every form: which memory is read, and when."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from infini_retrofit.layer import attention
from infini_retrofit.layer.attention import InfiniAttention
from infini_retrofit.layer.compressive_memory import CompressiveMemory
from infini_retrofit.layer.cut import Keys, rotate
from infini_retrofit.layer.local_context import carry_context
from infini_retrofit.layer.probe import Probe
from infini_retrofit.layer.state import State
from tests.reference import (
    FORMS,
    LAYER,
    SEGMENT,
    SHAPE,
    draw_hidden,
    every_form,
    infini_params,
    largest,
    make_layer,
    name_of,
    rope_tables,
    run_layer,
    run_naive,
)

OFF = Probe(read="off")
# Of the tests of what is carried.
NUM_SEGMENTS, LENGTH = 4, 5
FORM = {"local_context": 3, "memory": "off", "positions": "rope"}


@every_form
@torch.no_grad()
def test_a_memory_that_is_not_read_is_the_layer_without_one(form):
    layer, without = make_layer(form), make_layer(form | {"memory": "off", "gate": "head"})
    missing = without.load_state_dict(layer.state_dict(), strict=False)
    assert "gate_logit" in missing.unexpected_keys
    assert missing.missing_keys == []
    x, state = draw_hidden(2, 3 * SEGMENT), State()
    off = run_layer(layer, x, probe=OFF, state=state)
    assert state.after[LAYER].memory is None
    layer.drop_memory()
    assert torch.equal(off, run_layer(without, x))
    assert torch.equal(off, run_layer(layer, x))


def share_as_printed(denominator: Tensor, logit: Tensor) -> Tensor:
    return torch.sigmoid(logit).expand_as(denominator)


@every_form
@torch.no_grad()
def test_only_the_printed_formula_scales_the_first_segment(form, monkeypatch):
    layer, x = make_layer(form), draw_hidden(2, 3 * SEGMENT)
    off = run_layer(layer, x, probe=OFF)
    moved = run_layer(layer, x) - off
    assert moved[:, :SEGMENT].count_nonzero() == 0
    assert largest(moved[:, SEGMENT:]) > 0.01
    monkeypatch.setattr(attention, "memory_share", share_as_printed)
    assert largest((run_layer(layer, x) - off)[:, :SEGMENT]) > 0.01


@every_form
@torch.no_grad()
def test_swapped_a_document_reads_the_memory_of_the_one_before(form):
    form = form | {"state_dtype": "float32"}
    layer, x, noted = make_layer(form), draw_hidden(3, 2 * SEGMENT + 1), Probe(memories={})
    own = run_layer(layer, x, probe=noted)
    swapped = {LAYER: noted.memories[LAYER].map(lambda memory: memory[[2, 0, 1]])}
    got = run_layer(layer, x, probe=Probe(swapped=swapped))
    assert largest(got - run_naive(layer, form, x, memory_of=x[[2, 0, 1]])) < 1e-9
    assert largest(got - own) > 0.01


@every_form
@torch.no_grad()
def test_recent_a_segment_reads_what_a_document_of_two_segments_would(form):
    layer, x, recent = make_layer(form), draw_hidden(2, 3 * SEGMENT), Probe(read="recent")
    own, got = run_layer(layer, x), run_layer(layer, x, probe=recent)
    cut = 2 * SEGMENT
    assert largest((got - own)[:, :cut]) < 1e-12
    assert largest((got - own)[:, cut:]) > 1e-3
    if not form["local_context"]:
        last = run_layer(layer, x[:, SEGMENT:], SEGMENT)[:, SEGMENT:]
        assert largest(got[:, cut:] - last) < 1e-9
    state = State()
    run_layer(layer, x[:, :cut], state=state, probe=recent)
    rest = run_layer(layer, x[:, cut:], cut, state=state.next(), probe=recent)
    assert largest(rest - got[:, cut:]) < 1e-9


RECALLING = (
    {},
    {"update_rule": "delta", "feature_map": "hedgehog"},
    {"decay": "feature", "gate": "query"},
    {"update_rule": "delta_gamma"},
)


@pytest.mark.parametrize("form", RECALLING, ids=str)
@torch.no_grad()
def test_what_is_recalled_moves_with_positions_only_if_rotated_keys_are_written(form, monkeypatch):
    layer, x = make_layer({"segment_length": SEGMENT} | form), draw_hidden(2, 3 * SEGMENT)
    layer.gate_logit.data[:] = 100.0
    states = CompressiveMemory.states

    def outputs() -> list[Tensor]:
        return [run_layer(layer, x, first)[:, SEGMENT:] for first in (0, 17)]

    def write_rotated(first: int):
        cos, sin = (t.view(1, 3, 1, SEGMENT, 4) for t in rope_tables(3 * SEGMENT, first))
        return lambda memory, feature, *args: states(memory, rotate(feature, cos, sin).abs(), *args)

    assert torch.equal(*outputs())
    moved = []
    for first in (0, 17):
        monkeypatch.setattr(CompressiveMemory, "states", write_rotated(first))
        moved.append(run_layer(layer, x, first)[:, SEGMENT:])
    assert largest(moved[0] - moved[1]) > 0.01


def with_repeated_heads(layer: InfiniAttention, form: dict, in_order: bool) -> InfiniAttention:
    """Give every query head a key/value head of its own, a copy of the one that it shares."""
    num_kv_heads, group = SHAPE.num_kv_heads, SHAPE.num_heads // SHAPE.num_kv_heads
    shape = replace(SHAPE, num_kv_heads=SHAPE.num_heads)
    other = InfiniAttention(shape, infini_params(**form), LAYER).double()
    weights = layer.state_dict()
    for name, want in other.state_dict().items():
        if want.shape != weights[name].shape:
            by_head = weights[name].unflatten(0, (num_kv_heads, -1))
            by_head = (
                by_head.repeat_interleave(group, 0) if in_order else torch.cat([by_head] * group)
            )
            weights[name] = by_head.flatten(0, 1)
    other.load_state_dict(weights)
    return other


@pytest.mark.parametrize("form", [f for f in FORMS if f["heads"] == "base"], ids=name_of)
@torch.no_grad()
def test_grouped_heads_equal_repeated_heads_unless_repeated_in_another_order(form):
    layer, x = make_layer(form), draw_hidden(2, 3 * SEGMENT)
    want = run_layer(layer, x)
    assert largest(run_layer(with_repeated_heads(layer, form, True), x) - want) < 1e-12
    assert largest(run_layer(with_repeated_heads(layer, form, False), x) - want) > 0.01


def without_sink(own: Keys, first_key: Tensor, place, num_carried: int, *others):
    """Carry the last tokens of the segment before, and nothing else."""
    keys, after = carry_context(own, first_key, place, num_carried, *others)
    key, value = keys.key.clone(), keys.value.clone()
    key[:, 1:, :, 0] = own.key[:, :-1, :, -num_carried]
    value[:, 1:, :, 0] = own.value[:, :-1, :, -num_carried]
    return replace(keys, key=key, value=value), after


def sink_where_it_was(own: Keys, first_key: Tensor, place, num_carried: int, *others):
    """Leave the document's first token at the position of the first token."""
    first_key = own.key[:, 0, :, :1]
    return carry_context(own, first_key, lambda x, index: x, num_carried, *others)


def sink_of_the_segment(own: Keys, first_key: Tensor, place, num_carried: int, *others):
    """Take the first token of the segment before for the document's."""
    keys, after = carry_context(own, first_key, place, num_carried, *others)
    value = keys.value.clone()
    value[:, 1:, :, 0] = own.value[:, :-1, :, 0]
    return replace(keys, value=value), after


@pytest.mark.parametrize("broken", [without_sink, sink_where_it_was, sink_of_the_segment])
@torch.no_grad()
def test_another_sink_is_noticed(broken, monkeypatch):
    layer, x = make_layer(FORM), draw_hidden(1, 3 * LENGTH + 2)
    want = run_naive(layer, FORM, x)
    # A rotation by position 0 changes nothing, however often: positions begin at 17.
    assert largest(run_layer(layer, x, first=17) - want) < 1e-9
    monkeypatch.setattr(attention, "carry_context", broken)
    assert largest(run_layer(layer, x, first=17) - want) > 0.01


@pytest.mark.parametrize("num_carried", [1, 3, LENGTH])
@pytest.mark.parametrize("bptt_segments", ["all", 1, 2, 3, NUM_SEGMENTS])
def test_gradients_cross_with_what_is_carried_where_the_memory_s_do(num_carried, bptt_segments):
    form = FORM | {"local_context": num_carried, "bptt_segments": bptt_segments}
    x = draw_hidden(1, NUM_SEGMENTS * LENGTH).requires_grad_()
    every = NUM_SEGMENTS if bptt_segments == "all" else bptt_segments
    for r, out in enumerate(run_layer(make_layer(form), x).split(LENGTH, dim=1)):
        (gradient,) = torch.autograd.grad(out.sum(), x, retain_graph=True)
        sizes = [largest(part) for part in gradient.split(LENGTH, dim=1)]
        want = {0} if r < every else set()  # the sink
        want |= {r - 1} if num_carried > 1 and r % every else set()
        assert {w for w in range(r) if sizes[w] > 1e-9} == {w for w in want if w < r}
