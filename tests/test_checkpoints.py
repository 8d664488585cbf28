"""A retrofit's folder: what is saved, what comes back, and what is refused."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from infini_retrofit.generation.generation import enable_generation
from infini_retrofit.layer.form import InfiniParams
from infini_retrofit.model.base import load_base
from infini_retrofit.model.checkpoints import CONFIG, FORMAT, WEIGHTS, load_retrofit, save_retrofit
from infini_retrofit.model.retrofit import insert_infini
from infini_retrofit.pipeline.files import write_manifest
from infini_retrofit.training.parameters import set_trainable
from tests.reference import both_families, infini_params
from tests.tiny import Family, tiny_base_folder

BASE, OUT = Path("models/base"), Path("models/finetuned")


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def insert(
    family: Family = "llama", *, tied: bool = False, **form: object
) -> tuple[PreTrainedModel, InfiniParams]:
    """Write a base; return a retrofit of it and the retrofit's form."""
    tiny_base_folder(BASE, family, tie_word_embeddings=tied)
    model, params = load_base(BASE, torch.float32), infini_params(**form)
    insert_infini(model, params, seed=5)
    return model, params


def save(**about: object) -> tuple[PreTrainedModel, InfiniParams]:
    """Write a base and a retrofit of which all weights moved."""
    model, params = insert(**about)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    save_retrofit(model, params, BASE, OUT)
    return model, params


def load(base: Path = BASE, out: Path = OUT, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return load_retrofit(base, out, dtype, "dvc repro distill")[0]


@both_families
@pytest.mark.parametrize(("insertion", "tied"), [("replace", False), ("parallel", True)])
def test_only_what_moved_is_saved_and_what_a_run_rounded_comes_back_unrounded(
    family, insertion, tied
):
    model, params = insert(family, tied=tied, layers=[1], insertion=insertion)
    exact = {name: x.clone() for name, x in model.state_dict().items()}
    set_trainable(model, "infini", frozen_dtype=torch.bfloat16)
    rounded = {n for n, x in model.state_dict().items() if not torch.equal(x.float(), exact[n])}
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    moved = {name for name in trained if "v_proj" not in name}
    for name in moved:
        model.get_parameter(name).data += 1
    save_retrofit(model, params, BASE, OUT)
    found = load().state_dict()
    assert load_file(OUT / WEIGHTS).keys() == moved < trained
    assert {name for name, x in found.items() if not torch.equal(x, exact[name])} == moved
    assert len(rounded - trained) > 5


@both_families
def test_tied_embeddings_come_back_tied(family):
    model, _ = save(family=family, tied=True)
    loaded = load()
    head, embedding = loaded.get_output_embeddings(), loaded.get_input_embeddings()
    assert head.weight is embedding.weight
    assert torch.equal(head.weight, model.get_input_embeddings().weight)


def test_the_memory_stays_float32_whatever_the_weights_are_loaded_as():
    model, _ = save(feature_map="hedgehog", gate="query", decay="feature")
    of_memory = {id(p) for group in set_trainable(model, "memory").values() for p in group}
    want = {name: p for name, p in model.named_parameters() if id(p) in of_memory}
    assert len(want) == 3 * 5
    for name, parameter in load(dtype=torch.bfloat16).named_parameters():
        if name in want:
            assert torch.equal(parameter, want[name])
        assert parameter.dtype is (torch.float32 if name in want else torch.bfloat16), name


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_one_flipped_byte_is_refused_by_name(name):
    save()
    content = bytearray((OUT / name).read_bytes())
    content[-5] ^= 1
    (OUT / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} differs from its manifest.*`dvc repro distill`"):
        load()


DAMAGED = {
    "lacks": (lambda x: x.pop("lm_head.weight"), r"^lm_head\.weight of .* must be float.* got no"),
    "one more": (lambda x: x.update(more=torch.ones(1)), r"^more of .* must be no tensor, got"),
    "nan": (lambda x: x["lm_head.weight"].mul_(float("nan")), r"^lm_head\.weight of .* be finite"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_weights_that_are_not_those_that_were_saved_are_refused(kind):
    save()
    change, message = DAMAGED[kind]
    with safe_open(OUT / WEIGHTS, framework="pt") as file:
        about = file.metadata()
    tensors = load_file(OUT / WEIGHTS)
    change(tensors)
    save_file(tensors, OUT / WEIGHTS, about)
    write_manifest(OUT)
    with pytest.raises(ValueError, match=message + ".*run `dvc repro distill`"):
        load()


def test_a_form_that_the_weights_were_not_saved_with_is_refused():
    save()
    about = json.loads((OUT / CONFIG).read_text())
    about["infini"]["gate"] = "query"
    (OUT / CONFIG).write_text(json.dumps(about))
    write_manifest(OUT)
    with pytest.raises(ValueError, match=rf"^the form of .*{CONFIG} must be .*head.*got .*query"):
        load()


@pytest.mark.parametrize("found", [None, FORMAT - 1])
def test_another_format_is_refused_by_its_number(found):
    save()
    about = json.loads((OUT / CONFIG).read_text()) | {"format": found}
    (OUT / CONFIG).write_text(json.dumps({k: v for k, v in about.items() if v is not None}))
    write_manifest(OUT)
    message = rf"^the format of .*{CONFIG} must be {FORMAT}, .*, got {found}: run `dvc repro"
    with pytest.raises(ValueError, match=message):
        load()


def test_another_base_is_refused_unless_its_tokenizer_alone_is_another():
    model, _ = save()
    (BASE / "tokenizer_config.json").write_text("{}")
    write_manifest(BASE)
    assert torch.equal(load().lm_head.weight, model.lm_head.weight)
    other = tiny_base_folder(Path("other"), seed=1)
    with pytest.raises(ValueError, match=r"base of .*finetuned must be the one .*, got other of "):
        load(other)


def test_a_base_without_a_manifest_says_how_to_make_one():
    model, params = insert()
    (BASE / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"`infini_retrofit\.write_manifest`"):
        save_retrofit(model, params, BASE, OUT)


def test_a_model_of_other_weights_than_its_form_has_is_refused():
    model, params = insert("gpt_neox", layers=[0])
    with pytest.raises(ValueError, match=r"got one with gpt_neox\.layers\.1\.att"):
        save_retrofit(model, infini_params(layers=[0, 1]), BASE, OUT)
    enable_generation(model, params, "segment")
    message = r"saved before `enable_generation` .*, got one without gpt_neox\.layers\.1\.att"
    with pytest.raises(ValueError, match=message):
        save_retrofit(model, params, BASE, OUT)
    assert not OUT.exists()


def test_folders_of_another_kind_are_refused_with_those_that_will_do(tmp_path):
    save()
    ours = "run `dvc repro distill` to make a retrofitted model"
    a_base = "run `dvc repro prepare_base` to make a base model"
    tuned, based = f"{ours}; found beside it: {OUT}", f"{a_base}; found beside it: {BASE}"
    here = f"{a_base} in the project's folder (this one is {tmp_path})"
    for base, out, message in (
        (BASE, BASE, f"{BASE} holds no {CONFIG}: it is no retrofitted model; {tuned}"),
        (BASE, Path("models/fintuned"), f"models/fintuned is missing: {tuned}"),
        (OUT, OUT, f"{OUT} holds no config.json: it is no base model; {based}"),
        (Path("b"), OUT, f"b is missing: {here}"),
    ):
        with pytest.raises(FileNotFoundError, match=f"^{re.escape(message)}$"):
            load(base, out)
    with pytest.raises(FileNotFoundError, match=r"^models/finetuned holds no config"):
        load_base(OUT, torch.float32)
