"""Exported models inside this process: number types, and what no file holds."""

import pytest
import torch

from infini_retrofit.generation.modeling import KEPT_FLOAT32, MODELS
from infini_retrofit.layer.local_attention import alibi_slopes
from infini_retrofit.model.retrofit import infini_modules
from infini_retrofit.share.exported_folder import as_exported
from infini_retrofit.training.parameters import OF_MEMORY, set_trainable
from tests.reference import both_families, infini_params, make_model
from tests.tiny import tiny_model

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
    opened = MODELS[family].from_pretrained(tmp_path, dtype=dtype)
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
    kind, fields = MODELS[family], tiny_model(family).config.to_dict()
    fields |= {"infini": vars(infini_params()) | {"segment_length": 0}}
    del fields["model_type"]
    with pytest.raises(ValueError, match=r"infini\.segment_length must be at least 3 .*, got 0"):
        kind(kind.config_class(**fields))
