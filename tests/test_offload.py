"""Hooks of modules see every parameter: models whose weights are elsewhere compute the same."""

import copy

import pytest
import torch
from accelerate import cpu_offload

from infini_retrofit.generation.cache import InfiniCache
from infini_retrofit.layer.compressive_memory import CompressiveMemory
from tests.reference import largest
from tests.tiny_generation import at_once, draw_ids, every_case, filled, generate, generating_model


@every_case
def test_an_offloaded_model_reads_and_generates_the_same(family, other, form):
    model, ids = generating_model(family, other, **form), draw_ids(2, 13)
    offloaded = cpu_offload(copy.deepcopy(model), torch.device("cpu"))
    assert all(parameter.is_meta for parameter in offloaded.parameters())
    assert largest(at_once(offloaded, ids) - at_once(model, ids)) == 0
    assert filled(offloaded, ids).num_seen == 13
    options = {"max_new_tokens": 2}
    assert torch.equal(generate(offloaded, ids, **options)[0], generate(model, ids, **options)[0])


def test_a_parameter_that_is_taken_without_a_call_is_noticed(monkeypatch):
    offloaded = cpu_offload(generating_model(gate="query"), torch.device("cpu"))
    monkeypatch.setattr(
        CompressiveMemory, "__call__", lambda memory, job, *args: getattr(memory, job)(*args)
    )
    with pytest.raises((RuntimeError, NotImplementedError)):
        at_once(offloaded, draw_ids(2, 13))


def test_a_cache_of_offloaded_weights_is_not_saved(tmp_path):
    offloaded = cpu_offload(generating_model(), torch.device("cpu"))
    with pytest.raises(ValueError, match=r"must be in memory, got .* offloaded: load the model"):
        InfiniCache(offloaded).save(tmp_path / "cache", offloaded)
