"""Feature maps: their starts, their number types, and how well they tell keys apart.

Their values and gradients are compared with the loop over tokens in test_forms.
"""

import math

import pytest
import torch
import torch.nn.functional as F

from infini_retrofit.layer import feature_maps
from infini_retrofit.layer.feature_maps import (
    FEATURES_PER_CHANNEL,
    LARGEST_EXPONENT,
    FeatureMapName,
    FeatureMaps,
    computing_dtype,
    elu1,
    hedgehog,
)
from infini_retrofit.layer.memory import Write, write_segments
from tests.reference import largest, recall

HEADS, KV_HEADS, KEY = 6, 2, 16
every_map = pytest.mark.parametrize("name", sorted(FEATURES_PER_CHANNEL))


def test_elu_and_its_gradient_are_those_of_the_formula_where_torch_rounds_to_zero():
    x = torch.cat([torch.linspace(-3, 3, 13), torch.tensor([0.0, -30.0, 30.0])]).double()
    x.requires_grad_()
    got, want = elu1(x), F.elu(x) + 1
    assert largest(got - want) < 1e-12
    gradients = [torch.autograd.grad(y.sin().sum(), x)[0] for y in (got, want)]
    assert largest(gradients[0] - gradients[1]) < 1e-12
    far = torch.tensor(-30.0)
    assert elu1(far) > 0
    assert F.elu(far) + 1 == 0


def test_a_hedgehog_starts_as_the_exponential_that_softmax_takes_of_one_channel():
    maps = FeatureMaps("hedgehog", 1, 1, KEY, 2 * KEY).double()
    query, key = torch.zeros(2, 1, 1, 1, KEY, dtype=torch.float64)
    query[..., 3], key[..., 3] = 1.7, 0.9
    # Each of a query and its key is scaled by K^(-1/4), so that a product has softmax's scale.
    logs = maps.of_query(query).log()[..., 3] * maps.of_key(key).log()[..., 3]
    assert largest(logs - 1.7 * 0.9 / math.sqrt(KEY)) < 1e-6


def test_a_smaller_hedgehog_starts_from_the_same_right_angles_for_queries_and_keys():
    maps = FeatureMaps("hedgehog", HEADS, KV_HEADS, KEY, 6)
    gram = KEY**0.5 * maps.query_weight.transpose(1, 2) @ maps.query_weight
    torch.testing.assert_close(gram, torch.eye(3).expand(HEADS, -1, -1), atol=1e-5, rtol=0)
    assert torch.equal(maps.query_weight[:1].expand(KV_HEADS, -1, -1), maps.key_weight)


def test_a_hedgehog_does_not_overflow_and_its_gradient_is_finite():
    x = torch.full((1, 1, 1, 2), 1e4, requires_grad=True)
    feature = hedgehog(x, torch.eye(2)[None])
    assert largest(feature) == pytest.approx(math.exp(LARGEST_EXPONENT))
    (gradient,) = torch.autograd.grad((feature @ feature.transpose(2, 3)).sum(), x)
    assert gradient.isfinite().all()
    assert not torch.cat([x, -x], dim=-1).exp().isfinite().all()


@every_map
@torch.no_grad()
def test_features_are_float32_for_16_bit_models_and_under_autocast(name, monkeypatch):
    maps = FeatureMaps(name, HEADS, KV_HEADS, KEY, FEATURES_PER_CHANNEL[name] * KEY)
    x = torch.randn(3, KV_HEADS, 5, KEY)
    want = maps.of_key(x)
    assert want.min() > 0 or name == "unit"
    for dtype in (torch.float16, torch.bfloat16):
        feature = maps.of_key(x.to(dtype))
        assert feature.dtype is torch.float32
        assert torch.equal(feature, maps.of_key(x.to(dtype).float()))
    assert computing_dtype(torch.float64) is torch.float64
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(maps.of_key(x), want)
        monkeypatch.setattr(feature_maps.torch, "autocast", lambda *_, **__: torch.no_grad())
        unguarded = maps.of_key(x)
    assert largest(unguarded - want) > 1e-3 or name == "elu1"  # which has no products


def num_found(name: FeatureMapName, num_pairs: int, head_dim: int = 64) -> int:
    """Write unrelated pairs; count the values that come back nearest their own."""
    maps = FeatureMaps(name, 1, 1, head_dim, FEATURES_PER_CHANNEL[name] * head_dim)
    if name == "hedgehog":
        for parameter in maps.parameters():
            parameter.data[:] = torch.eye(head_dim)
    key, value = torch.randn(2, 1, 1, num_pairs, head_dim)
    key = 2 * key
    with torch.no_grad():
        recalled = recall(maps.of_query(key), write_segments(Write(maps.of_key(key), value)))
    nearest = (recalled @ value.transpose(2, 3)).argmax(dim=-1)
    return (nearest == torch.arange(num_pairs)).sum().item()


def test_elu_is_too_flat_to_tell_many_unrelated_keys_apart():
    assert num_found("elu1", num_pairs=256) < 0.05 * 256
    assert num_found("hedgehog", num_pairs=256) > 0.15 * 256
    assert num_found("elu1", num_pairs=16) / 16 > num_found("elu1", num_pairs=256) / 256
