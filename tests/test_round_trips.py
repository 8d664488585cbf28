"""Every form of a model through its files, and as an exported folder: not one bit differs."""

import pytest
import torch
from transformers import PreTrainedModel

from infini_retrofit.generation.modeling import KEPT_FLOAT32, model_class
from infini_retrofit.layer.local_attention import alibi_slopes
from infini_retrofit.model.base import load_base
from infini_retrofit.model.checkpoints import load_retrofit, save_retrofit
from infini_retrofit.model.retrofit import infini_modules, insert_infini
from infini_retrofit.model.running import run_folded
from infini_retrofit.share.exported_folder import as_exported
from infini_retrofit.training.parameters import OF_MEMORY, set_trainable
from tests.reference import both_families, infini_params, make_model
from tests.tiny import FAMILIES, random_ids, tiny_base_folder, tiny_model
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
    opened = model_class(family).from_pretrained(tmp_path / "exported")
    assert (opened.config.infini, opened.config.other_layers) == (vars(params), other)
    assert same_weights(opened, loaded)
    assert torch.equal(outputs(opened), outputs(loaded))
    next(opened.parameters()).view(-1)[0] += 1e-6
    assert not same_weights(opened, loaded)


# Every kind of parameter that a base lacks, and slopes, which are none.
RICH = {
    **{"positions": "alibi", "insertion": "parallel", "feature_map": "hedgehog"},
    **{"gate": "query", "decay": "feature"},
}


@both_families
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_stays_float32_and_slopes_are_made_again(family, dtype, tmp_path):
    model, params = make_model(family, RICH, torch.float32), infini_params(**RICH)
    model.config.infini, model.config.other_layers = vars(params), "segment"
    exported = as_exported(model)
    assert exported.config.model_type == f"infini_{family}"
    exported.save_pretrained(tmp_path)
    opened = model_class(family).from_pretrained(tmp_path, dtype=dtype)
    groups = set_trainable(exported, "memory")
    of_memory = {id(p) for name in OF_MEMORY for p in groups[name]}
    names = {n for n, p in exported.named_parameters() if id(p) in of_memory}
    assert len(names) == 3 * 6
    assert all(any(kept in name for kept in KEPT_FLOAT32) for name in names)
    for name, parameter in opened.named_parameters():
        assert parameter.dtype is (torch.float32 if name in names else dtype), name
    assert not any("slopes" in name for name in exported.state_dict())
    for module in infini_modules(opened).values():
        assert torch.equal(module.slopes, alibi_slopes(module.shape.num_heads))


@both_families
def test_a_configuration_of_a_form_that_cannot_be_is_refused(family):
    kind, fields = model_class(family), tiny_model(family).config.to_dict()
    fields |= {"infini": vars(infini_params()) | {"segment_length": 0}}
    del fields["model_type"]
    with pytest.raises(ValueError, match=r"infini\.segment_length must be at least 3 .*, got 0"):
        kind(kind.config_class(**fields))
