"""Tiny retrofitted models that generate, none of whose parameters has its usual start."""

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from infini_retrofit.generation.cache import InfiniCache
from infini_retrofit.generation.generation import enable_generation, read
from infini_retrofit.layer.form import InfiniParams
from tests.reference import MODEL_FORMS, infini_params, largest, make_model, name_of
from tests.tiny import FAMILIES, Family, random_ids

SEGMENT = infini_params().segment_length
OTHERS = ("segment", "full")
# Each form in both families; its other layers are confined in one of them.
CASES = [
    (family, OTHERS[(i + j) % 2], form)
    for i, form in enumerate(MODEL_FORMS)
    for j, family in enumerate(FAMILIES)
]
every_case = pytest.mark.parametrize(("family", "other", "form"), CASES, ids=name_of)
both_others = pytest.mark.parametrize("other", OTHERS)


def generating_model(
    family: Family = "llama", other_layers: str = "segment", **form: object
) -> PreTrainedModel:
    """Make a model with Infini layers that has an `InfiniCache`."""
    model, params = retrofitted_model(family, **form)
    enable_generation(model, params, other_layers)
    return model


def retrofitted_model(
    family: Family = "llama", **form: object
) -> tuple[PreTrainedModel, InfiniParams]:
    """Make a model with Infini layers, equal each time; return it with its form."""
    torch.manual_seed(1)
    model = make_model(family, form, torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model, infini_params(**form)


def filled(model: PreTrainedModel, ids: Tensor) -> InfiniCache:
    cache = InfiniCache(model)
    list(read(model, ids, cache))
    return cache


def draw_ids(num_rows: int, num_tokens: int, seed: int = 0) -> Tensor:
    """Draw token ids that both families know, none of them 0, which pads."""
    return 1 + random_ids(60, num_rows, num_tokens, seed=seed)


@torch.inference_mode()
def at_once(model: PreTrainedModel, ids: Tensor, **kwargs: object) -> Tensor:
    return model(ids, use_cache=False, **kwargs).logits


def generate(model: PreTrainedModel, ids: Tensor, **kwargs: object) -> tuple[Tensor, Tensor]:
    """Generate 7 tokens; return them and their logits."""
    options = {"max_new_tokens": 7, "do_sample": False, "pad_token_id": 0} | kwargs
    torch.manual_seed(0)
    found = model.generate(ids, output_logits=True, return_dict_in_generate=True, **options)
    return found.sequences[:, ids.shape[1] :], torch.stack(found.logits, dim=1)


def assert_same(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(got[0], want[0])
    assert largest(got[1] - want[1]) < 1e-5
