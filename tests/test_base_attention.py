"""The base with its attention computed here against the base with torch's own kernel."""

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from infini_retrofit.layer import local_attention
from infini_retrofit.model import base_attention
from tests.reference import both_families, largest
from tests.tiny import ids_for, tiny_model

TOKENS = 13


def model_with(family: str, attention: str) -> PreTrainedModel:
    model = tiny_model(family).double()
    model.set_attn_implementation(attention)
    return model


@both_families
@pytest.mark.parametrize("longest", [TOKENS, TOKENS - 1])
def test_logits_and_gradients_are_those_of_torch_s_own_kernel(family, longest, monkeypatch):
    monkeypatch.setattr(local_attention, "LONGEST_EXPLICIT", longest)
    outputs = []
    for attention in ("sdpa", base_attention.NAME):
        model = model_with(family, attention)
        logits = model(input_ids=ids_for(model, 2, TOKENS), use_cache=False).logits
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
    model, torchs = model_with(family, base_attention.NAME), model_with(family, "sdpa")
    ids = ids_for(model, 2, TOKENS)
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
