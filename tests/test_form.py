"""Section `infini`: what it refuses by name, and the format that grows with it."""

import hashlib
from dataclasses import fields, make_dataclass
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import pytest

from infini_retrofit.layer.form import InfiniParams
from infini_retrofit.model.checkpoints import FORMAT
from tests.reference import MEMORY_BRANCH, infini_params

HEDGEHOG = {"feature_map": "hedgehog"}
GATED = {"update_rule": "gated_delta", "feature_map": "unit"}
CACHE = MEMORY_BRANCH | {"update_rule": "neural_cache", "num_slots": 9}
NO_ROPE = {"positions": "none", "init": "random_layer"}
RANDOM_BRANCH = {"insertion": "parallel", "init": "random_layer"}
REFUSED = [
    ({"segment_length": 2}, r"segment_length must be at least 3 tokens, .* got 2"),
    ({"local_context": -1}, r"local_context must be in 0\.\.[\d,]+ tokens, got -1"),
    ({"num_features": 5, **HEDGEHOG}, r"num_features must be base or an even .* got 5"),
    ({"num_features": 4}, r"num_features must be base when .* elu1, .* got 4"),
    ({"bptt_segments": 0}, r"bptt_segments must be all or at least 1, got 0"),
    ({"heads": "single", "init": "random_layer"}, r"heads must be base .* got single"),
    ({"heads": "single", "positions": "none"}, r"heads must be base .* got single"),
    (RANDOM_BRANCH, r"init must be base or random_attention when .* parallel, .* got random_layer"),
    ({"update_rule": "delta", "decay": "feature"}, r"decay must be none unless .*, got feature"),
    ({"update_rule": "gated_delta"}, r"feature_map must be unit .* got elu1 with gated_delta"),
    ({"feature_map": "unit"}, r"feature_map must be unit .* got unit with linear"),
    ({**GATED, "local": "linear"}, r"local must be softmax .* unit, .* got linear"),
    ({**CACHE, "num_slots": 0}, r"num_slots must be in 1\.\..* got 0 with neural_cache"),
    ({"num_slots": 5}, r"num_slots must be in 1\.\..* else 0, got 5 with linear"),
    ({**CACHE, "memory_value": "hidden"}, r"memory_value must be embedding .* got hidden"),
    ({**CACHE, "feature_map": "elu1"}, r"feature_map must be unit .* got elu1 with neural_cache"),
    ({"local": "none"}, r"local must be softmax or linear unless .* got none with replace and on"),
    ({"memory_key": "before"}, r"memory_key and .* must be own and .* got before, own, hidden"),
    ({"memory_value": "embedding"}, r"memory_key and .* hidden unless .* got own, own, embedding"),
    ({"key_layer": 0.5}, r"memory_key and infini\.key_layer must be own .* got own, 0.5, hidden"),
    ({"key_layer": 1.0}, r"key_layer must be own or a share .* below 1, got 1.0"),
    ({"local": "linear", "positions": "alibi"}, r"positions must be rope or none .* got alibi"),
    (
        {"update_rule": "delta", "seed_scaling": True},
        r"seed_scaling must be false when infini\.update_rule is delta: .*, got true",
    ),
]
TAKEN = [
    {"layers": [], "segment_length": 3, "bptt_segments": 1},
    {"local_context": 17, "num_features": 2, **HEDGEHOG},
    {"heads": "single", **NO_ROPE},
    {"heads": "single", "init": "random_attention", "positions": "alibi"},
    {"seed_scaling": True, "decay": "feature", "local": "linear", "positions": "none"},
]
# A digest of all fields and choices of `InfiniParams` when files of each format were written.
FIELDS = {7: "d27173927df273975bb51e65e5c87c88", 8: "70309c44ce0171b547e00ae12342d919"}


@pytest.mark.parametrize(("over", "message"), REFUSED, ids=str)
def test_values_that_no_base_could_make_sense_of_are_refused_by_name(over, message):
    with pytest.raises(ValueError, match=rf"^infini\.{message}$"):
        infini_params(**over)


@pytest.mark.parametrize("over", TAKEN, ids=str)
def test_values_at_the_edge_of_what_makes_sense_are_taken(over):
    params = infini_params(**over)
    assert {name: getattr(params, name) for name in over} == over


def choices_of(kind: Any) -> str:
    if get_origin(kind) in (Literal, Union, UnionType):
        return " | ".join(c if isinstance(c, str) else choices_of(c) for c in get_args(kind))
    return kind.__name__


def fields_of(params: type[InfiniParams]) -> str:
    lines = sorted(f"{field.name}: {choices_of(field.type)}" for field in fields(params))
    return hashlib.md5("\n".join(lines).encode()).hexdigest()


def test_a_new_field_or_choice_needs_a_new_format():
    reminder = "raise checkpoints.FORMAT and add to FIELDS: older versions cannot read it"
    assert fields_of(InfiniParams) == FIELDS.get(FORMAT), reminder
    for field in (("mood", int, 0), ("gate", Literal["head", "query", "token"], "head")):
        grown = make_dataclass("Grown", [field], bases=(InfiniParams,), frozen=True, kw_only=True)
        assert fields_of(grown) != FIELDS[FORMAT]
