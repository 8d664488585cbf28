"""Attention inside a segment against a loop over queries."""

import pytest
import torch
from torch import Tensor

from infini_retrofit.layer import local_attention
from infini_retrofit.layer.feature_maps import FeatureMaps
from infini_retrofit.layer.local_attention import alibi_slopes, linear_attention, softmax_attention
from tests.reference import largest, naive_attend

BATCH, KV_HEADS, GROUP, TOKENS, CONTEXT, KEY, VALUE = 2, 2, 3, 5, 4, 7, 3
HEADS = KV_HEADS * GROUP
FEATURE_MAPS = FeatureMaps("elu1", HEADS, KV_HEADS, KEY, KEY)


def attend_linearly(query: Tensor, key: Tensor, value: Tensor, is_key: Tensor | None = None):
    return linear_attention(query, key, value, is_key, FEATURE_MAPS)


def attend_with_alibi(query: Tensor, key: Tensor, value: Tensor, is_key: Tensor | None = None):
    slopes = alibi_slopes(HEADS).to(query.dtype)
    return softmax_attention(query, key, value, is_key, slopes=slopes)


ATTENTIONS = {"softmax": softmax_attention, "alibi": attend_with_alibi, "linear": attend_linearly}
KINDS = [
    *("softmax", "fused softmax", "softmax in blocks"),
    *("alibi", "fused alibi", "alibi in blocks"),
    "linear",
]


@pytest.fixture(params=KINDS)
def kind(request, monkeypatch) -> str:
    """Name each attention; `fused` sends softmax through the kernel used for long segments."""
    if request.param.startswith("fused"):
        monkeypatch.setattr(local_attention, "LONGEST_EXPLICIT", 0)
    if request.param.endswith("blocks"):
        monkeypatch.setattr(local_attention, "QUERIES_PER_BLOCK", 2)
    return next(name for name in ATTENTIONS if name in request.param)


def draw_qkv(context: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = [
        (HEADS, TOKENS, KEY),
        (KV_HEADS, context + TOKENS, KEY),
        (KV_HEADS, context + TOKENS, VALUE),
    ]
    return [
        torch.randn(BATCH, *s, generator=generator, dtype=torch.float64).to(dtype) for s in sizes
    ]


def loop(query: Tensor, key: Tensor, value: Tensor, kind: str, is_key: Tensor | None) -> Tensor:
    context = key.shape[2] - query.shape[2]
    out = torch.zeros(*query.shape[:3], VALUE, dtype=query.dtype)
    for b in range(BATCH):
        for h in range(HEADS):
            for t in range(TOKENS):
                own = context + t
                seen = [c for c in range(own + 1) if is_key is None or is_key[b, c] or c == own]
                n = h // GROUP
                keys, values = key[b, n, seen], value[b, n, seen]
                slope = alibi_slopes(HEADS)[h].item() if kind == "alibi" else 0.0
                bias = -slope * torch.tensor([own - c for c in seen]).double()
                out[b, h, t] = naive_attend(query[b, h, t], keys, values, kind, bias)
    return out


def some_keys() -> Tensor:
    """Hide the context of the first document and one own token of the second."""
    is_key = torch.ones(BATCH, CONTEXT + TOKENS, dtype=torch.bool)
    is_key[0, :CONTEXT] = False
    is_key[1, CONTEXT + 2] = False
    return is_key


@pytest.mark.parametrize(("context", "masked"), [(0, False), (CONTEXT, False), (CONTEXT, True)])
def test_value_and_gradient_equal_a_loop(kind, context, masked):
    inputs = [x.requires_grad_() for x in draw_qkv(context)]
    is_key = some_keys() if masked else None
    got = ATTENTIONS[kind](*inputs, is_key)
    want = loop(*inputs, kind, is_key)
    assert largest(got - want) < 1e-9
    probe = torch.arange(got.numel()).view_as(got).double().sin()
    gradients = [torch.autograd.grad((x * probe).sum(), inputs) for x in (got, want)]
    for a, b in zip(*gradients, strict=True):
        assert largest(b) > 1e-2
        assert largest(a - b) < 1e-9


def test_a_hidden_key_matters_unless_it_is_hidden(kind):
    query, key, value = draw_qkv(CONTEXT)
    other = key.clone()
    other[0, :, :CONTEXT] += 3
    is_key = some_keys()
    attend = ATTENTIONS[kind]
    assert torch.equal(attend(query, key, value, is_key), attend(query, other, value, is_key))
    assert largest(attend(query, key, value) - attend(query, other, value)) > 0.01


def early_change(attend) -> float:
    """Change each key and value in turn; return how far outputs of earlier queries move."""
    query, key, value = draw_qkv()
    want, early = attend(query, key, value), 0.0
    for changed in range(1, TOKENS):
        other_key, other_value = key.clone(), value.clone()
        other_key[:, :, changed] -= 2
        other_value[:, :, changed] += 5
        moved = attend(query, other_key, other_value) - want
        early = max(early, largest(moved[:, :, :changed]))
        assert largest(moved[:, :, changed]) > 0.01
    return early


def test_no_query_sees_a_later_key(kind, monkeypatch):
    assert early_change(ATTENTIONS[kind]) == 0

    def all_keys(num_queries: int, num_keys: int, device: torch.device) -> Tensor:
        return torch.ones(num_queries, num_keys, dtype=torch.bool)

    monkeypatch.setattr(local_attention, "visible_keys", all_keys)
    monkeypatch.setattr(local_attention, "QUERIES_PER_BLOCK", TOKENS)
    monkeypatch.setattr(local_attention, "LONGEST_EXPLICIT", TOKENS)
    assert early_change(ATTENTIONS[kind]) > 0.01


def test_the_slopes_of_alibi_are_those_of_its_paper():
    assert alibi_slopes(8).tolist() == [2.0**-i for i in range(1, 9)]
    assert alibi_slopes(1).tolist() == [2.0**-8]
    assert alibi_slopes(6).tolist() == pytest.approx([2 ** (-4 * h / 3) for h in range(1, 7)])


def test_a_given_scaling_replaces_that_of_the_head_size():
    query, key, value = draw_qkv()
    scaled = softmax_attention(query * 0.5 * KEY**0.5, key, value)
    assert largest(softmax_attention(query, key, value, scaling=0.5) - scaled) < 1e-12
    assert largest(softmax_attention(query, key, value) - scaled) > 0.01


def test_bfloat16_is_close_to_float64(kind):
    inputs = draw_qkv(CONTEXT, torch.bfloat16)
    got = ATTENTIONS[kind](*inputs, some_keys())
    want = ATTENTIONS[kind](*(x.double() for x in inputs), some_keys())
    assert got.dtype is torch.bfloat16
    assert largest(got.double() - want) < 2e-2
