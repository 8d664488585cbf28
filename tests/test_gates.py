"""How gates learn, and that whatever is learnable can be learned from the first step."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from infini_retrofit.layer import attention
from infini_retrofit.layer.attention import InfiniAttention
from infini_retrofit.layer.probe import Probe
from infini_retrofit.model.retrofit import alphas, infini_modules
from infini_retrofit.model.running import run_folded
from tests.reference import (
    SEGMENT,
    SHAPE,
    both_families,
    draw_hidden,
    every_form,
    every_model_form,
    infini_params,
    largest,
    make_layer,
    num_without_memory,
    retrofitted,
    run_layer,
    set_share,
)
from tests.tiny import ids_for

ITEMS, START = 7, 0.02


def recall_layer(share: float) -> InfiniAttention:
    """Make a layer of two equal heads that looks up the value stored with a one-hot key."""
    eye, zero = torch.eye(ITEMS), torch.zeros(ITEMS, ITEMS)
    shape = replace(SHAPE, hidden_size=2 * ITEMS, num_heads=2, num_kv_heads=1, head_dim=ITEMS)
    params = infini_params(positions="none", segment_length=ITEMS)
    layer = InfiniAttention(shape, params, layer_index=0)
    set_share(layer, share)
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
    """Train two gates to recall; return the least first gradient, and the least that one rises."""
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
    gradient, rise = train_gates(START, lr=0.04)
    assert gradient > 1e-3
    assert rise > 1


def test_gates_started_at_minus_ten_or_with_the_rate_of_the_body_do_not():
    assert train_gates(torch.tensor(-10.0).sigmoid().item(), lr=0.04, num_steps=1)[0] < 1e-3
    assert train_gates(START, lr=2e-4)[1] < 0.1


def test_gates_start_at_a_share_of_two_percent_in_float32(monkeypatch, initial_memory_share):
    monkeypatch.setattr(attention, "INITIAL_MEMORY_SHARE", initial_memory_share)
    layer = InfiniAttention(SHAPE, infini_params(), layer_index=0)
    assert layer.gate_logit.dtype is torch.float32
    torch.testing.assert_close(layer.gate_logit.sigmoid(), torch.full((SHAPE.num_heads,), START))


def gradients_at_the_start(family: str, form: dict) -> dict[str, Tensor]:
    """Take one step's gradient of a loss that all outputs matter to, by name in layer 1."""
    model = retrofitted(family, **form | {"layers": [1]})
    for alpha in alphas(model):
        alpha.data.fill_(0.7)
    ids = ids_for(model)
    logits = model.get_output_embeddings()(run_folded(model, ids, 5))
    F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    return {n: p.grad for n, p in infini_modules(model)[1].named_parameters()}


@both_families
@every_model_form
def test_every_parameter_feels_the_loss_before_any_training(family, form):
    replacing = form if form.get("local") == "none" else form | {"insertion": "replace"}
    for name, gradient in gradients_at_the_start(family, replacing).items():
        assert gradient.isfinite().all(), name
        assert 1e-8 < largest(gradient) < 1e2, name


@pytest.mark.parametrize("zeroed", [False, True])
def test_a_branch_learns_once_its_factor_moved_unless_a_second_one_starts_at_zero(zeroed):
    model = retrofitted(insertion="parallel", layers=[1])
    layer = infini_modules(model)[1]
    if zeroed:
        layer.o_proj.weight.data[:] = 0
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    ids = ids_for(model)
    for _ in range(2):
        optimizer.zero_grad()
        run_folded(model, ids, 5)[..., 0].sin().sum().backward()
        optimizer.step()
    moved = {n: p.grad.count_nonzero().item() > 0 for n, p in layer.named_parameters()}
    assert not any(moved.values()) if zeroed else all(moved.values())


@every_form
def test_a_layer_notes_what_each_query_makes_of_its_memory_if_it_is_asked(form):
    layer, x = make_layer(form, torch.bfloat16), draw_hidden(2, 5 * SEGMENT, torch.bfloat16)
    asked = Probe(readings={})
    assert torch.equal(run_layer(layer, x, probe=asked), run_layer(layer, x))
    (reading,) = asked.readings.values()
    num_empty = num_without_memory(form)
    for tensor in (reading.share, reading.recalled_norm, reading.local_norm):
        assert tensor.dtype is torch.float32
        assert tensor[:, num_empty:].min() > 0
    assert reading.local_norm.min() > 0
    assert reading.recalled_norm[:, :num_empty].count_nonzero() == 0
    is_empty = reading.share[:, :num_empty].count_nonzero() == 0
    assert is_empty != (form["update_rule"] == "gated_delta")  # there a share of nothing
    assert reading.share.max() < 1
