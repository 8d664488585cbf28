"""Attention inside a segment, and the base with its attention computed here.

Their values and gradients are compared with the loop over tokens in test_forms, and with torch's.
"""

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

from infini_retrofit.layer import local_attention
from infini_retrofit.layer.feature_maps import FeatureMaps
from infini_retrofit.layer.local_attention import alibi_slopes, linear_attention, softmax_attention
from infini_retrofit.model import base_attention
from tests.reference import both_families, largest
from tests.tiny import ids_for, tiny_model

BATCH, KV_HEADS, HEADS, TOKENS, CONTEXT, KEY, VALUE = 2, 2, 6, 5, 4, 7, 3
DOCUMENT = 13
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


def model_with(family: str, attention: str) -> PreTrainedModel:
    model = tiny_model(family).double()
    model.set_attn_implementation(attention)
    return model


@both_families
@pytest.mark.parametrize("longest", [DOCUMENT, DOCUMENT - 1])
def test_logits_and_gradients_are_those_of_torch_s_own_kernel(family, longest, monkeypatch):
    monkeypatch.setattr(local_attention, "LONGEST_EXPLICIT", longest)
    outputs = []
    for attention in ("sdpa", base_attention.NAME):
        model = model_with(family, attention)
        logits = model(input_ids=ids_for(model, 2, DOCUMENT), use_cache=False).logits
        logits.sin().sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        outputs.append((logits, gradients))
    (want, want_gradients), (got, gradients) = outputs
    assert 0 <= largest(got - want) < 1e-9
    for name, gradient in want_gradients.items():
        assert largest(gradients[name] - gradient) < 1e-9, name


@both_families
def test_it_is_used_where_it_may_be_and_not_where_a_mask_is_needed(family, monkeypatch):
    calls, attend = [], base_attention.softmax_attention

    def spy(*args: Tensor, **kwargs: object) -> Tensor:
        calls.append(args[0].shape)
        return attend(*args, **kwargs)

    monkeypatch.setattr(base_attention, "softmax_attention", spy)
    # An exported model that another test opened brings a copy of its own under the same name.
    registered = AttentionInterface._global_mapping
    monkeypatch.setitem(registered, base_attention.NAME, base_attention.attend)
    model, torchs = model_with(family, base_attention.NAME), model_with(family, "sdpa")
    ids = ids_for(model, 2, DOCUMENT)
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
        assert len(calls) == 3
        padding = torch.ones_like(ids)
        padding[1, :4] = 0
        inputs = {"input_ids": ids, "attention_mask": padding, "use_cache": False}
        assert largest(model(**inputs).logits - torchs(**inputs).logits) < 1e-9
        assert len(calls) == 3
        unmasked = torchs(input_ids=ids, use_cache=False).logits
        assert largest(torchs(**inputs).logits[1, 4:] - unmasked[1, 4:]) > 0.01
