"""Tiny retrofitted models that generate, none of whose parameters stands at its usual start."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from infini_retrofit.generation.generation import enable_generation
from infini_retrofit.model.retrofit import infini_modules, insert_infini
from tests.reference import infini_params, largest, without_conflicts
from tests.tiny import FAMILIES, Family, random_ids, tiny_model

SEGMENT = 5
# k * segment_length + {-1, 0, 1} for k = 0..4.
LENGTHS = sorted({k * SEGMENT + d for k in range(5) for d in (-1, 0, 1)} - {-1, 0})


def generating_model(
    family: Family = "llama", other_layers: str = "segment", **form: object
) -> PreTrainedModel:
    """Make a model with Infini layers that has an `InfiniCache`."""
    model, params = retrofitted_model(family, **form)
    enable_generation(model, params, other_layers)
    return model


def retrofitted_model(family: Family = "llama", **form: object):
    """Make a model with Infini layers; return it with how they were inserted."""
    model = tiny_model(family)
    params = infini_params(**without_conflicts({"segment_length": SEGMENT} | form))
    insert_infini(model, params)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in infini_modules(model).values():
            for name, parameter in module.named_parameters():
                if "proj" not in name:
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model, params


def draw_ids(num_rows: int, num_tokens: int, seed: int = 0) -> torch.Tensor:
    """Draw token ids that both families know, none of them 0, which pads."""
    return 1 + random_ids(60, num_rows, num_tokens, seed=seed)


@torch.inference_mode()
def at_once(model: PreTrainedModel, ids: Tensor, **kwargs: object) -> Tensor:
    """Return the logits of one forward pass without a cache."""
    return model(ids, use_cache=False, **kwargs).logits


def generate(model: PreTrainedModel, ids: Tensor, **kwargs: object) -> tuple[Tensor, Tensor]:
    """Generate 7 tokens; return them and their logits."""
    options = {"max_new_tokens": 7, "do_sample": False, "pad_token_id": 0} | kwargs
    torch.manual_seed(0)
    found = model.generate(ids, output_logits=True, return_dict_in_generate=True, **options)
    return found.sequences[:, ids.shape[1] :], torch.stack(found.logits, dim=1)


def assert_same(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> None:
    """Compare tokens, and the logits that they were chosen by."""
    assert torch.equal(got[0], want[0])
    assert largest(got[1] - want[1]) < 1e-5


FORMS = (
    {"layers": [0, 2]},
    {"positions": "alibi", "local_context": 3, "decay": "feature"},
    {"positions": "none", "gate": "query", "decay": "head", "layers": [-1]},
    {"local": "linear", "update_rule": "delta", "feature_map": "hedgehog", "local_context": 1},
    {"local": "linear", "positions": "none", "update_rule": "delta_gamma", "feature_map": "dpfp"},
    {"local": "window_linear", "window": 2, "local_context": 2, "written_tokens": 2},
    {"local": "window_linear", "positions": "alibi", "window": 2, "local_context": 2},
    {"local": "window_linear", "positions": "none", "window": 3, "initial_state": "learnable"},
    {"written_tokens": 2, "recall_norm": "rms", "initial_state": "learnable", "layers": [1]},
    {"memory": "off", "local_context": SEGMENT},
    {"init": "random_attention", "heads": "single", "positions": "none", "decay": "head"},
    {"state_dtype": "bfloat16", "local_context": 2},
)


def all_cases() -> list[tuple]:
    """Run each form in both families, with both insertions and both kinds of other layers."""
    cases = []
    for number, form in enumerate(FORMS):
        others = ("segment", "full")[:: 1 if number % 2 else -1]
        families = FAMILIES[:: 1 if number % 4 < 2 else -1]
        for family, insertion, other in zip(families, ("replace", "parallel"), others, strict=True):
            cases.append((family, other, {"insertion": insertion} | form))
    return cases


def name_of(x: object) -> str:
    return "-".join(map(str, x.values())) if isinstance(x, dict) else str(x)
