"""A softmax window and linear sums over what it left behind, against a loop over queries."""

import pytest
import torch
from torch import Tensor

from infini_retrofit.layer import local_attention
from infini_retrofit.layer import window_attention as module
from infini_retrofit.layer.feature_maps import elu1
from infini_retrofit.layer.gate import memory_share, mix
from infini_retrofit.layer.local_attention import alibi_slopes, softmax_attention
from infini_retrofit.layer.memory import MemoryState, Write, retrieve, write_segments
from infini_retrofit.layer.naive import naive_feature
from infini_retrofit.layer.window_attention import older_sums, window_attention
from tests.reference import largest

BATCH, KV_HEADS, GROUP, TOKENS, CONTEXT, KEY, VALUE = 2, 2, 3, 5, 4, 7, 3
HEADS = KV_HEADS * GROUP
every_window = pytest.mark.parametrize("window", [1, 2, 4, TOKENS, 99])


@pytest.fixture(params=[2, 128], ids=["blocks of 2", "one block"], autouse=True)
def _block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Part the queries of every test into blocks, the last one smaller, or leave them whole."""
    monkeypatch.setattr(local_attention, "QUERIES_PER_BLOCK", request.param)


def draw_qkv(context: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    sizes = [
        (HEADS, TOKENS, KEY),
        (KV_HEADS, context + TOKENS, KEY),
        (KV_HEADS, context + TOKENS, VALUE),
    ]
    return [torch.randn(BATCH, *s, dtype=torch.float64).to(dtype) for s in sizes]


def some_keys() -> Tensor:
    """Hide the context of the first document, and an own token, which is seen all the same."""
    is_key = torch.ones(BATCH, CONTEXT + TOKENS, dtype=torch.bool)
    is_key[0, :CONTEXT] = False
    is_key[0, CONTEXT + 1] = False
    return is_key


def loop(
    query: Tensor, key: Tensor, value: Tensor, is_key: Tensor | None, window: int, slopes: Tensor
) -> tuple[Tensor, Tensor]:
    context = key.shape[2] - query.shape[2]
    out = torch.zeros(*query.shape[:3], VALUE, dtype=query.dtype)
    log_mass = torch.zeros(*query.shape[:3], 1, dtype=query.dtype)
    for b in range(BATCH):
        for h in range(HEADS):
            for t in range(TOKENS):
                own, n = context + t, h // GROUP
                seen = [c for c in range(context) if is_key is None or is_key[b, c]]
                seen += range(max(context, own - window + 1), own + 1)
                distance = torch.tensor([own - c for c in seen]).double()
                scores = key[b, n, seen] @ query[b, h, t] / KEY**0.5 - slopes[h] * distance
                weight = (scores - scores.max()).exp()
                out[b, h, t] = weight @ value[b, n, seen] / weight.sum()
                log_mass[b, h, t] = weight.sum().log()
    return out, log_mass


@every_window
@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize(("context", "masked"), [(0, False), (CONTEXT, False), (CONTEXT, True)])
def test_the_window_equals_a_loop_in_value_and_gradient(window, alibi, context, masked):
    inputs = [x.requires_grad_() for x in draw_qkv(context)]
    is_key = some_keys() if masked else None
    slopes = alibi_slopes(HEADS).double() if alibi else None
    got = window_attention(*inputs, is_key, window, slopes)
    want = loop(*inputs, is_key, window, torch.zeros(HEADS) if slopes is None else slopes)
    for a, b in zip(got, want, strict=True):
        assert largest(a - b) < 1e-9
    gradients = [
        torch.autograd.grad(out.sin().sum() + mass.cos().sum(), inputs) for out, mass in (got, want)
    ]
    for a, b in zip(*gradients, strict=True):
        assert largest(b) > 1e-3 or (window == 1 and not context)
        assert largest(a - b) < 1e-9


@every_window
def test_the_older_sums_equal_a_loop_in_value_and_gradient(window):
    query, key, value = (x.requires_grad_() for x in draw_qkv())
    got = older_sums(elu1(query), elu1(key), value, window)
    numerator = torch.zeros(BATCH, HEADS, TOKENS, VALUE, dtype=torch.float64)
    denominator = torch.zeros(BATCH, HEADS, TOKENS, 1, dtype=torch.float64)
    for h in range(HEADS):
        for t in range(TOKENS):
            for s in range(t - window + 1):
                n = h // GROUP
                for b in range(BATCH):
                    common = naive_feature(query[b, h, t]) @ naive_feature(key[b, n, s])
                    numerator[b, h, t] += common * value[b, n, s]
                    denominator[b, h, t] += common
    assert largest(got[0] - numerator) < 1e-9
    assert largest(got[1] - denominator) < 1e-9
    if window < TOKENS:
        for x in (query, key, value):
            a, b = (
                torch.autograd.grad(y[0].sin().sum() + y[1].sin().sum(), x, retain_graph=True)[0]
                for y in (got, (numerator, denominator))
            )
            assert largest(a - b) < 1e-9


def test_a_window_that_holds_everything_is_plain_softmax():
    query, key, value = draw_qkv(CONTEXT)
    is_key = some_keys()
    is_key[:, CONTEXT:] = True
    out, _ = window_attention(query, key, value, is_key, TOKENS)
    assert largest(out - softmax_attention(query, key, value, is_key)) < 1e-12
    narrow, _ = window_attention(query, key, value, is_key, TOKENS - 1)
    assert largest(narrow - out) > 0.01
    assert largest((narrow - out)[:, :, :-1]) == 0


@every_window
def test_every_token_before_a_query_is_in_the_window_or_older_and_none_in_both(window):
    """Give all keys the same weight: then every value must count once."""
    value = torch.eye(TOKENS).expand(BATCH, KV_HEADS, -1, -1)
    zeros = torch.zeros(BATCH, HEADS, TOKENS, KEY)
    key = zeros[:, :KV_HEADS]
    out, log_mass = window_attention(zeros, key, value, None, window)
    older, num_older = older_sums(elu1(zeros), elu1(key), value, window)
    counted = out * log_mass.exp() + older / KEY
    want = torch.ones(TOKENS, TOKENS).tril().expand_as(counted)
    torch.testing.assert_close(counted, want)
    torch.testing.assert_close(log_mass.exp() + num_older / KEY, want.sum(-1, keepdim=True))


def shared(
    window: tuple[Tensor, Tensor], sums: tuple[Tensor, Tensor], logit: Tensor
) -> tuple[Tensor, Tensor]:
    """Blend as the layer does; return the output and the share of the sums."""
    out, log_mass = window
    numerator, denominator = sums
    mass = denominator.clamp_min(1e-18).log()
    share = memory_share(denominator, logit + mass - log_mass)
    return mix(out, numerator, denominator, share), share


def test_the_parts_share_one_denominator_as_in_equation_7():
    query, key, value = draw_qkv()
    far_key, far_value = torch.randn(BATCH, KV_HEADS, 9, KEY).double(), torch.randn(9, VALUE)
    far_value = far_value.double().expand(BATCH, KV_HEADS, -1, -1)
    state = write_segments(Write(elu1(far_key), far_value))
    assert isinstance(state, MemoryState)
    older, found = older_sums(elu1(query), elu1(key), value, 2), retrieve(elu1(query), state)
    sums = (older[0] + found[0], older[1] + found[1])
    logit = torch.full((1, 1, 1, 1), -0.7, dtype=torch.float64)
    got, share = shared(window_attention(query, key, value, None, 2), sums, logit)
    for b, h, t in torch.cartesian_prod(*map(torch.arange, (BATCH, HEADS, TOKENS))):
        n, near = h // GROUP, slice(max(0, t - 1), t + 1)
        scores = key[b, n, near] @ query[b, h, t] / KEY**0.5
        weights = (scores - scores.max()).exp()
        far = [*key[b, n, : max(0, t - 1)], *far_key[b, n]]
        linear = torch.stack([naive_feature(query[b, h, t]) @ naive_feature(k) for k in far])
        linear = linear * torch.tensor(-0.7).double().exp()
        values = torch.cat([value[b, n, : max(0, t - 1)], far_value[b, n]])
        total = weights.sum() + linear.sum()
        want = (weights @ value[b, n, near] + linear @ values) / total
        assert largest(got[b, h, t] - want) < 1e-9
        assert largest(share[b, h, t] - linear.sum() / total) < 1e-9


def test_a_window_of_one_token_more_is_noticed():
    query, key, value = draw_qkv()
    want, _ = loop(query, key, value, None, 2, torch.zeros(HEADS))
    assert largest(window_attention(query, key, value, None, 2)[0] - want) < 1e-9
    assert largest(window_attention(query, key, value, None, 3)[0] - want) > 0.01


def test_a_block_that_forgets_what_its_windows_left_is_noticed(monkeypatch):
    query, key, value = draw_qkv()
    features = elu1(query), elu1(key), value
    want = older_sums(*features, 2)[1]
    monkeypatch.setattr(module, "_add", lambda state, added: added)
    difference = largest(older_sums(*features, 2)[1] - want)
    assert (difference > 0.1) is (local_attention.QUERIES_PER_BLOCK < TOKENS)


def test_sums_stay_as_they_are_under_autocast(monkeypatch):
    query, key, value = draw_qkv(dtype=torch.float32)
    features = elu1(query), elu1(key), value
    want = older_sums(*features, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = older_sums(*features, 2)
        monkeypatch.setattr(torch, "autocast", lambda *_, **__: torch.enable_grad())
        unguarded = older_sums(*features, 2)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(unguarded, want, strict=True))


@pytest.mark.parametrize("context", [0, CONTEXT])
def test_no_block_meets_more_keys_than_it_has_queries_and_window(context, monkeypatch):
    num_keys, attend, sums = [], module._attend, module.masked_linear_sums

    def count_near(query: Tensor, key: Tensor, *args: Tensor | None) -> tuple[Tensor, Tensor]:
        num_keys.append((query.shape[2], key.shape[2]))
        return attend(query, key, *args)

    def count_older(query: Tensor, key: Tensor, *args: Tensor) -> tuple[Tensor, Tensor]:
        num_keys.append((query.shape[2], key.shape[2]))
        return sums(query, key, *args)

    monkeypatch.setattr(module, "_attend", count_near)
    monkeypatch.setattr(module, "masked_linear_sums", count_older)
    query, key, value = draw_qkv(context)
    window_attention(query, key, value, None, 2)
    assert all(seen < asking + 2 + context for asking, seen in num_keys)
    own = slice(context, None)
    older_sums(elu1(query), elu1(key[:, :, own]), value[:, :, own], 2)
    assert all(seen < asking + 2 for asking, seen in num_keys[len(num_keys) // 2 :])
    assert sum(asking for asking, _ in num_keys) == 2 * TOKENS


@pytest.mark.parametrize(("repeated", "same"), [("repeat_interleave", True), ("repeat", False)])
def test_grouped_heads_equal_repeated_heads(repeated, same):
    query, key, value = draw_qkv()

    def run(key: Tensor, value: Tensor) -> Tensor:
        out, _ = window_attention(query, key, value, None, 2)
        return out + older_sums(elu1(query), elu1(key), value, 2)[0]

    grouped = run(key, value)
    if repeated == "repeat_interleave":
        key, value = (x.repeat_interleave(GROUP, dim=1) for x in (key, value))
    else:
        key, value = (x.repeat(1, GROUP, 1, 1) for x in (key, value))
    difference = largest(grouped - run(key, value))
    assert difference < 1e-12 if same else difference > 0.1


def test_scores_far_beyond_the_range_of_exponentials_stay_finite():
    query, key, value = draw_qkv(dtype=torch.float32)
    inputs = [(x * scale).requires_grad_() for x, scale in ((query, 1e3), (key, 1e3), (value, 1))]
    out, log_mass = window_attention(*inputs, None, 3)
    gradients = torch.autograd.grad(out.sum() + log_mass.sum(), inputs)
    assert all(x.isfinite().all() for x in (out, log_mass, *gradients))
    assert not (inputs[0] @ inputs[1].repeat_interleave(GROUP, 1).mT).exp().isfinite().all()


def test_bfloat16_is_close_to_float64_and_its_mass_is_float32():
    inputs = draw_qkv(CONTEXT, torch.bfloat16)
    out, log_mass = window_attention(*inputs, some_keys(), 3)
    want, want_mass = window_attention(*(x.double() for x in inputs), some_keys(), 3)
    assert out.dtype is torch.bfloat16
    assert log_mass.dtype is torch.float32
    assert largest(out.double() - want) < 2e-2
    assert largest(log_mass.double() - want_mass) < 2e-2
