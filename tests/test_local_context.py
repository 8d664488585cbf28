"""What a segment carries over, checked by the number of each token and by broken versions."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from infini_retrofit.layer import attention
from infini_retrofit.layer.attention import InfiniAttention
from infini_retrofit.layer.form import AttentionShape, InfiniParams
from infini_retrofit.layer.local_context import Keys, LocalContext, carry_context
from infini_retrofit.layer.naive import NaiveLayer
from infini_retrofit.layer.state import Carrier
from tests.reference import infini_params, largest

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


def carry(own: Keys, num_carried: int, before: LocalContext | None = None):
    """Carry with a first key that is no other token's."""
    first_key = own.key[:, 0, :, :1] - 0.5
    return carry_context(own, first_key, place, num_carried, before)


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


@carried_sizes
@pytest.mark.parametrize("cut", [1, 2, 3])
def test_two_calls_carry_what_one_does(num_carried, cut):
    own = own_keys()
    whole, end = carry(own, num_carried)
    first, second = (Keys(*(x[:, part] for x, _ in own)) for part in (slice(cut), slice(cut, None)))
    begin, middle = carry(first, num_carried)
    later, later_end = carry(second, num_carried, middle)
    for x, y, want in zip((x for x, _ in begin), (x for x, _ in later), whole, strict=True):
        assert torch.equal(torch.cat([x, y], dim=1), want[0])
    for name in ("key", "value", "is_token", "sink_key"):
        assert torch.equal(getattr(later_end, name), getattr(end, name)), name
    forgetful, _ = carry(second, num_carried)
    assert not torch.equal(forgetful.key, later.key)


def test_a_document_shorter_than_what_is_carried_carries_nothing_on():
    short = Keys(*(x.narrow(axis, 0, 2)[:, :1] for x, axis in own_keys()))
    keys, after = carry(short, 3)
    assert after is None
    assert torch.equal(keys.key[:, :, :, 3:], short.key)
    assert not keys.is_key[..., :3].any()


def params_of(num_carried: int, kind: str, **over: object) -> InfiniParams:
    return infini_params(local_context=num_carried, local=kind, memory="off", window=2, **over)


def infini_layer(num_carried: int, kind: str, **over: object) -> InfiniAttention:
    shape = AttentionShape(
        hidden_size=10, num_heads=2, num_kv_heads=1, head_dim=6, qkv_bias=True, o_bias=True
    )
    return InfiniAttention(shape, params_of(num_carried, kind, **over), layer_index=0).double()


def tables(num_tokens: int, first: int = 0) -> tuple[Tensor, Tensor]:
    positions = torch.arange(first, first + num_tokens).double()
    angles = positions[:, None] * torch.tensor([1.0, 0.3]).repeat(2).double()
    return angles.cos(), angles.sin()


def run(layer: InfiniAttention, x: Tensor, first: int = 0) -> Tensor:
    return layer(x[None], tuple(t[None] for t in tables(len(x), first)))[0][0]


def draw_document() -> Tensor:
    """Draw three segments and a half."""
    return torch.randn(3 * LENGTH + 2, 10, dtype=torch.float64)


def difference_from_the_loop(num_carried: int, kind: str = "softmax") -> float:
    layer, x = infini_layer(num_carried, kind), draw_document()
    naive = NaiveLayer(layer, params_of(num_carried, kind))
    return largest(run(layer, x) - naive(x, tables(len(x))))


@carried_sizes
@pytest.mark.parametrize("kind", ["softmax", "linear", "window_linear"])
def test_a_layer_that_carries_equals_a_loop_over_tokens(num_carried, kind):
    assert difference_from_the_loop(num_carried, kind) < 1e-9


def sink_placed_twice(own: Keys, first_key: Tensor, place, num_carried: int, *others):
    """Turn the first token's key again that was turned already."""
    return carry_context(own, own.key[:, 0, :, :1], place, num_carried, *others)


@pytest.mark.parametrize("broken", [None, sink_placed_twice])
def test_only_distances_between_positions_count(broken, monkeypatch):
    if broken:
        monkeypatch.setattr(attention, "carry_context", broken)
    layer, x = infini_layer(3, "softmax"), draw_document()
    moved = largest(run(layer, x) - run(layer, x, first=17))
    assert moved > 0.01 if broken else moved < 1e-9


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


def sink_of_the_segment(own: Keys, first_key: Tensor, place, num_carried: int, *others):
    """Take the first token of the segment before for the document's."""
    keys, after = carry_context(own, first_key, place, num_carried, *others)
    value = keys.value.clone()
    value[:, 1:, :, 0] = own.value[:, :-1, :, 0]
    return replace(keys, value=value), after


@pytest.mark.parametrize(
    "broken", [without_sink, sink_where_it_was, sink_one_off, sink_of_the_segment]
)
def test_another_sink_is_noticed(broken, monkeypatch):
    monkeypatch.setattr(attention, "carry_context", broken)
    assert difference_from_the_loop(3) > 0.01


def felt(layer: InfiniAttention) -> list[list[int]]:
    """List for each segment the earlier ones whose tokens its output sends gradients to."""
    x = torch.randn(SEGMENTS * LENGTH, 10, dtype=torch.float64, requires_grad=True)
    reached = []
    for r, out in enumerate(run(layer, x).split(LENGTH)):
        (gradient,) = torch.autograd.grad(out.sum(), x, retain_graph=True)
        sizes = [part.abs().max() for part in gradient.split(LENGTH)]
        reached.append([w for w, size in enumerate(sizes[:r]) if size > 1e-9])
    return reached


@carried_sizes
@pytest.mark.parametrize("bptt_segments", ["all", 1, 2, 3, SEGMENTS])
def test_gradients_cross_with_what_is_carried_where_the_memory_s_do(num_carried, bptt_segments):
    layer = infini_layer(num_carried, "softmax", bptt_segments=bptt_segments)
    whole = infini_layer(num_carried, "softmax")
    every = SEGMENTS if bptt_segments == "all" else bptt_segments
    want = [{0} if r < every else set() for r in range(SEGMENTS)]
    for r in range(SEGMENTS):
        want[r] |= {r - 1} if num_carried > 1 and r % every else set()
    assert felt(layer) == [sorted(w for w in want[r] if w < r) for r in range(SEGMENTS)]
    whole.load_state_dict(layer.state_dict())
    x = draw_document()
    assert torch.equal(run(layer, x), run(whole, x))


@pytest.mark.parametrize(("bptt_segments", "is_cut"), [("all", False), (2, True)])
def test_what_another_call_left_is_taken_as_it_is_if_gradients_are_cut(bptt_segments, is_cut):
    layer = infini_layer(3, "softmax", bptt_segments=bptt_segments)
    x = torch.randn(1, LENGTH, 10, dtype=torch.float64, requires_grad=True)
    first, second = Carrier(), draw_document()[None, :LENGTH]
    layer(x, tuple(t[None] for t in tables(LENGTH)), carrier=first)
    placed = tuple(t[None] for t in tables(LENGTH, LENGTH))
    out, _ = layer(second, placed, carrier=Carrier(before=first.after))
    (gradient,) = torch.autograd.grad(out.sum(), x, allow_unused=True, materialize_grads=True)
    assert (largest(gradient) == 0) is is_cut
