"""Versions of `transformers`: those that were proven, and no lost cache with any other."""

import functools
import importlib
from typing import Any

import pytest
import torch
import transformers
from transformers import DynamicCache, PreTrainedModel

from infini_retrofit.generation import generation, versions
from infini_retrofit.generation.cache import InfiniCache
from infini_retrofit.generation.versions import CACHE, CACHE_NAMES, PROVEN
from tests.tiny_generation import draw_ids, filled, generate, generating_model, retrofitted_model
from tests.tiny_project import ROOT


def test_the_proven_versions_are_those_that_are_installed_and_told():
    assert transformers.__version__ in PROVEN
    told = " and ".join(PROVEN)
    assert f'"transformers>={PROVEN[0][:4]}",  # proven with {told}' in (
        (ROOT / "pyproject.toml").read_text()
    )
    assert f"transformers=={PROVEN[0]}\n" in (ROOT / "requirements.txt").read_text()


def test_an_older_version_is_refused_before_anything_is_opened(monkeypatch):
    monkeypatch.setattr(transformers, "__version__", "5.22.2")
    with pytest.raises(ImportError, match=r"^transformers 5\.22\.2 is too old: run `pip install"):
        importlib.reload(versions)


def test_a_version_that_names_caches_otherwise_is_refused_before_anything_is_computed(monkeypatch):
    model, params = retrofitted_model()
    monkeypatch.setattr(generation, "CACHE", "remembered")
    with pytest.raises(ValueError, match="would not hand a cache from one token to the next: run"):
        generation.enable_generation(model, params)


def lose(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a model drop the cache that it is given, as one does that knows it by another name."""
    forward = model.forward

    @functools.wraps(forward)
    def losing(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **(kwargs | {CACHE: None}))

    monkeypatch.setattr(model, "forward", losing)


def exchange(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the body fill a cache of its own."""
    body = model.base_model
    forward = body.forward

    def other(*args: Any, **kwargs: Any) -> Any:
        kwargs[CACHE] = DynamicCache()
        return forward(*args, **kwargs)

    monkeypatch.setattr(body, "forward", other)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (lose, "position_ids must start at 0 without a cache, got 13: pass the"),
        (exchange, "returns another cache than the one that was filled: run `pip"),
    ],
)
def test_a_step_without_the_cache_that_was_filled_is_an_error(fault, said, monkeypatch):
    model = generating_model(other_layers="full", layers=[1])
    fault(model, monkeypatch)
    for other in ({}, {"num_beams": 2}):
        with pytest.raises(ValueError, match=said):
            generate(model, draw_ids(2, 13), **other)


@torch.no_grad()
def test_a_cache_is_found_under_the_names_of_all_versions_but_only_once():
    model, ids = generating_model(), draw_ids(1, 13)
    want = model(ids).logits[:, 9:]
    for name in CACHE_NAMES:
        cache = filled(model, ids[:, :9])
        got = model(ids[:, 9:], **{name: cache}).logits
        assert torch.allclose(got, want, atol=1e-5)
    with pytest.raises(ValueError, match="must be one cache, got 2"):
        model(ids, **dict.fromkeys(CACHE_NAMES, InfiniCache(model)))
