"""What is learnable around the memory: decay, chosen tokens, first state, norm and moving gate."""

import math

import pytest
import torch
from torch import Tensor, nn

from infini_retrofit.layer.compressive_memory import INITIAL_STATE_TOKENS, CompressiveMemory
from infini_retrofit.layer.decay import LONGEST_HALF_LIFE, SHORTEST_HALF_LIFE
from infini_retrofit.layer.feature_maps import elu1
from infini_retrofit.layer.form import AttentionShape
from infini_retrofit.layer.memory import MemoryState, Write, scan_states
from tests.reference import infini_params, largest, recall, without_conflicts

BATCH, SEGMENTS, KV_HEADS, GROUP, TOKENS, SIZE, WIDTH = 2, 3, 2, 3, 5, 7, 11
HEADS = KV_HEADS * GROUP
SHAPE = AttentionShape(
    hidden_size=WIDTH,
    num_heads=HEADS,
    num_kv_heads=KV_HEADS,
    head_dim=SIZE,
    qkv_bias=True,
    o_bias=True,
)
EVERYTHING = {
    "decay": "feature",
    "gate": "query",
    "recall_norm": "rms",
    "written_tokens": 3,
    "initial_state": "learnable",
}
every_rule = pytest.mark.parametrize("rule", ["linear", "delta", "delta_gamma"])


def make_memory(**over: object) -> CompressiveMemory:
    """Make a memory none of whose parameters stands at its start."""
    memory = CompressiveMemory(SHAPE, infini_params(**over), SIZE).double()
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return memory


def draw(num_heads: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (BATCH, SEGMENTS, num_heads, TOKENS, SIZE)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def states(memory: CompressiveMemory) -> tuple[MemoryState, MemoryState]:
    key, value = draw(KV_HEADS, 1), draw(KV_HEADS, 2)
    return memory.states(key, elu1(key), value, None, None)


def read(memory: CompressiveMemory, found: MemoryState):
    query = draw(HEADS, 3)
    return memory.read(query, elu1(query), found)


every_decay = pytest.mark.parametrize("decay", ["head", "feature"])


@every_decay
def test_a_token_fades_with_its_distance_to_where_it_is_read(decay):
    memory = make_memory(decay=decay)
    rate = memory.decay_logit.exp()
    assert rate.shape == (KV_HEADS, {"head": 1, "feature": SIZE}[decay])
    found, end = states(memory)
    feature = elu1(draw(KV_HEADS, 1)).transpose(1, 2).flatten(2, 3)
    for border in (1, 2, 3):
        tokens = border * TOKENS
        distance = torch.arange(tokens - 1, -1, -1)[:, None]
        weight = torch.exp(-rate[:, None] * distance)
        want = (feature[:, :, :tokens] * weight).sum(dim=2)
        got = end.normalizer if border == 3 else found.normalizer[:, border]
        assert largest(got - want) < 1e-12


@every_decay
def test_half_lives_start_spread_from_the_shortest_to_the_longest(decay):
    shape = AttentionShape(**vars(SHAPE) | {"num_kv_heads": 5, "num_heads": 5})
    memory = CompressiveMemory(shape, infini_params(decay=decay), SIZE)
    half_lives = math.log(2) / memory.decay_logit.exp()
    spread = half_lives.T if decay == "feature" else half_lives
    assert largest(spread - spread[:, :1]) == 0
    assert spread[0, 0].item() == pytest.approx(SHORTEST_HALF_LIFE, rel=1e-4)
    assert spread[-1, 0].item() == pytest.approx(LONGEST_HALF_LIFE, rel=1e-4)
    ratios = spread[1:, 0] / spread[:-1, 0]
    torch.testing.assert_close(ratios, ratios[:1].expand(len(ratios)), rtol=1e-4, atol=0)


@pytest.mark.parametrize("over", [{}, {"decay": "feature"}, {"update_rule": "delta"}])
def test_a_state_in_16_bits_is_rounded_at_every_border_and_nowhere_else(over):
    memory = make_memory(state_dtype="bfloat16", initial_state="learnable", **over)
    exact = make_memory(initial_state="learnable", **over)
    exact.load_state_dict(memory.state_dict())
    key, value = draw(KV_HEADS, 1), draw(KV_HEADS, 2)
    found, end = memory.states(key, elu1(key), value, None, None)
    begin = exact.states(key, elu1(key), value, None, None)[0]
    state = MemoryState(begin.matrix[:, 0], begin.normalizer[:, 0]).to(torch.bfloat16)
    for s in range(SEGMENTS):
        for name in ("matrix", "normalizer"):
            assert torch.equal(getattr(found, name)[:, s], getattr(state, name).double())
        one = key[:, s : s + 1], elu1(key)[:, s : s + 1], value[:, s : s + 1]
        state = exact.states(*one, None, state)[1].to(torch.bfloat16)
    assert torch.equal(end.matrix, state.matrix)
    assert torch.equal(end.normalizer, state.normalizer)
    assert end.matrix.dtype == end.normalizer.dtype == torch.bfloat16
    assert largest(end.matrix - states(exact)[1].matrix) > 1e-4
    recent, last = memory.recent_states(key, elu1(key), value, None, None)
    assert last.matrix.dtype == torch.bfloat16
    assert torch.equal(recent.matrix.bfloat16().double(), recent.matrix)


@pytest.mark.parametrize("num_written", [1, 2, TOKENS])
def test_only_the_best_tokens_are_written_each_by_its_score(num_written):
    memory = make_memory(written_tokens=num_written)
    found, end = states(memory)
    key, value = draw(KV_HEADS, 1), draw(KV_HEADS, 2)
    for b in range(BATCH):
        for n in range(KV_HEADS):
            normalizer = torch.zeros(SIZE, dtype=torch.float64)
            for s in range(SEGMENTS):
                assert largest(found.normalizer[b, s, n] - normalizer) < 1e-12
                scores = [(k @ memory.write_score[n]).item() / SIZE**0.5 for k in key[b, s, n]]
                for t in sorted(range(TOKENS), key=scores.__getitem__)[-num_written:]:
                    share = 1 / (1 + math.exp(-scores[t]))
                    normalizer = normalizer + share * elu1(key[b, s, n, t])
    unweighted = scan_states(Write(elu1(key), value), "linear")[1]
    assert largest(end.normalizer - unweighted.normalizer) > 0.1


def test_the_first_segment_finds_the_learned_state_and_later_ones_find_it_too():
    memory = make_memory(initial_state="learnable")
    found, _ = states(memory)
    weight = memory.initial_logit.exp()
    assert largest(found.normalizer[:, 0] - weight) < 1e-12
    assert largest(found.matrix[:, 0] - weight[..., None] * memory.initial_matrix) < 1e-12
    plain, _ = states(make_memory())
    added = found.normalizer[:, 1:] - plain.normalizer[:, 1:]
    assert largest(added - weight) < 1e-12


def test_a_learned_state_starts_as_light_as_so_many_tokens_and_only_where_a_document_begins():
    memory = CompressiveMemory(SHAPE, infini_params(initial_state="learnable"), SIZE).double()
    found, end = states(memory)
    want = torch.full_like(found.normalizer[:, 0], INITIAL_STATE_TOKENS)
    assert largest(found.normalizer[:, 0] - want) < 1e-12
    key = draw(KV_HEADS, 1)
    went_on, _ = memory.states(key, elu1(key), key, None, end)
    assert torch.equal(went_on.normalizer[:, 0], end.normalizer)


def test_what_is_recalled_gets_the_size_of_the_gain_however_much_was_written():
    memory = make_memory(recall_norm="rms")
    found, _ = states(memory)
    recalled = read(memory, found)
    size = recalled.numerator.square().mean(dim=-1).sqrt()
    gain = memory.recall_gain.abs()[:, None].expand_as(size[:, 1:])
    assert largest(size[:, 1:] - gain) < 1e-9
    assert recalled.numerator[:, 0].count_nonzero() == 0
    assert torch.equal(recalled.denominator[:, 0], torch.zeros_like(recalled.denominator[:, 0]))
    plain = recall(elu1(draw(HEADS, 3)), found)
    direction = torch.cosine_similarity(plain, recalled.numerator, dim=-1)[:, 1:]
    assert largest(direction * memory.recall_gain.sign()[:, None] - 1) < 1e-9


def test_the_gain_starts_at_the_size_that_values_have():
    memory = CompressiveMemory(SHAPE, infini_params(recall_norm="rms"), SIZE)
    v_proj = nn.Linear(WIDTH, KV_HEADS * SIZE)
    v_proj.weight.data[SIZE:] *= 5
    memory.start_from(v_proj)
    value = (torch.randn(4000, WIDTH) @ v_proj.weight.T).unflatten(-1, (KV_HEADS, SIZE))
    want = value.square().mean(dim=(0, 2)).sqrt().repeat_interleave(GROUP)
    torch.testing.assert_close(memory.recall_gain.detach(), want.detach(), rtol=0.05, atol=0)


def test_a_learned_state_has_a_usable_gradient_where_what_is_recalled_is_normalised():
    memory = CompressiveMemory(
        SHAPE, infini_params(recall_norm="rms", initial_state="learnable"), SIZE
    )
    v_proj, query = nn.Linear(WIDTH, KV_HEADS * SIZE), torch.randn(2, 1, HEADS, TOKENS, SIZE)

    def gradient() -> float:
        key = query[:, :, :KV_HEADS]
        found, _ = memory.states(key, elu1(key), key, None, None)
        memory.read(query, elu1(query), found).numerator.sum().backward()
        size = largest(memory.initial_matrix.grad)
        memory.initial_matrix.grad = None
        return size

    assert gradient() > 1e6
    memory.start_from(v_proj)
    assert 1e-3 < gradient() < 1e3


@every_decay
def test_the_share_moves_with_the_query_and_falls_as_what_it_reads_fades(decay):
    memory = make_memory(gate="query", decay=decay)
    found = states(memory)[0]
    recalled = read(memory, found)
    query, rate = draw(HEADS, 3), memory.decay_logit.exp()
    for h in range(HEADS):
        for t in range(TOKENS):
            feature = elu1(query[:, 1:, h, t])
            left = feature * torch.exp(-rate[h // GROUP] * t)
            held = found.normalizer[:, 1:, h // GROUP]
            moved = query[:, 1:, h, t] @ memory.query_gate[h] / SIZE**0.5
            want = moved + ((left * held).sum(-1) / (feature * held).sum(-1)).log()
            assert largest(recalled.logit[:, 1:, h, t, 0] - want) < 1e-12
            assert largest(recalled.denominator[:, 1:, h, t, 0] - (left * held).sum(-1)) < 1e-12
            if decay == "head":
                assert largest(want - moved + rate[h // GROUP] * t) < 1e-12


@every_rule
def test_everything_stays_as_it_is_under_autocast(rule, monkeypatch):
    memory = make_memory(**without_conflicts({"update_rule": rule} | EVERYTHING)).float()
    key, value, query = (draw(*x).float() for x in ((KV_HEADS, 1), (KV_HEADS, 2), (HEADS, 3)))

    def run() -> list[Tensor]:
        found, end = memory.states(key, elu1(key), value, None, None)
        recalled = memory.read(query, elu1(query), found)
        return [end.matrix, end.normalizer, recalled.numerator, recalled.logit]

    want = run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run()
        monkeypatch.setattr(torch, "autocast", lambda *_, **__: torch.enable_grad())
        unguarded = run()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(unguarded, want, strict=True))


@every_rule
def test_every_parameter_has_a_gradient_at_its_start(rule):
    params = infini_params(**without_conflicts({"update_rule": rule} | EVERYTHING))
    memory = CompressiveMemory(SHAPE, params, SIZE).double()
    memory.start_from(nn.Linear(WIDTH, KV_HEADS * SIZE))
    recalled = read(memory, states(memory)[0])
    (recalled.numerator * recalled.logit.sigmoid()).sin().sum().backward()
    for name, parameter in memory.named_parameters():
        assert largest(parameter.grad) > 1e-4, name


@pytest.mark.parametrize("cut", [False, True])
def test_what_another_call_left_is_taken_as_it_is_if_gradients_are_cut(cut):
    memory = make_memory(bptt_segments=2 if cut else "all")
    key = draw(KV_HEADS, 1)
    before = MemoryState(
        torch.zeros(BATCH, KV_HEADS, SIZE, SIZE, dtype=torch.float64, requires_grad=True),
        torch.zeros(BATCH, KV_HEADS, SIZE, dtype=torch.float64),
    )
    found, _ = memory.states(key, elu1(key), key.requires_grad_(), None, before)
    (gradient,) = torch.autograd.grad(
        found.matrix.sum(), before.matrix, allow_unused=True, materialize_grads=True
    )
    assert (largest(gradient) > 0) is not cut
