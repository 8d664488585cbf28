"""Every form of a model through its files, and as an exported folder: not one bit differs."""

import pytest
import torch
from transformers import PreTrainedModel

from infini_retrofit.generation.modeling import MODELS
from infini_retrofit.model.base import load_base
from infini_retrofit.model.checkpoints import load_retrofit, save_retrofit
from infini_retrofit.model.retrofit import insert_infini
from infini_retrofit.model.running import run_folded
from infini_retrofit.share.exported_folder import as_exported
from tests.reference import infini_params
from tests.tiny import FAMILIES, random_ids, tiny_base_folder
from tests.tiny_generation import SEGMENT, every_case


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return {family: tiny_base_folder(folder / family, family) for family in FAMILIES}


def same_weights(a: PreTrainedModel, b: PreTrainedModel) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@torch.no_grad()
def outputs(model: PreTrainedModel) -> torch.Tensor:
    """Return hidden states of a folded run, and of one that is cut in-layer."""
    ids = random_ids(model.config.vocab_size, 2, 3 * SEGMENT)
    in_layer = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    return torch.stack([run_folded(model, ids, SEGMENT), in_layer])


@every_case
@torch.no_grad()
def test_what_is_saved_or_exported_comes_back_bit_by_bit(family, other, form, bases, tmp_path):
    model, params = load_base(bases[family], torch.float32), infini_params(**form)
    insert_infini(model, params, seed=5)
    for parameter in model.parameters():
        parameter += 0.01 * torch.randn_like(parameter)
    model.config.other_layers = other
    save_retrofit(model, params, bases[family], tmp_path / "out")
    loaded, loaded_params = load_retrofit(bases[family], tmp_path / "out", torch.float32)
    assert loaded_params == params
    assert (loaded.config.infini, loaded.config.other_layers) == (vars(params), other)
    assert not loaded.training
    assert same_weights(loaded, model)
    assert torch.equal(outputs(loaded), outputs(model))
    as_exported(loaded).save_pretrained(tmp_path / "exported")
    opened = MODELS[family].from_pretrained(tmp_path / "exported")
    assert (opened.config.infini, opened.config.other_layers) == (vars(params), other)
    assert same_weights(opened, loaded)
    assert torch.equal(outputs(opened), outputs(loaded))
    next(opened.parameters()).view(-1)[0] += 1e-6
    assert not same_weights(opened, loaded)
