"""The Infini layer: what it computes, what it reads, and what it hands over."""

import pytest
import torch
from torch import Tensor

from infini_retrofit.layer import attention
from infini_retrofit.layer.attention import InfiniAttention
from infini_retrofit.layer.compressive_memory import CompressiveMemory
from infini_retrofit.layer.cut import rotate
from infini_retrofit.layer.form import AttentionShape
from infini_retrofit.layer.naive import NaiveLayer
from infini_retrofit.layer.state import Carried, Carrier
from tests.reference import infini_params, largest

SEGMENT, WIDTH, ROTATED = 5, 22, 4
SHAPE = AttentionShape(
    hidden_size=WIDTH, num_heads=6, num_kv_heads=2, head_dim=7, qkv_bias=True, o_bias=True
)
FORMS = [
    {"local": "softmax", "positions": "rope"},
    {"local": "softmax", "positions": "none"},
    {"local": "linear", "positions": "rope"},
    {"local": "linear", "positions": "none"},
]


def make_layer(**over: object) -> InfiniAttention:
    torch.manual_seed(1)
    layer = InfiniAttention(SHAPE, infini_params(**over), layer_index=2).double()
    if layer.gate_logit is not None:
        layer.gate_logit.data = torch.linspace(-2, 2, layer.shape.num_heads).double()
    return layer


def draw_input(num_tokens: int, num_rows: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(num_rows, num_tokens, WIDTH, generator=generator, dtype=torch.float64)


def tables(num_tokens: int, first: int = 0) -> tuple[Tensor, Tensor]:
    positions = torch.arange(first, first + num_tokens).double()
    angles = positions[:, None] * torch.tensor([1.0, 0.3], dtype=torch.float64).repeat(2)
    return angles.cos()[None], angles.sin()[None]


def run(layer: InfiniAttention, x: Tensor, carrier: Carrier | None = None, first: int = 0):
    return layer(x, tables(x.shape[1], first), carrier)[0]


def loop(layer: InfiniAttention, x: Tensor, over: dict, memory_of: Tensor | None = None) -> Tensor:
    placed = tuple(t[0] for t in tables(x.shape[1])) if over["positions"] == "rope" else None
    memory_of = [None] * len(x) if memory_of is None else memory_of
    rows = zip(x, memory_of, strict=True)
    naive = NaiveLayer(layer, infini_params(**over))
    return torch.stack([naive(row, placed, of) for row, of in rows])


@pytest.mark.parametrize("local_context", [0, 3])
@pytest.mark.parametrize("over", FORMS, ids=lambda over: "-".join(over.values()))
def test_value_and_gradient_equal_a_loop_whose_last_segment_is_partial(over, local_context):
    over = over | {"local_context": local_context}
    layer = make_layer(**over)
    x = draw_input(13).requires_grad_()
    got, want = run(layer, x), loop(layer, x, over)
    assert largest(got - want) < 1e-9
    inputs = [x, *layer.parameters()]
    probe = torch.arange(got.numel()).view_as(got).double().sin()
    gradients = [torch.autograd.grad((y * probe).sum(), inputs) for y in (got, want)]
    for a, b in zip(*gradients, strict=True):
        assert largest(b) > 1e-3
        assert largest(a - b) < 1e-9


def test_a_single_head_of_the_full_width_equals_the_loop():
    over = {"local": "linear", "positions": "none", "heads": "single", "init": "random_layer"}
    layer = make_layer(**over)
    assert layer.shape == SHAPE.of_heads("single")
    x = draw_input(13)
    assert largest(run(layer, x) - loop(layer, x, over)) < 1e-9


def test_folded_equals_in_layer():
    for over in FORMS:
        layer = make_layer(**over, local_context=2)
        x = draw_input(3 * SEGMENT)
        inside = Carrier()
        want = run(layer, x, inside)
        folded, cut = Carrier(num_segments=3), x.reshape(6, SEGMENT, WIDTH)
        positions = [t.expand(2, -1, -1).reshape(6, SEGMENT, -1) for t in tables(3 * SEGMENT)]
        got = layer(cut, tuple(positions), folded)[0].view_as(want)
        assert largest(got - want) < 1e-12
        assert largest(folded.after[2].memory.matrix - inside.after[2].memory.matrix) < 1e-12
        assert largest(folded.after[2].context.key - inside.after[2].context.key) < 1e-12


@pytest.mark.parametrize("local_context", [0, 3])
def test_two_calls_that_hand_over_equal_one(local_context):
    layer = make_layer(local_context=local_context)
    x, cut = draw_input(4 * SEGMENT), 2 * SEGMENT
    whole = Carrier()
    want = run(layer, x, whole)
    first = Carrier()
    begin = run(layer, x[:, :cut], first)
    second = Carrier(before=first.after)
    got = torch.cat([begin, run(layer, x[:, cut:], second, first=cut)], dim=1)
    assert largest(got - want) < 1e-12
    assert largest(second.after[2].memory.normalizer - whole.after[2].memory.normalizer) < 1e-12
    forgetful = run(layer, x[:, cut:], first=cut)
    assert largest(forgetful - want[:, cut:]) > 0.01
    if local_context:
        without = Carrier(before={2: Carried(memory=first.after[2].memory)})
        assert largest(run(layer, x[:, cut:], without, first=cut) - want[:, cut:]) > 0.01


def test_a_row_may_be_shorter_than_the_local_context():
    layer, plain = make_layer(local_context=4), make_layer()
    assert largest(run(layer, draw_input(3)) - run(plain, draw_input(3))) < 1e-12


SWAPPED = [
    {},
    {"update_rule": "delta_gamma", "gate": "query"},
    {"gate": "query", "decay": "feature"},
    {"local": "window_linear", "window": 2, "written_tokens": 2, "initial_state": "learnable"},
]


@pytest.mark.parametrize("over", SWAPPED)
def test_swapped_reads_the_memory_of_the_document_before(over):
    over = FORMS[0] | over
    layer, x = make_layer(**over), draw_input(13, num_rows=3)
    noted = Carrier(found={})
    run(layer, x, noted)
    strangers = {index: state.roll_batch() for index, state in noted.found.items()}
    got = run(layer, x, Carrier(strangers=strangers))
    assert largest(got - loop(layer, x, over, memory_of=x[[2, 0, 1]])) < 1e-9
    assert largest(got - run(layer, x)) > 0.01
    assert largest((got - run(layer, x))[:, :SEGMENT]) == 0


@pytest.mark.parametrize("over", [*SWAPPED, {"local_context": 2}, {"update_rule": "delta"}])
def test_recent_a_segment_finds_what_a_document_of_two_segments_would(over):
    over = FORMS[0] | over
    layer, x, carrier = make_layer(**over), draw_input(3 * SEGMENT), Carrier(read="recent")
    own, recent = run(layer, x), run(layer, x, carrier)
    assert largest((recent - own)[:, : 2 * SEGMENT]) < 1e-12
    last = run(layer, x[:, SEGMENT:], first=SEGMENT)[:, SEGMENT:]
    if not over.get("local_context"):
        assert largest(recent[:, 2 * SEGMENT :] - last) < 1e-9
    assert largest((recent - own)[:, 2 * SEGMENT :]) > 1e-3
    cut, first = 2 * SEGMENT, Carrier(read="recent")
    run(layer, x[:, :cut], first)
    rest = run(layer, x[:, cut:], Carrier(read="recent", before=first.after), first=cut)
    assert largest(rest - recent[:, cut:]) < 1e-9


def test_memory_off_is_the_local_attention_alone():
    layer, without = make_layer(), make_layer(memory="off")
    missing = without.load_state_dict(layer.state_dict(), strict=False)
    assert missing.unexpected_keys == ["gate_logit"]
    x, carrier = draw_input(13), Carrier(read="off")
    assert torch.equal(run(layer, x, carrier), run(without, x))
    assert carrier.after[2].memory is None
    assert largest(run(layer, x) - run(without, x)) > 0.01


def write_rotated(states, first: int):
    """Write keys after position encoding, as implementations that share one key do."""

    def write(memory, key: Tensor, feature: Tensor, *args: object):
        cos, sin = (t.view(1, 3, 1, SEGMENT, ROTATED) for t in tables(3 * SEGMENT, first))
        return states(memory, key, rotate(feature, cos, sin).abs(), *args)

    return write


RECALLING = [
    {},
    {"update_rule": "delta", "feature_map": "hedgehog"},
    {"decay": "head", "written_tokens": 2, "gate": "query"},
    {"update_rule": "delta_gamma", "recall_norm": "rms", "feature_map": "elu1"},
]


@pytest.mark.parametrize("over", RECALLING)
@pytest.mark.parametrize("rotated", [False, True])
def test_what_is_recalled_moves_with_positions_only_if_rotated_keys_are_written(
    over, rotated, monkeypatch
):
    layer, x, outputs = make_layer(**over), draw_input(3 * SEGMENT), []
    layer.gate_logit.data[:] = 100.0
    states = CompressiveMemory.states
    for first in (0, 17):
        if rotated:
            monkeypatch.setattr(CompressiveMemory, "states", write_rotated(states, first))
        outputs.append(run(layer, x, first=first)[:, SEGMENT:])
    moved = largest(outputs[0] - outputs[1])
    assert moved > 0.01 if rotated else moved == 0


@pytest.mark.parametrize("over", [{"local": "window_linear"}, {"positions": "alibi"}])
def test_shifting_all_positions_changes_nothing_but_rounding(over):
    layer, x = make_layer(**over, local_context=2), draw_input(3 * SEGMENT)
    assert largest(run(layer, x) - run(layer, x, first=17)) < 1e-9


def share_as_printed(denominator: Tensor, logit: Tensor) -> Tensor:
    return torch.sigmoid(logit).expand_as(denominator)


EMPTY = [
    {},
    {"local": "linear"},
    {"local": "window_linear", "window": SEGMENT},
    {"update_rule": "delta", "feature_map": "hedgehog", "gate": "query"},
    {"recall_norm": "rms", "decay": "head", "local_context": 3},
    {"written_tokens": 1, "feature_map": "dpfp", "positions": "alibi"},
]


@pytest.mark.parametrize("over", EMPTY)
@pytest.mark.parametrize("as_printed", [False, True])
def test_the_first_segment_is_scaled_only_by_the_formula_as_printed(over, as_printed, monkeypatch):
    if as_printed:
        monkeypatch.setattr(attention, "memory_share", share_as_printed)
    layer, x = make_layer(**over), draw_input(2 * SEGMENT)
    moved = (run(layer, x) - run(layer, x, Carrier(read="off")))[:, :SEGMENT]
    if as_printed and over.get("local") != "window_linear":
        assert largest(moved) > 0.01
    else:
        # A window that holds the whole segment leaves the linear part nothing to share.
        assert largest(moved) < 1e-12
        assert largest(moved) == 0 or as_printed
    assert largest((run(layer, x) - run(layer, x, Carrier(read="off")))[:, SEGMENT:]) > 0.01


def test_where_nothing_is_recalled_the_output_is_that_of_a_layer_without_memory():
    layer, without = make_layer(), make_layer(memory="off")
    without.load_state_dict(layer.state_dict(), strict=False)
    x = draw_input(2 * SEGMENT)
    moved = run(layer, x) - run(without, x)
    assert moved[:, :SEGMENT].count_nonzero() == 0
    assert largest(moved[:, SEGMENT:]) > 0.01
