"""Padding is neither attended to nor written, and no time passes while it lasts."""

import pytest
import torch
from torch import Tensor

from infini_retrofit.layer import compressive_memory
from infini_retrofit.layer.attention import InfiniAttention
from infini_retrofit.layer.form import AttentionShape
from infini_retrofit.layer.memory import MemoryState
from infini_retrofit.layer.state import Carrier
from tests.reference import infini_params, largest

SEGMENT, TOKENS, WIDTH, LAYER = 5, 15, 26, 1
SHAPE = AttentionShape(
    hidden_size=WIDTH, num_heads=4, num_kv_heads=2, head_dim=7, qkv_bias=True, o_bias=True
)
FORMS = {
    "published": {"local_context": 3},
    "decay": {"decay": "head"},
    "chosen tokens": {"written_tokens": 2, "decay": "head", "gate": "query"},
    "delta": {"update_rule": "delta", "feature_map": "hedgehog", "initial_state": "learnable"},
    "delta_gamma": {"update_rule": "delta_gamma", "feature_map": "dpfp", "recall_norm": "rms"},
    "fading features": {"decay": "feature", "written_tokens": 3},
    "alibi": {"positions": "alibi", "local_context": 2},
    "linear": {"local": "linear", "update_rule": "delta_gamma"},
    "window": {"local": "window_linear", "window": 2, "local_context": 2},
    "16 bits": {"state_dtype": "bfloat16", "decay": "feature"},
}
every_form = pytest.mark.parametrize("form", FORMS)


def make_layer(form: str) -> InfiniAttention:
    params = infini_params(**{"positions": "none"} | FORMS[form])
    layer = InfiniAttention(SHAPE, params, LAYER).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return layer


def draw_input() -> Tensor:
    return torch.randn(2, TOKENS, WIDTH, dtype=torch.float64)


def far_apart(state: MemoryState, other: MemoryState) -> float:
    """Compare the memory of a batch's last row with that of a single row."""
    parts = [state.matrix[-1] - other.matrix[0], state.normalizer[-1] - other.normalizer[0]]
    return max(map(largest, parts))


def run_padded(layer: InfiniAttention, num_tokens: int, side: str) -> tuple[float, float, float]:
    """Pad the second of two rows; compare it with the row alone.

    Returns:
        How far its output is, how far its memory, and how far a layer's that is not told.
    """
    x, num_padding = draw_input(), TOKENS - num_tokens
    row, padding = x[1, :num_tokens], torch.full((num_padding, WIDTH), 7.0, dtype=torch.float64)
    batch = torch.stack([x[0], torch.cat([padding, row] if side == "left" else [row, padding])])
    real = slice(num_padding, None) if side == "left" else slice(0, num_tokens)
    is_token = torch.zeros(2, TOKENS, dtype=torch.bool)
    is_token[0], is_token[1, real] = True, True
    told, untold, alone = Carrier(is_token=is_token), Carrier(), Carrier()
    out, want = layer(batch, carrier=told)[0][1, real], layer(row[None], carrier=alone)[0][0]
    layer(batch, carrier=untold)
    memories = [c.after[LAYER].memory for c in (told, untold, alone)]
    return (
        largest(out - want),
        far_apart(memories[0], memories[2]),
        far_apart(memories[1], memories[2]),
    )


@every_form
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("num_tokens", [13, 10, 9, 5, 4])
def test_a_padded_batch_equals_unpadded_rows_memory_included(form, side, num_tokens):
    output, memory, untold = run_padded(make_layer(form), num_tokens, side)
    assert output < 1e-9
    assert memory < 1e-9
    assert untold > 1e-3


@every_form
def test_a_folded_document_that_ends_in_padding_equals_the_document_alone(form):
    layer, x = make_layer(form), draw_input()
    for num_tokens in (5, 8, 12):
        is_token = torch.ones(2, TOKENS, dtype=torch.bool)
        is_token[1, num_tokens:] = False
        told = Carrier(num_segments=3, is_token=is_token.view(6, SEGMENT))
        untold, alone = Carrier(num_segments=3), Carrier()
        out = layer(x.view(6, SEGMENT, -1), carrier=told)[0].view_as(x)
        layer(x.view(6, SEGMENT, -1), carrier=untold)
        want = layer(x[1:, :num_tokens], carrier=alone)[0]
        assert largest(out[1, :num_tokens] - want[0]) < 1e-9
        memories = [c.after[LAYER].memory for c in (told, untold, alone)]
        assert far_apart(memories[0], memories[2]) < 1e-9
        assert far_apart(memories[1], memories[2]) > 1e-3


@pytest.mark.parametrize("form", ["published", "fading features"])
def test_a_document_goes_on_where_its_padding_began(form):
    layer, x = make_layer(form), draw_input()
    is_token = torch.ones(2, TOKENS, dtype=torch.bool)
    is_token[1, 2 * SEGMENT :] = False
    first, alone = Carrier(is_token=is_token), Carrier()
    layer(x, carrier=first)
    layer(x[1:, : 2 * SEGMENT], carrier=alone)
    memory = first.after[LAYER].memory
    more = torch.randn(1, SEGMENT, WIDTH, dtype=torch.float64)
    alone.after[LAYER] = type(alone.after[LAYER])(alone.after[LAYER].memory)
    row = type(alone.after[LAYER])(MemoryState(memory.matrix[1:], memory.normalizer[1:]))
    got = layer(more, carrier=Carrier(before={LAYER: row}))[0]
    want = layer(more, carrier=Carrier(before=alone.after))[0]
    assert largest(got - want) < 1e-9


def test_padding_that_counts_as_time_is_noticed(monkeypatch):
    monkeypatch.setattr(
        compressive_memory,
        "_count_tokens",
        lambda key, is_token: torch.full(key.shape[:2], key.shape[3]),
    )
    assert run_padded(make_layer("decay"), 5, "right")[1] > 1e-3


def test_padding_that_may_be_chosen_is_noticed(monkeypatch):
    weigh = compressive_memory.CompressiveMemory._weight
    monkeypatch.setattr(
        compressive_memory.CompressiveMemory,
        "_weight",
        lambda memory, key, is_token: weigh(memory, key, None),
    )
    output, memory, _ = run_padded(make_layer("chosen tokens"), 9, "right")
    assert memory > 1e-3
    assert output < 1e-9


def test_a_memory_that_forgets_at_once_is_not_spoilt_by_long_padding():
    layer, x = make_layer("decay"), draw_input().requires_grad_()
    layer.memory.decay_logit.data[:] = 7.0
    is_token = torch.ones(2, TOKENS, dtype=torch.bool)
    is_token[:, SEGMENT + 1 :] = False
    out = layer(x, carrier=Carrier(is_token=is_token))[0]
    gradients = torch.autograd.grad(out.sum(), [x, layer.memory.decay_logit])
    assert all(g.isfinite().all() for g in (out, *gradients))
