"""What a segment carries over, checked by the loop over tokens and by broken versions."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from infini_retrofit.layer import attention
from infini_retrofit.layer.cut import Keys
from infini_retrofit.layer.local_context import carry_context
from tests.reference import draw_hidden, largest, make_layer, run_layer, run_naive

SEGMENTS, LENGTH = 4, 5
FORM = {"local_context": 3, "memory": "off", "positions": "rope"}


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


def sink_one_off(own: Keys, first_key: Tensor, place, num_carried: int, *others):
    """Put the first token where the first of the last tokens is already."""
    return carry_context(own, first_key, lambda x, i: place(x, i + 1), num_carried, *others)


def sink_placed_twice(own: Keys, first_key: Tensor, place, num_carried: int, *others):
    """Rotate the first token's key again, which was rotated already."""
    return carry_context(own, own.key[:, 0, :, :1], place, num_carried, *others)


def sink_of_the_segment(own: Keys, first_key: Tensor, place, num_carried: int, *others):
    """Take the first token of the segment before for the document's."""
    keys, after = carry_context(own, first_key, place, num_carried, *others)
    value = keys.value.clone()
    value[:, 1:, :, 0] = own.value[:, :-1, :, 0]
    return replace(keys, value=value), after


@pytest.mark.parametrize(
    "broken",
    [without_sink, sink_where_it_was, sink_one_off, sink_placed_twice, sink_of_the_segment],
)
@torch.no_grad()
def test_another_sink_is_noticed(broken, monkeypatch):
    layer, x = make_layer(FORM), draw_hidden(1, 3 * LENGTH + 2)
    want = run_naive(layer, FORM, x)
    # A rotation by position 0 changes nothing, however often: positions begin at 17.
    assert largest(run_layer(layer, x, first=17) - want) < 1e-9
    monkeypatch.setattr(attention, "carry_context", broken)
    assert largest(run_layer(layer, x, first=17) - want) > 0.01


@pytest.mark.parametrize("num_carried", [1, 3, LENGTH])
@pytest.mark.parametrize("bptt_segments", ["all", 1, 2, 3, SEGMENTS])
def test_gradients_cross_with_what_is_carried_where_the_memory_s_do(num_carried, bptt_segments):
    form = FORM | {"local_context": num_carried, "bptt_segments": bptt_segments}
    x = draw_hidden(1, SEGMENTS * LENGTH).requires_grad_()
    every = SEGMENTS if bptt_segments == "all" else bptt_segments
    for r, out in enumerate(run_layer(make_layer(form), x).split(LENGTH, dim=1)):
        (gradient,) = torch.autograd.grad(out.sum(), x, retain_graph=True)
        sizes = [largest(part) for part in gradient.split(LENGTH, dim=1)]
        want = {0} if r < every else set()  # the sink
        want |= {r - 1} if num_carried > 1 and r % every else set()
        assert {w for w in range(r) if sizes[w] > 1e-9} == {w for w in want if w < r}
