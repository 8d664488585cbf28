"""The number of the format of saved retrofits is raised when what they may hold grows."""

from dataclasses import fields, make_dataclass
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from infini_retrofit.layer.form import InfiniParams
from infini_retrofit.model.checkpoints import FORMAT

# What `InfiniParams` was when files of each format were written.
FIELDS = {
    2: {
        "layers": "list | all",
        "insertion": "replace | parallel",
        "init": "base | random_attention | random_layer",
        "local": "softmax | linear | window_linear",
        "window": "int",
        "positions": "rope | alibi | none",
        "heads": "base | single",
        "memory": "on | off",
        "update_rule": "linear | delta | delta_gamma",
        "feature_map": "elu1 | hedgehog | dpfp",
        "num_features": "int | base",
        "recall_norm": "none | rms",
        "seed_scaling": "bool",
        "gate": "head | query",
        "decay": "none | head | feature",
        "written_tokens": "int | all",
        "initial_state": "empty | learnable",
        "bptt_segments": "int | all",
        "segment_length": "int",
        "local_context": "int",
        "initial_memory_share": "float",
    },
}
FIELDS[3] = FIELDS[2] | {"state_dtype": "float32 | bfloat16"}


def choices_of(kind: Any) -> str:
    if get_origin(kind) in (Literal, Union, UnionType):
        return " | ".join(c if isinstance(c, str) else choices_of(c) for c in get_args(kind))
    return kind.__name__


def fields_of(params: type[InfiniParams]) -> dict[str, str]:
    return {field.name: choices_of(field.type) for field in fields(params)}


def test_a_new_field_or_choice_needs_a_new_format():
    reminder = "raise checkpoints.FORMAT, and add an entry to FIELDS: older versions cannot read it"
    assert fields_of(InfiniParams) == FIELDS.get(FORMAT), reminder
    for field in (("mood", int, 0), ("gate", Literal["head", "query", "token"], "head")):
        grown = make_dataclass("Grown", [field], bases=(InfiniParams,), frozen=True, kw_only=True)
        assert fields_of(grown) != FIELDS[FORMAT]
