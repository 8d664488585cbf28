"""What a segment carries over, checked by the number of each token and by broken versions."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from infini_retrofit.layer import attention
from infini_retrofit.layer.attention import InfiniAttention
from infini_retrofit.layer.cut import Keys
from infini_retrofit.layer.local_context import LocalContext, carry_context
from tests.reference import draw_hidden, largest, make_layer, run_layer, run_naive

BATCH, SEGMENTS, HEADS, LENGTH, KEY, VALUE = 2, 4, 3, 5, 6, 7
PLACED = 1000.0  # added to a sink for every index at which it is placed
carried_sizes = pytest.mark.parametrize("num_carried", [1, 3, LENGTH])


def numbered(size: int) -> Tensor:
    """Return (B S N L size) of which no two values are equal, none of them zero."""
    shape = (BATCH, SEGMENTS, HEADS, LENGTH, size)
    return torch.arange(1, 1 + torch.Size(shape).numel()).view(shape).double()


def own_keys() -> Keys:
    return Keys(numbered(KEY), -numbered(VALUE), torch.ones(BATCH, SEGMENTS, LENGTH).bool())


def place(x: Tensor, index: int) -> Tensor:
    return x + PLACED * index


def carry(own: Keys, num_carried: int) -> tuple[Keys, LocalContext | None]:
    """Carry with a first key that is no other token's."""
    return carry_context(own, own.key[:, 0, :, :1] - 0.5, place, num_carried, None)


@carried_sizes
def test_a_segment_sees_the_first_token_beside_the_last_of_the_segment_before(num_carried):
    own = own_keys()
    keys, _ = carry(own, num_carried)
    left = LENGTH - num_carried
    assert keys.key.shape == (BATCH, SEGMENTS, HEADS, num_carried + LENGTH, KEY)
    sink_key = own.key[:, :1, :, 0] - 0.5 + PLACED * left
    assert torch.equal(keys.key[:, 1:, :, 0], sink_key.expand(-1, SEGMENTS - 1, -1, -1))
    sink_value = own.value[:, :1, :, 0].expand(-1, SEGMENTS - 1, -1, -1)
    assert torch.equal(keys.value[:, 1:, :, 0], sink_value)
    for got, want in ((keys.key, own.key), (keys.value, own.value)):
        assert torch.equal(got[:, 1:, :, 1:num_carried], want[:, :-1, :, left + 1 :])
        assert torch.equal(got[:, :, :, num_carried:], want)
    assert keys.is_key[:, 1:].all()
    assert keys.is_key[:, 0].tolist() == [[False] * num_carried + [True] * LENGTH] * BATCH


def test_a_document_shorter_than_what_is_carried_carries_nothing_on():
    own = own_keys()
    short = Keys(own.key[:, :1, :, :2], own.value[:, :1, :, :2], own.is_key[:, :1, :2])
    keys, after = carry(short, 3)
    assert after is None
    assert torch.equal(keys.key[:, :, :, 3:], short.key)
    assert not keys.is_key[..., :3].any()


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
    """Put the first token where the first of the last tokens stands already."""
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


BROKEN = [without_sink, sink_where_it_was, sink_one_off, sink_placed_twice, sink_of_the_segment]


@pytest.mark.parametrize("broken", [None, *BROKEN])
@torch.no_grad()
def test_another_sink_is_noticed(broken, monkeypatch):
    form = {"local_context": 3, "memory": "off", "positions": "rope"}
    layer, x = make_layer(form), draw_hidden(1, 3 * LENGTH + 2)
    want = run_naive(layer, form, x)
    assert largest(run_layer(layer, x) - want) < 1e-9
    assert largest(run_layer(layer, x, first=17) - want) < 1e-9
    if broken is not None:
        monkeypatch.setattr(attention, "carry_context", broken)
        # A rotation by position 0 changes nothing, however often.
        assert largest(run_layer(layer, x, first=17) - want) > 0.01


def felt(layer: InfiniAttention) -> list[list[int]]:
    """List for each segment the earlier ones whose tokens its output sends gradients to."""
    x = draw_hidden(1, SEGMENTS * LENGTH).requires_grad_()
    reached = []
    for r, out in enumerate(run_layer(layer, x).split(LENGTH, dim=1)):
        (gradient,) = torch.autograd.grad(out.sum(), x, retain_graph=True)
        sizes = [largest(part) for part in gradient.split(LENGTH, dim=1)]
        reached.append([w for w, size in enumerate(sizes[:r]) if size > 1e-9])
    return reached


@carried_sizes
@pytest.mark.parametrize("bptt_segments", ["all", 1, 2, 3, SEGMENTS])
def test_gradients_cross_with_what_is_carried_where_the_memory_s_do(num_carried, bptt_segments):
    form = {"local_context": num_carried, "memory": "off", "bptt_segments": bptt_segments}
    every = SEGMENTS if bptt_segments == "all" else bptt_segments
    want = [{0} if r < every else set() for r in range(SEGMENTS)]
    for r in range(SEGMENTS):
        want[r] |= {r - 1} if num_carried > 1 and r % every else set()
    assert felt(make_layer(form)) == [sorted(w for w in want[r] if w < r) for r in range(SEGMENTS)]
