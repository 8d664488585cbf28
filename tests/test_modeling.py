"""Exported models inside this process: number types, and what no file holds."""

import pytest
import torch

from infini_retrofit.generation.modeling import KEPT_FLOAT32, MODELS
from infini_retrofit.layer.local_attention import alibi_slopes
from infini_retrofit.model.base import load_base
from infini_retrofit.model.retrofit import infini_modules, insert_infini
from infini_retrofit.share.exported_folder import as_exported
from infini_retrofit.training.parameters import OF_MEMORY, set_trainable
from tests.reference import infini_params
from tests.tiny import FAMILIES, tiny_base_folder

both_families = pytest.mark.parametrize("family", FAMILIES)
RICH = {
    **{"positions": "alibi", "insertion": "parallel", "feature_map": "hedgehog", "gate": "query"},
    **{"decay": "feature", "gate": "query"},
}


def make_exported(folder, family, **form):
    model, params = load_base(tiny_base_folder(folder / "base", family), torch.float32), form
    params = infini_params(**form)
    insert_infini(model, params)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("alpha"):
                parameter += 0.5
    model.config.infini, model.config.other_layers = vars(params), "segment"
    return as_exported(model)


@both_families
def test_the_memory_stays_float32_whatever_the_weights_are_opened_as(family, tmp_path):
    exported = make_exported(tmp_path, family, **RICH)
    exported.save_pretrained(tmp_path / "exported")
    opened = MODELS[family].from_pretrained(tmp_path / "exported", dtype=torch.bfloat16)
    groups = set_trainable(exported, "memory")
    of_memory = {id(p) for name in OF_MEMORY for p in groups[name]}
    names = {n for n, p in exported.named_parameters() if id(p) in of_memory}
    assert len(names) == 3 * 6
    for name, parameter in opened.named_parameters():
        assert parameter.dtype is (torch.float32 if name in names else torch.bfloat16), name
    assert all(any(kept in name for kept in KEPT_FLOAT32) for name in names)


@both_families
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slopes_which_no_file_holds_are_made_again(family, dtype, tmp_path):
    exported = make_exported(tmp_path, family, positions="alibi")
    exported.save_pretrained(tmp_path / "exported")
    assert not any("slopes" in name for name in exported.state_dict())
    opened = MODELS[family].from_pretrained(tmp_path / "exported", dtype=dtype)
    for module in infini_modules(opened).values():
        assert torch.equal(module.slopes, alibi_slopes(module.shape.num_heads))


@both_families
def test_the_configuration_says_what_was_inserted_and_refuses_what_cannot_be(family, tmp_path):
    exported = make_exported(tmp_path, family, **RICH)
    assert exported.config.model_type == f"infini_{family}"
    assert exported.config.infini == vars(infini_params(**RICH))
    assert exported.config.other_layers == "segment"
    fields = exported.config.to_dict() | {"infini": vars(infini_params()) | {"segment_length": 0}}
    del fields["model_type"]
    with pytest.raises(
        ValueError, match=r"infini\.segment_length must be at least 3 tokens, .*, got 0"
    ):
        MODELS[family](MODELS[family].config_class(**fields))
