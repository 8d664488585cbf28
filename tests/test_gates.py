"""How gates learn, and that whatever is learnable can be learned from the first step."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from infini_retrofit.layer.attention import InfiniAttention
from infini_retrofit.layer.form import AttentionShape
from infini_retrofit.layer.state import Carrier
from infini_retrofit.model.retrofit import infini_modules, insert_infini
from infini_retrofit.model.running import run_folded
from tests.reference import infini_params, largest, without_conflicts
from tests.tiny import FAMILIES, random_ids, tiny_model

SEGMENT, ITEMS = 5, 7
SHAPE = AttentionShape(
    hidden_size=22, num_heads=6, num_kv_heads=2, head_dim=7, qkv_bias=True, o_bias=True
)
EVERYTHING = {
    "feature_map": "hedgehog",
    "recall_norm": "rms",
    "gate": "query",
    "decay": "feature",
    "written_tokens": 3,
    "initial_state": "learnable",
}


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


def gradients_at_the_start(family: str, **over: object) -> dict[str, Tensor]:
    """Take one step's gradient of a loss that all outputs matter to, by name in layer 1."""
    model = tiny_model(family)
    insert_infini(model, infini_params(layers=[1], **over))
    ids = random_ids(model.config.vocab_size, 2, 4 * SEGMENT)
    logits = model.get_output_embeddings()(run_folded(model, ids, SEGMENT))
    F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    return {n: p.grad for n, p in infini_modules(model)[1].named_parameters()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rule", ["linear", "delta", "delta_gamma"])
@pytest.mark.parametrize("local", ["softmax", "linear", "window_linear"])
def test_every_parameter_feels_the_loss_before_any_training(family, rule, local):
    form = without_conflicts(EVERYTHING | {"update_rule": rule, "local": local, "window": 2})
    gradients = gradients_at_the_start(family, **form)
    learned = {name.split(".")[-1] for name in gradients if "proj" not in name}
    want = {"gate_logit", "query_gate", "write_score", "query_weight", "key_weight"}
    want |= {"initial_matrix", "initial_logit"} if form["initial_state"] == "learnable" else set()
    want |= {"recall_gain"} if form["recall_norm"] == "rms" else set()
    assert learned == want | ({"decay_logit"} if form["decay"] == "feature" else set())
    for name, gradient in gradients.items():
        assert gradient.isfinite().all(), name
        assert largest(gradient) > 1e-8, name
        assert largest(gradient) < 1e2, name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_branch_waits_for_its_factor_which_feels_the_loss_at_once(family):
    gradients = gradients_at_the_start(family, insertion="parallel", **EVERYTHING)
    assert largest(gradients.pop("alpha")) > 1e-3
    assert all(gradient.count_nonzero() == 0 for gradient in gradients.values())


@pytest.mark.parametrize("zeroed", [False, True])
def test_a_branch_learns_once_its_factor_moved_unless_a_second_one_starts_at_zero(zeroed):
    model = tiny_model("llama")
    insert_infini(model, infini_params(insertion="parallel", layers=[1]))
    layer = infini_modules(model)[1]
    if zeroed:
        layer.o_proj.weight.data[:] = 0
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    ids = random_ids(67, 2, 3 * SEGMENT)
    for _ in range(2):
        optimizer.zero_grad()
        run_folded(model, ids, SEGMENT)[..., 0].sin().sum().backward()
        optimizer.step()
    moved = {n: p.grad.count_nonzero().item() > 0 for n, p in layer.named_parameters()}
    assert not any(moved.values()) if zeroed else all(moved.values())


READ = [{}, {"gate": "query", "decay": "head"}, {"local": "window_linear", "window": 2}]


@pytest.mark.parametrize("over", READ)
def test_a_layer_notes_what_each_query_makes_of_its_memory_if_it_is_asked(over):
    params = infini_params(positions="none", **over)
    layer, x = (
        InfiniAttention(SHAPE, params, layer_index=4).bfloat16(),
        torch.randn(2, 3 * SEGMENT, 22),
    )
    asked, unasked = Carrier(readings={}), Carrier()
    out = layer(x.bfloat16(), carrier=asked)[0]
    assert torch.equal(layer(x.bfloat16(), carrier=unasked)[0], out)
    assert unasked.readings is None
    (reading,) = asked.readings.values()
    for name in ("share", "recalled_norm", "local_norm"):
        tensor = getattr(reading, name)
        assert tensor.shape == (2, 3, 6, SEGMENT)
        assert tensor.dtype is torch.float32
        assert not tensor.requires_grad
    if over.get("local") != "window_linear":
        assert reading.share[:, 0].count_nonzero() == 0
        assert reading.recalled_norm[:, 0].count_nonzero() == 0
    assert (reading.share[:, 1:] > 0).all()
    assert (reading.share < 1).all()
    assert reading.local_norm.min() > 0
    assert reading.recalled_norm[:, 1:].min() > 0


def test_the_shares_noted_are_those_that_the_gates_give():
    layer = InfiniAttention(SHAPE, infini_params(positions="none"), layer_index=0)
    layer.gate_logit.data = torch.linspace(-2, 2, 6)
    carrier = Carrier(readings={})
    layer(torch.randn(1, 2 * SEGMENT, 22), carrier=carrier)
    want = layer.gate_logit.sigmoid()[:, None].expand(6, SEGMENT)
    torch.testing.assert_close(carrier.readings[0].share[0, 1], want.detach())
    off = Carrier(readings={}, read="off")
    layer(torch.randn(1, 2 * SEGMENT, 22), carrier=off)
    assert off.readings == {}
