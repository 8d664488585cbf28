"""The doors of section `infini`: what is refused by name, and what is not."""

import math

import pytest

from infini_retrofit.layer.feature_maps import FEATURES_PER_CHANNEL
from infini_retrofit.layer.form import AttentionShape
from tests.reference import infini_params

HEDGEHOG = {"feature_map": "hedgehog"}
NO_ROPE = {"positions": "none", "init": "random_layer"}


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ({"segment_length": 2}, r"infini\.segment_length must be at least 3 tokens, .* got 2"),
        ({"local_context": -1}, r"infini\.local_context must be in 0\.\..* tokens, got -1"),
        ({"local_context": 6}, r"infini\.local_context must be in .*=5 tokens, got 6"),
        ({"window": 0}, r"infini\.window must be at least 1 token, got 0"),
        ({"written_tokens": 0}, r"infini\.written_tokens must be all or in 1\.\..*=5 .*, got 0"),
        ({"written_tokens": 6}, r"infini\.written_tokens must be all or in 1\.\..*=5 .*, got 6"),
        ({"num_features": 5, **HEDGEHOG}, r"infini\.num_features must be base or an even .* got 5"),
        ({"num_features": 0, **HEDGEHOG}, r"infini\.num_features must be base or an even .* got 0"),
        ({"num_features": 4}, r"infini\.num_features must be base unless .* hedgehog, .* got 4"),
        ({"bptt_segments": 0}, r"infini\.bptt_segments must be all or at least 1, got 0"),
        ({"initial_memory_share": 0.0}, r"infini\.initial_memory_share must .*, got 0\.0"),
        ({"initial_memory_share": 1.0}, r"infini\.initial_memory_share must .*, got 1\.0"),
        ({"initial_memory_share": math.nan}, r"infini\.initial_memory_share must .*, got nan"),
        ({"heads": "single"}, r"infini\.heads must be base .*, got single"),
        ({"heads": "single", "init": "random_layer"}, r"infini\.heads must be base .* got single"),
        ({"heads": "single", "positions": "none"}, r"infini\.heads must be base .* got single"),
        (
            {"insertion": "parallel", "init": "random_layer"},
            r"infini\.init must be base or random_attention when infini\.insertion is parallel, "
            r".* got random_layer",
        ),
        (
            {"update_rule": "delta", "decay": "head"},
            r"infini\.decay must be none unless infini\.update_rule is linear: .*, got head",
        ),
        (
            {"update_rule": "delta_gamma", "initial_state": "learnable"},
            r"infini\.initial_state must be empty when infini\.update_rule is delta_gamma, .*",
        ),
        (
            {"local": "linear", "positions": "alibi"},
            r"infini\.positions must be rope or none when infini\.local is linear, .* got alibi",
        ),
        (
            {"local": "window_linear", "recall_norm": "rms"},
            r"infini\.recall_norm must be none when infini\.local is window_linear, .* got rms",
        ),
        (
            {"local": "window_linear", "decay": "head"},
            r"infini\.decay must be none when infini\.local is window_linear, .* got head",
        ),
        (
            {"seed_scaling": True, "recall_norm": "rms"},
            r"infini\.seed_scaling must be false when infini\.recall_norm is rms: .*, got true",
        ),
        (
            {"seed_scaling": True, "update_rule": "delta"},
            r"infini\.seed_scaling must be false when infini\.update_rule is delta: .*, got true",
        ),
        (
            {"seed_scaling": True, "local": "window_linear"},
            r"infini\.seed_scaling must be false when infini\.local is window_linear: .*, got true",
        ),
    ],
    ids=lambda x: "-".join(f"{k}={v}" for k, v in x.items()) if isinstance(x, dict) else "",
)
def test_values_that_no_base_could_make_sense_of_are_refused_by_name(over, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        infini_params(**over)


@pytest.mark.parametrize(
    "over",
    [
        {"layers": []},
        {"segment_length": 3},
        {"local_context": 5},
        {"window": 1},
        {"window": 99},
        {"written_tokens": 5},
        {"bptt_segments": 1},
        {"num_features": 2, **HEDGEHOG},
        {"heads": "single", **NO_ROPE},
        {"heads": "single", "init": "random_attention", "positions": "alibi"},
        {"insertion": "parallel", "init": "random_attention"},
        {"local": "window_linear", "positions": "alibi", "gate": "query"},
        {"recall_norm": "rms", "decay": "head"},
        {"seed_scaling": True, "memory": "off"},
        {"seed_scaling": True, "decay": "head", "local": "linear", "positions": "none"},
    ],
)
def test_values_at_the_edge_of_what_makes_sense_are_taken(over):
    params = infini_params(**over)
    assert {name: getattr(params, name) for name in over} == over


def test_there_is_a_memory_where_it_is_on_and_there_is_a_layer_to_have_it():
    assert infini_params().has_memory
    assert not infini_params(memory="off").has_memory
    assert not infini_params(layers=[]).has_memory


@pytest.mark.parametrize("init", ["base", "random_attention", "random_layer"])
def test_a_layer_trains_whole_where_all_of_it_starts_at_random(init):
    assert infini_params(init=init).whole_layers is (init == "random_layer")


@pytest.mark.parametrize(("bptt_segments", "want"), [("all", None), (1, 1), (3, 3)])
def test_gradients_cross_all_borders_or_are_cut_at_every_so_many_th(bptt_segments, want):
    assert infini_params(bptt_segments=bptt_segments).cutting_borders == want


SHAPE = AttentionShape(
    hidden_size=24, num_heads=4, num_kv_heads=2, head_dim=6, qkv_bias=True, o_bias=True
)


def test_a_single_head_has_the_full_width_and_no_biases():
    single = SHAPE.of_heads("single")
    assert (single.num_heads, single.num_kv_heads, single.head_dim) == (1, 1, 24)
    assert not single.qkv_bias
    assert not single.o_bias
    assert SHAPE.of_heads("base") == SHAPE


@pytest.mark.parametrize("feature_map", sorted(FEATURES_PER_CHANNEL))
def test_the_bytes_at_a_border_count_features_values_and_carried_tokens(feature_map):
    features = {"elu1": 6, "hedgehog": 12, "dpfp": 12}[feature_map]
    assert infini_params(feature_map=feature_map).count_features(6) == features
    memory = 4 * 2 * (features * 6 + features)
    context = 3 * 2 * 2 * 6 * 2
    for dtype, size in (("float32", memory), ("bfloat16", memory // 2)):
        assert SHAPE.border_bytes(0, features, dtype) == size
        assert SHAPE.border_bytes(3, features, dtype) == size + context
        assert SHAPE.border_bytes(3, 0, dtype) == context


def test_more_features_than_a_head_has_directions_for_are_refused():
    params = infini_params(num_features=14, **HEDGEHOG)
    assert params.count_features(7) == 14
    message = r"^infini\.num_features must be at most 12 for heads of 6 channels, got 14$"
    with pytest.raises(ValueError, match=message):
        params.count_features(6)
