"""Attention inside a segment: what hidden keys, slopes, scales and 16 bits do.

Its values and gradients are compared with the loop over tokens in test_forms.
"""

import pytest
import torch
from torch import Tensor

from infini_retrofit.layer import local_attention
from infini_retrofit.layer.feature_maps import FeatureMaps
from infini_retrofit.layer.local_attention import alibi_slopes, linear_attention, softmax_attention
from tests.reference import largest

BATCH, KV_HEADS, HEADS, TOKENS, CONTEXT, KEY, VALUE = 2, 2, 6, 5, 4, 7, 3
FEATURE_MAPS = FeatureMaps("elu1", HEADS, KV_HEADS, KEY, KEY)
SLOPES = alibi_slopes(HEADS)
# Softmax by products, in blocks of queries, and by the kernel used for long segments.
KINDS = {"products": {}, "blocks": {"QUERIES_PER_BLOCK": 2}, "fused": {"LONGEST_EXPLICIT": 0}}


def attend_linearly(query: Tensor, key: Tensor, value: Tensor, is_key: Tensor | None = None):
    return linear_attention(query, key, value, is_key, FEATURE_MAPS)


def attend_with_alibi(query: Tensor, key: Tensor, value: Tensor, is_key: Tensor | None = None):
    return softmax_attention(query, key, value, is_key, slopes=SLOPES.to(query.dtype))


@pytest.fixture(params=[*KINDS, *(f"alibi {kind}" for kind in KINDS), "linear"])
def attend(request, monkeypatch):
    for name, value in KINDS.get(request.param.split()[-1], {}).items():
        monkeypatch.setattr(local_attention, name, value)
    attentions = {"linear": attend_linearly, "alibi": attend_with_alibi}
    return attentions.get(request.param.split()[0], softmax_attention)


def draw_qkv(context: int = 0) -> list[Tensor]:
    shapes = (
        (HEADS, TOKENS, KEY),
        (KV_HEADS, context + TOKENS, KEY),
        (KV_HEADS, context + TOKENS, VALUE),
    )
    return [torch.randn(BATCH, *shape, dtype=torch.float64) for shape in shapes]


def some_keys() -> Tensor:
    """Hide the context of the first document and one own token of the second."""
    is_key = torch.ones(BATCH, CONTEXT + TOKENS, dtype=torch.bool)
    is_key[0, :CONTEXT] = False
    is_key[1, CONTEXT + 2] = False
    return is_key


def test_a_hidden_key_matters_unless_it_is_hidden_and_to_its_own_query(attend):
    query, key, value = draw_qkv(CONTEXT)
    is_key, other = some_keys(), key.clone()
    other[0, :, :CONTEXT] += 3
    other[1, :, CONTEXT + 2] += 3
    moved = attend(query, key, value, is_key) - attend(query, other, value, is_key)
    assert largest(moved[1, :, 2]) > 0.01
    moved[1, :, 2] = 0
    assert moved.count_nonzero() == 0
    assert largest(attend(query, key, value) - attend(query, other, value)) > 0.01
    alone = attend(query[:1], key[:1, :, CONTEXT:], value[:1, :, CONTEXT:])
    assert largest(attend(query, key, value, is_key)[:1] - alone) < 1e-12


def test_the_slopes_of_alibi_are_those_of_its_paper():
    assert alibi_slopes(8).tolist() == [2.0**-i for i in range(1, 9)]
    assert alibi_slopes(6).tolist() == pytest.approx([2 ** (-4 * h / 3) for h in range(1, 7)])


def test_a_given_scaling_replaces_that_of_the_head_size():
    query, key, value = draw_qkv()
    scaled = softmax_attention(query * 0.5 * KEY**0.5, key, value)
    assert largest(softmax_attention(query, key, value, scaling=0.5) - scaled) < 1e-12
    assert largest(softmax_attention(query, key, value) - scaled) > 0.01


def test_bfloat16_is_close_to_float64(attend):
    inputs = [x.bfloat16() for x in draw_qkv(CONTEXT)]
    got, want = (attend(*qkv, some_keys()) for qkv in (inputs, [x.double() for x in inputs]))
    assert got.dtype is torch.bfloat16
    assert largest(got.double() - want) < 2e-2
