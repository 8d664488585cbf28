"""What the output of the Infini layer means, in every form: which memory is read, and when."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from infini_retrofit.layer import attention
from infini_retrofit.layer.attention import InfiniAttention
from infini_retrofit.layer.compressive_memory import CompressiveMemory
from infini_retrofit.layer.cut import Keys, rotate
from infini_retrofit.layer.local_context import Line
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
    num_without_memory,
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
    layer, x = make_layer(form), draw_hidden(2, 5 * SEGMENT)
    off, begin = run_layer(layer, x, probe=OFF), num_without_memory(form) * SEGMENT
    moved = run_layer(layer, x) - off
    assert moved[:, :begin].count_nonzero() == 0
    assert largest(moved[:, begin:]) > 0.01
    monkeypatch.setattr(attention, "memory_share", share_as_printed)
    scaled = largest((run_layer(layer, x) - off)[:, :SEGMENT])
    assert scaled == 0 if form["update_rule"] == "gated_delta" else scaled > 0.01


@every_form
@torch.no_grad()
def test_swapped_a_document_reads_the_memory_of_the_one_before(form):
    form = form | {"state_dtype": "float32"}
    layer, x, noted = make_layer(form), draw_hidden(3, 3 * SEGMENT + 1), Probe(memories={})
    own = run_layer(layer, x, probe=noted)
    swapped = {LAYER: noted.memories[LAYER].map(lambda memory: memory[[2, 0, 1]])}
    got = run_layer(layer, x, probe=Probe(swapped=swapped))
    assert largest(got - run_naive(layer, form, x, memory_of=x[[2, 0, 1]])) < 1e-9
    assert largest(got - own) > 0.01


@every_form
@torch.no_grad()
def test_recent_a_segment_reads_what_a_document_of_two_segments_would(form):
    cut = (1 + num_without_memory(form)) * SEGMENT
    layer, x, recent = make_layer(form), draw_hidden(2, cut + SEGMENT), Probe(read="recent")
    own, got = run_layer(layer, x), run_layer(layer, x, probe=recent)
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


# The gates of gated_delta read the keys of all heads.
GROUPED = [f for f in FORMS if f["heads"] == "base" and f["update_rule"] != "gated_delta"]


@pytest.mark.parametrize("form", GROUPED, ids=name_of)
@torch.no_grad()
def test_grouped_heads_equal_repeated_heads_unless_repeated_in_another_order(form):
    layer, x = make_layer(form), draw_hidden(2, 3 * SEGMENT)
    want = run_layer(layer, x)
    assert largest(run_layer(with_repeated_heads(layer, form, True), x) - want) < 1e-12
    assert largest(run_layer(with_repeated_heads(layer, form, False), x) - want) > 0.01


KEYS = Line.keys


def without_sink(line: Line, length: int, num_heads: int, every: int | None) -> Keys:
    """Carry the last tokens before a segment, and nothing else."""
    size = (line.num_carried + length, length)
    key, value = (x.unfold(1, *size).transpose(-1, -2) for x in line.tokens.heads(num_heads))
    return replace(KEYS(line, length, num_heads, every), key=key, value=value)


def sink_where_it_was(line: Line, length: int, num_heads: int, every: int | None) -> Keys:
    """Leave the document's first token at its position."""
    keys, (key, _) = KEYS(line, length, num_heads, every), line.sink.heads(num_heads)
    first = key[:, :, :, None].expand_as(keys.key[..., :1, :])
    return replace(keys, key=torch.cat([first, keys.key[..., 1:, :]], dim=3))


def another_sink(line: Line, *options: int | None) -> Keys:
    """Take the document's second token for its first."""
    second = line.num_carried + 1
    return KEYS(replace(line, sink=line.tokens.columns(second, second + 1)), *options)


@pytest.mark.parametrize("broken", [without_sink, sink_where_it_was, another_sink])
@torch.no_grad()
def test_another_sink_is_noticed(broken, monkeypatch):
    layer, x = make_layer(FORM), draw_hidden(1, 3 * LENGTH + 2)
    want = run_naive(layer, FORM, x)
    # A rotation by position 0 changes nothing, however often: positions begin at 17.
    assert largest(run_layer(layer, x, first=17) - want) < 1e-9
    monkeypatch.setattr(Line, "keys", broken)
    assert largest(run_layer(layer, x, first=17) - want) > 0.01


@pytest.mark.parametrize("num_carried", [1, 3, LENGTH, LENGTH + 3, 2 * LENGTH])
@pytest.mark.parametrize("bptt_segments", ["all", 1, 2, 3, NUM_SEGMENTS])
def test_gradients_cross_with_what_is_carried_where_the_memory_s_do(num_carried, bptt_segments):
    form = FORM | {"local_context": num_carried, "bptt_segments": bptt_segments}
    x = draw_hidden(1, NUM_SEGMENTS * LENGTH).requires_grad_()
    every = NUM_SEGMENTS if bptt_segments == "all" else bptt_segments
    for r, out in enumerate(run_layer(make_layer(form), x).split(LENGTH, dim=1)):
        (gradient,) = torch.autograd.grad(out.sum(), x, retain_graph=True)
        sizes = [largest(part) for part in gradient.split(LENGTH, dim=1)]
        begin = r * LENGTH - num_carried
        seen = {t // LENGTH for t in range(max(begin + 1, 0), r * LENGTH)}
        seen |= {0} if begin >= 0 else set()  # the sink
        want = {w for w in seen if w // every == r // every}
        assert {w for w in range(r) if sizes[w] > 1e-9} == {w for w in want if w < r}
