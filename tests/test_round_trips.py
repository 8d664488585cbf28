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
from tests.reference import MODEL_FORMS, infini_params, largest, name_of
from tests.tiny import FAMILIES, random_ids, tiny_base_folder

SEGMENT, DOCUMENT = 5, 15


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return {family: tiny_base_folder(folder / family, family) for family in FAMILIES}


def make_trained(base_dir, form: dict) -> PreTrainedModel:
    """Insert layers and move every weight of the model."""
    model, params = load_base(base_dir, torch.float32), infini_params(**form)
    insert_infini(model, params, seed=5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    return model


def same_weights(a: PreTrainedModel, b: PreTrainedModel) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@torch.no_grad()
def outputs(model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Return hidden states of a folded run, and logits of one that is cut in-layer."""
    ids = random_ids(model.config.vocab_size, 2, DOCUMENT)
    return run_folded(model, ids, SEGMENT), model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", MODEL_FORMS, ids=name_of)
@pytest.mark.parametrize("other_layers", ["segment", "full"])
def test_what_is_saved_or_exported_comes_back_bit_by_bit(
    family, form, other_layers, bases, tmp_path
):
    model = make_trained(bases[family], form)
    model.config.other_layers = other_layers
    save_retrofit(model, infini_params(**form), bases[family], tmp_path / "out")
    loaded, params = load_retrofit(bases[family], tmp_path / "out", torch.float32)
    assert params == infini_params(**form)
    assert same_weights(loaded, model)
    assert all(torch.equal(x, y) for x, y in zip(outputs(loaded), outputs(model), strict=True))
    as_exported(loaded).save_pretrained(tmp_path / "exported")
    opened = MODELS[family].from_pretrained(tmp_path / "exported")
    assert same_weights(opened, loaded)
    in_layer = outputs(opened)[1]
    assert torch.equal(in_layer, outputs(loaded)[1])
    if other_layers == "full":
        assert same_weights(opened, model)
        assert torch.equal(in_layer, outputs(model)[1])
    else:
        # Confined layers cut a row where folding does: what was trained is what is shared.
        head = model.get_output_embeddings()
        assert largest(in_layer - head(outputs(model)[0])) < 1e-5
        has_others = params.layers != "all" or params.insertion == "parallel"
        assert (largest(in_layer - outputs(model)[1]) > 1e-3) == has_others
    with torch.no_grad():
        next(opened.parameters()).view(-1)[0] += 1e-6
    assert not same_weights(opened, loaded)
