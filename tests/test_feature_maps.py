"""Feature maps against their formulas, and how well they tell keys apart."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from infini_retrofit.layer import feature_maps
from infini_retrofit.layer.feature_maps import (
    FEATURES_PER_CHANNEL,
    LARGEST_EXPONENT,
    FeatureMapName,
    FeatureMaps,
    computing_dtype,
    dpfp,
    elu1,
    hedgehog,
    rms_norm,
)
from infini_retrofit.layer.memory import Write, write_segments
from infini_retrofit.layer.naive import naive_feature
from tests.reference import largest, recall

HEADS, KV_HEADS, TOKENS, KEY = 6, 2, 5, 7
every_map = pytest.mark.parametrize("name", sorted(FEATURES_PER_CHANNEL))


def make_maps(name: FeatureMapName, num_features: int | None = None) -> FeatureMaps:
    """Make maps whose weights, if they have any, differ from head to head."""
    num_features = FEATURES_PER_CHANNEL[name] * KEY if num_features is None else num_features
    maps = FeatureMaps(name, HEADS, KV_HEADS, KEY, num_features).double()
    with torch.no_grad():
        for parameter in maps.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return maps


def draw(num_heads: int) -> Tensor:
    return torch.randn(3, num_heads, TOKENS, KEY, dtype=torch.float64)


MAPS = [("elu1", None), ("dpfp", None), ("hedgehog", None), ("hedgehog", 4)]


@pytest.mark.parametrize(("name", "num_features"), MAPS)
def test_value_and_gradient_equal_the_formula_one_vector_at_a_time(name, num_features):
    maps = make_maps(name, num_features)
    for map_, weight, num_heads in (
        (maps.of_query, maps.query_weight, HEADS),
        (maps.of_key, maps.key_weight, KV_HEADS),
    ):
        x = draw(num_heads).requires_grad_()
        got = map_(x)
        rows = [
            naive_feature(x[b, h, t], name, None if weight is None else weight[h])
            for b, h, t in torch.cartesian_prod(*map(torch.arange, x.shape[:3]))
        ]
        want = torch.stack(rows).view(3, num_heads, TOKENS, -1)
        assert got.shape[-1] == maps.num_features
        assert maps.num_features == (num_features or FEATURES_PER_CHANNEL[name] * KEY)
        assert largest(got - want) < 1e-12
        inputs = [x] if weight is None else [x, weight]
        gradients = [torch.autograd.grad(y.sin().sum(), inputs) for y in (got, want)]
        for a, b in zip(*gradients, strict=True):
            assert largest(b) > 1e-2
            assert largest(a - b) < 1e-12


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


def test_dpfp_multiplies_neighbours_around_the_ring():
    x = torch.tensor([1.0, -2.0, 3.0])
    rectified = [1.0, 0.0, 3.0, 0.0, 2.0, 0.0]
    assert dpfp(x).tolist() == [rectified[i] * rectified[i - 1] for i in range(6)]
    assert dpfp(torch.tensor([2.0, 3.0])).tolist() == [0.0, 6.0, 0.0, 0.0]


@every_map
def test_features_are_never_negative(name):
    assert (make_maps(name).of_key(3 * draw(KV_HEADS)) >= 0).all()


def test_a_hedgehog_starts_as_the_exponential_that_softmax_takes_of_one_channel():
    maps = FeatureMaps("hedgehog", 1, 1, 16, 32).double()
    query, key = torch.zeros(2, 1, 1, 1, 16, dtype=torch.float64)
    query[..., 3], key[..., 3] = 1.7, 0.9
    # Each of a query and its key is scaled by K^(-1/4), so that a product has softmax's scale.
    logs = maps.of_query(query).log()[..., 3] * maps.of_key(key).log()[..., 3]
    assert largest(logs - 1.7 * 0.9 / math.sqrt(16)) < 1e-6


def test_a_smaller_hedgehog_starts_from_the_same_right_angles_for_queries_and_keys():
    maps = FeatureMaps("hedgehog", HEADS, KV_HEADS, 16, 6)
    gram = 16**0.5 * maps.query_weight.transpose(1, 2) @ maps.query_weight
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
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_features_are_float32_for_16_bit_models_and_under_autocast(name, dtype):
    maps, x = make_maps(name).float(), draw(KV_HEADS).float()
    want = maps.of_key(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(maps.of_key(x), want)
    feature = maps.of_key(x.to(dtype))
    assert feature.dtype is torch.float32
    assert torch.equal(feature, maps.of_key(x.to(dtype).float()))
    assert computing_dtype(torch.float64) is torch.float64


def test_a_hedgehog_without_its_guard_would_run_in_bfloat16(monkeypatch):
    maps, x = make_maps("hedgehog").float(), draw(KV_HEADS).float()
    want = maps.of_key(x)
    monkeypatch.setattr(feature_maps.torch, "autocast", lambda *_, **__: torch.enable_grad())
    with torch.amp.autocast_mode.autocast("cpu", dtype=torch.bfloat16):
        assert largest(maps.of_key(x) - want) > 1e-3


def num_found(name: FeatureMapName, num_pairs: int, head_dim: int = 64) -> int:
    """Write unrelated pairs of head_dim 64; count the values that come back nearest their own."""
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


def test_elu_is_too_flat_to_tell_unrelated_keys_apart():
    assert num_found("elu1", num_pairs=256) < 0.05 * 256
    assert num_found("hedgehog", num_pairs=256) > 0.15 * 256
    assert num_found("dpfp", num_pairs=256) > 0.3 * 256


@every_map
def test_fewer_pairs_are_told_apart_better(name):
    assert num_found(name, num_pairs=16) / 16 > num_found(name, num_pairs=256) / 256


def test_rms_norm_gives_size_one_to_anything_but_zeros():
    x = torch.randn(3, 5, dtype=torch.float32) * 1e-6
    size = rms_norm(x).square().mean(dim=-1).sqrt()
    assert largest(size - 1) < 1e-5
    assert rms_norm(torch.zeros(2, 5)).count_nonzero() == 0
