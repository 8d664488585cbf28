"""The Infini layer against a loop over tokens, and the doors of its parameters."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from infini_retrofit import attention
from infini_retrofit.attention import AttentionShape, InfiniAttention, rotate
from infini_retrofit.carrier import Carried, Carrier
from infini_retrofit.memory import MemoryState, recall, write_segments
from tests.reference import infini_params, largest, naive_layer

SEGMENT, WIDTH, ROTATED, ITEMS = 5, 22, 4, 7
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
    return torch.stack([naive_layer(layer, row, placed, over["local"], of) for row, of in rows])


@pytest.mark.parametrize("local_context", [0, 3])
@pytest.mark.parametrize("over", FORMS, ids=lambda over: "-".join(over.values()))
def test_value_and_gradient_equal_a_loop_whose_last_segment_is_partial(over, local_context):
    layer = make_layer(**over, local_context=local_context)
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
    assert layer.shape == SHAPE.single_head()
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


def test_swapped_reads_the_memory_of_the_document_before():
    over = FORMS[0]
    layer, x = make_layer(**over), draw_input(13, num_rows=3)
    got = run(layer, x, Carrier(read="swapped"))
    assert largest(got - loop(layer, x, over, memory_of=x[[2, 0, 1]])) < 1e-9
    assert largest(got - run(layer, x)) > 0.01
    assert largest((got - run(layer, x))[:, :SEGMENT]) == 0


def test_memory_off_is_the_local_attention_alone():
    layer, without = make_layer(), make_layer(memory="off")
    missing = without.load_state_dict(layer.state_dict(), strict=False)
    assert missing.unexpected_keys == ["gate_logit"]
    x, carrier = draw_input(13), Carrier(read="off")
    assert torch.equal(run(layer, x, carrier), run(without, x))
    assert carrier.after[2].memory is None
    assert largest(run(layer, x) - run(without, x)) > 0.01


def rotating_write(key: Tensor, value: Tensor, is_token: Tensor | None, first: int) -> MemoryState:
    """Write keys after position encoding, as implementations that share one key do."""
    cos, sin = (t.view(1, 3, 1, SEGMENT, ROTATED) for t in tables(3 * SEGMENT, first))
    return write_segments(rotate(key, cos, sin), value, is_token)


@pytest.mark.parametrize("rotated", [False, True])
def test_what_is_recalled_moves_with_positions_only_if_rotated_keys_are_written(
    rotated, monkeypatch
):
    layer, x, outputs = make_layer(), draw_input(3 * SEGMENT), []
    layer.gate_logit.data[:] = 100.0
    for first in (0, 17):
        if rotated:
            monkeypatch.setattr(attention, "write_segments", partial(rotating_write, first=first))
        outputs.append(run(layer, x, first=first)[:, SEGMENT:])
    moved = largest(outputs[0] - outputs[1])
    assert moved > 0.01 if rotated else moved == 0


def mix_as_printed(local: Tensor, query: Tensor, state: MemoryState, gate_logit: Tensor) -> Tensor:
    share = torch.sigmoid(gate_logit)[:, None, None]
    return (1 - share) * local + share * recall(query, state)


@pytest.mark.parametrize("as_printed", [False, True])
def test_the_first_segment_is_scaled_only_by_the_formula_as_printed(as_printed, monkeypatch):
    if as_printed:
        monkeypatch.setattr(attention, "mix", mix_as_printed)
    layer, without = make_layer(), make_layer(memory="off")
    without.load_state_dict(layer.state_dict(), strict=False)
    x = draw_input(2 * SEGMENT)
    difference = largest((run(layer, x) - run(without, x))[:, :SEGMENT])
    assert difference > 0.01 if as_printed else difference == 0


def recall_layer(share: float) -> InfiniAttention:
    """Make a layer of two equal heads that looks up the value stored with a one-hot key."""
    eye, zero = torch.eye(ITEMS), torch.zeros(ITEMS, ITEMS)
    shape = replace(SHAPE, hidden_size=2 * ITEMS, num_heads=2, num_kv_heads=1, head_dim=ITEMS)
    params = infini_params(positions="none", segment_length=ITEMS, initial_memory_share=share)
    layer = InfiniAttention(shape, params, layer_index=0)
    key_part, value_part = torch.cat([8 * eye, zero], dim=1), torch.cat([zero, eye], dim=1)
    for projection, weight, bias in (
        (layer.q_proj, key_part.repeat(2, 1), -4.0),
        (layer.k_proj, key_part, -4.0),
        (layer.v_proj, value_part, 0.0),
        (layer.o_proj, 3 * torch.cat([torch.cat([eye, eye], dim=1), torch.zeros(ITEMS, 14)]), 0.0),
    ):
        projection.weight.data.copy_(weight)
        projection.bias.data.fill_(bias)
    return layer


def train_gates(share: float, lr: float, num_steps: int = 100) -> tuple[float, float]:
    """Train two gates to recall, in the second segment, the pairs of the first.

    Returns:
        The smallest gradient of a gate at the start, and the least that a gate rises.
    """
    layer, keys = recall_layer(share), torch.eye(ITEMS).expand(3, -1, -1)
    answers = torch.stack([torch.randperm(ITEMS) for _ in keys])
    pairs = torch.cat([keys, torch.eye(ITEMS)[answers]], dim=2)
    x = torch.cat([pairs, torch.cat([keys, torch.zeros_like(keys)], dim=2)], dim=1)
    start, gradients = layer.gate_logit.detach().clone(), []
    optimizer = torch.optim.AdamW([layer.gate_logit], lr=lr, weight_decay=0.0)
    for _ in range(num_steps):
        logits = layer(x)[0][:, ITEMS:, :ITEMS]
        optimizer.zero_grad()
        F.cross_entropy(logits.flatten(0, 1), answers.flatten()).backward()
        gradients.append(layer.gate_logit.grad.abs().min().item())
        optimizer.step()
    return gradients[0], (layer.gate_logit - start).min().item()


def test_gates_feel_the_loss_and_move_at_rate_times_steps_of_four():
    gradient, rise = train_gates(0.02, lr=0.04)
    assert gradient > 1e-3
    assert rise > 1


def test_gates_started_at_minus_ten_or_with_the_rate_of_the_body_do_not():
    assert train_gates(torch.tensor(-10.0).sigmoid().item(), lr=0.04, num_steps=1)[0] < 1e-3
    assert train_gates(0.02, lr=2e-4)[1] < 0.1


@pytest.mark.parametrize("share", [0.02, 0.3])
def test_gates_start_at_the_share_asked_for_and_are_float32(share):
    layer = InfiniAttention(SHAPE, infini_params(initial_memory_share=share), layer_index=0)
    assert layer.gate_logit.dtype is torch.float32
    torch.testing.assert_close(layer.gate_logit.sigmoid(), torch.full((6,), share))


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ({"layers": []}, r"infini\.layers must name at least one layer, got \[\]"),
        ({"segment_length": 2}, r"infini\.segment_length must be at least 3 tokens, .* got 2"),
        ({"local_context": -1}, r"infini\.local_context must be in 0\.\..* tokens, got -1"),
        ({"local_context": 6}, r"infini\.local_context must be in .*=5 tokens, got 6"),
        ({"initial_memory_share": 0.0}, r"infini\.initial_memory_share must .*, got 0\.0"),
        ({"initial_memory_share": 1.0}, r"infini\.initial_memory_share must .*, got 1\.0"),
        ({"initial_memory_share": math.nan}, r"infini\.initial_memory_share must .*, got nan"),
        ({"heads": "single"}, r"infini\.heads must be base .*, got single"),
        ({"heads": "single", "init": "random_layer"}, r"infini\.heads must be base .* got single"),
    ],
)
def test_values_that_no_base_could_make_sense_of_are_refused_by_name(over, message):
    with pytest.raises(ValueError, match=message):
        infini_params(**over)
