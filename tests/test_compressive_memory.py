"""What a layer keeps around the equations of the memory: rates, number types, autocast."""

import math

import pytest
import torch
from torch import Tensor

from infini_retrofit.layer.compressive_memory import (
    LONGEST_HALF_LIFE,
    SHORTEST_HALF_LIFE,
    CompressiveMemory,
)
from infini_retrofit.layer.feature_maps import elu1
from infini_retrofit.layer.memory import memory_share, mix
from tests.reference import SHAPE, infini_params, largest, without_conflicts

BATCH, SEGMENTS, TOKENS, SIZE = 2, 3, 5, SHAPE.head_dim
every_rule = pytest.mark.parametrize("rule", ["linear", "delta", "delta_gamma"])


def make_memory(**form: object) -> CompressiveMemory:
    memory = CompressiveMemory(SHAPE, infini_params(**form), SIZE).double()
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return memory


def draw(num_heads: int) -> Tensor:
    return torch.randn(BATCH, SEGMENTS, num_heads, TOKENS, SIZE, dtype=torch.float64)


def test_half_lives_start_spread_from_the_shortest_to_the_longest():
    memory = CompressiveMemory(SHAPE, infini_params(decay="feature"), SIZE)
    half_lives = math.log(2) / memory.decay_logit.exp()
    assert half_lives.shape == (SHAPE.num_kv_heads, SIZE)
    assert torch.equal(half_lives[:1].expand_as(half_lives), half_lives)
    ends = torch.tensor([SHORTEST_HALF_LIFE, LONGEST_HALF_LIFE])
    torch.testing.assert_close(half_lives[0, [0, -1]], ends, rtol=1e-4, atol=0)
    ratios = half_lives[0, 1:] / half_lives[0, :-1]
    torch.testing.assert_close(ratios, ratios[:1].expand(len(ratios)), rtol=1e-4, atol=0)


@pytest.mark.parametrize("form", [{}, {"decay": "feature"}, {"update_rule": "delta"}], ids=str)
@torch.no_grad()
def test_a_state_in_16_bits_is_rounded_at_every_border_and_nowhere_else(form):
    memory, exact = make_memory(state_dtype="bfloat16", **form), make_memory(**form)
    exact.load_state_dict(memory.state_dict())
    feature, value = elu1(draw(SHAPE.num_kv_heads)), draw(SHAPE.num_kv_heads)
    memories, end = memory.states(feature, value, None, None)
    after, state = memories.map(lambda x, y: torch.cat([x[:, 1:], y[:, None]], dim=1), end), None
    for s in range(SEGMENTS):
        state = exact.states(feature[:, [s]], value[:, [s]], None, state)[1].to(torch.bfloat16)
        assert torch.equal(after.matrix[:, s], state.matrix.double())
        assert torch.equal(after.normalizer[:, s], state.normalizer.double())
    assert end.matrix.dtype == end.normalizer.dtype == torch.bfloat16
    assert largest(end.matrix - exact.states(feature, value, None, None)[1].matrix) > 1e-4
    recent, last = memory.recent_states(feature, value, None, None)
    assert last.matrix.dtype == torch.bfloat16
    assert torch.equal(recent.matrix.bfloat16().double(), recent.matrix)


@every_rule
@torch.no_grad()
def test_everything_stays_as_it_is_under_autocast(rule, monkeypatch):
    form = without_conflicts({"update_rule": rule, "decay": "feature", "gate": "query"})
    memory = make_memory(**form).float()
    key, value = draw(SHAPE.num_kv_heads).float(), draw(SHAPE.num_kv_heads).float()
    query = draw(SHAPE.num_heads).float()

    def run() -> list[Tensor]:
        memories, end = memory.states(elu1(key), value, None, None)
        numerator, denominator, logit = memory.read(query, elu1(query), memories)
        out = mix(query, numerator, denominator, memory_share(denominator, logit))
        return [end.matrix, end.normalizer, logit, out]

    want = run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run()
        monkeypatch.setattr(torch, "autocast", lambda *_, **__: torch.enable_grad())
        unguarded = run()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert largest(unguarded[0] - want[0]) > 1e-3
    assert largest(unguarded[-1] - want[-1]) > 1e-3
