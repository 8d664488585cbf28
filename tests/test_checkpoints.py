"""What is saved comes back bit by bit, and what was tampered with does not."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from infini_retrofit.generation.generation import enable_generation
from infini_retrofit.model.base import load_base
from infini_retrofit.model.checkpoints import CONFIG, FORMAT, WEIGHTS, load_retrofit, save_retrofit
from infini_retrofit.model.families import FAMILIES
from infini_retrofit.model.retrofit import infini_modules, insert_infini
from infini_retrofit.model.running import run_folded
from infini_retrofit.pipeline.files import write_manifest
from infini_retrofit.training.parameters import set_trainable
from tests.reference import infini_params
from tests.tiny import random_ids, tiny_base_folder

SEGMENT, DOCUMENT = 5, 15
both_families = pytest.mark.parametrize("family", sorted(FAMILIES))
SEEDS_FORM = {"heads": "single", "init": "random_layer", "local": "linear", "positions": "none"}
FORMS = {
    "published": {"layers": [0, -1], "local_context": 3},
    "seeds": {"layers": [0], **SEEDS_FORM},
    "no memory": {"memory": "off"},
}


def save_trained(base_dir, out, part="infini", **over):
    """Insert layers, move all weights of one part a little, save, and return the model."""
    model, params = load_base(base_dir, torch.float32), infini_params(**over)
    insert_infini(model, params, seed=5)
    with torch.no_grad():
        for group in set_trainable(model, part).values():
            for parameter in group:
                parameter += 0.01 * torch.randn_like(parameter)
    save_retrofit(model, params, base_dir, out)
    return model, params


@both_families
@pytest.mark.parametrize("form", sorted(FORMS))
@pytest.mark.parametrize("part", ["infini", "all"])
def test_a_saved_model_comes_back_bit_by_bit(family, form, part, tmp_path):
    base_dir = tiny_base_folder(tmp_path / "base", family)
    model, params = save_trained(base_dir, tmp_path / "out", part, **FORMS[form])
    loaded, loaded_params = load_retrofit(base_dir, tmp_path / "out", torch.float32)
    assert loaded_params == params
    assert not loaded.training
    want, got = model.state_dict(), loaded.state_dict()
    assert want.keys() == got.keys()
    assert all(torch.equal(want[name], got[name]) for name in want)
    ids = random_ids(model.config.vocab_size, 2, DOCUMENT)
    assert torch.equal(run_folded(loaded, ids, SEGMENT), run_folded(model.eval(), ids, SEGMENT))


@both_families
def test_tied_embeddings_come_back_tied(family, tmp_path):
    base_dir = tiny_base_folder(tmp_path / "base", family, tie_word_embeddings=True)
    model, _ = save_trained(base_dir, tmp_path / "out", part="all")
    loaded, _ = load_retrofit(base_dir, tmp_path / "out", torch.float32)
    head, embedding = loaded.get_output_embeddings(), loaded.get_input_embeddings()
    assert head.weight is embedding.weight
    assert torch.equal(head.weight, model.get_input_embeddings().weight)


@both_families
def test_only_what_differs_from_the_base_is_saved(family, tmp_path):
    base_dir = tiny_base_folder(tmp_path / "base", family)
    save_trained(base_dir, tmp_path / "out", layers=[1])
    names = load_file(tmp_path / "out" / WEIGHTS)
    assert len(names) > 4
    assert all("layers.1." in name for name in names)
    assert not any("mlp" in name or "norm" in name for name in names)
    assert json.loads((tmp_path / "out" / CONFIG).read_text())["infini"]["layers"] == [1]


@both_families
@pytest.mark.parametrize("tied", [False, True])
def test_frozen_weights_rounded_for_the_run_do_not_count_as_different(family, tied, tmp_path):
    base_dir = tiny_base_folder(tmp_path / "base", family, tie_word_embeddings=tied)
    model, params = load_base(base_dir, torch.bfloat16), infini_params(layers=[1])
    insert_infini(model, params)
    trained = [p for group in set_trainable(model, "infini").values() for p in group]
    rounded = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert any(not torch.equal(p.float(), load_base(base_dir, torch.float32).state_dict()[n])
               for n, p in model.named_parameters() if n in rounded)  # fmt: skip
    with torch.no_grad():
        for parameter in trained:
            parameter += 1.0
    save_retrofit(model, params, base_dir, tmp_path / "out")
    names = load_file(tmp_path / "out" / WEIGHTS)
    assert set(names) == {n for n, p in model.named_parameters() if p.requires_grad}
    assert len(names) == len(trained)


def test_gates_stay_float32_whatever_the_weights_are_loaded_as(tmp_path):
    base_dir = tiny_base_folder(tmp_path / "base")
    model, _ = save_trained(base_dir, tmp_path / "out")
    loaded, _ = load_retrofit(base_dir, tmp_path / "out", torch.bfloat16)
    for index, module in infini_modules(loaded).items():
        assert module.q_proj.weight.dtype is torch.bfloat16
        assert module.gate_logit.dtype is torch.float32
        assert torch.equal(module.gate_logit, infini_modules(model)[index].gate_logit)


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_one_flipped_byte_is_refused_by_name(name, tmp_path):
    base_dir = tiny_base_folder(tmp_path / "base")
    save_trained(base_dir, tmp_path / "out")
    path = tmp_path / "out" / name
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} differs from its manifest.*`dvc repro distill`"):
        load_retrofit(base_dir, tmp_path / "out", torch.float32, "dvc repro distill")


def rewrite_config(folder, **changes):
    """Change top fields of a retrofit's description, or remove them where the value is None."""
    about = json.loads((folder / CONFIG).read_text()) | changes
    (folder / CONFIG).write_text(json.dumps({k: v for k, v in about.items() if v is not None}))
    write_manifest(folder)


def test_another_base_of_the_same_form_is_refused(tmp_path):
    base_dir = tiny_base_folder(tmp_path / "base")
    other = tiny_base_folder(tmp_path / "other", seed=1)
    save_trained(base_dir, tmp_path / "out")
    with pytest.raises(ValueError, match=r"base of .*out must be the one .*, got .*other of "):
        load_retrofit(other, tmp_path / "out", torch.float32)


def test_a_copy_of_the_base_with_another_tokenizer_is_the_same_base(tmp_path):
    base_dir = tiny_base_folder(tmp_path / "base")
    model, params = save_trained(base_dir, tmp_path / "out")
    (base_dir / "tokenizer_config.json").write_text("{}")
    write_manifest(base_dir)
    loaded, found = load_retrofit(base_dir, tmp_path / "out", torch.float32)
    assert found == params
    assert all(torch.equal(x, model.state_dict()[n]) for n, x in loaded.state_dict().items())


def test_a_base_without_a_manifest_says_how_to_make_one(tmp_path):
    base_dir = tiny_base_folder(tmp_path / "base")
    model, params = save_trained(base_dir, tmp_path / "out")
    (base_dir / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"`infini_retrofit\.write_manifest`"):
        save_retrofit(model, params, base_dir, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_model_whose_projections_were_taken_apart_is_refused(tmp_path):
    base_dir = tiny_base_folder(tmp_path / "base", "gpt_neox")
    model, params = save_trained(base_dir, tmp_path / "out", layers=[0])
    enable_generation(model, params, "segment")
    message = r"saved before `enable_generation` .*, got one without gpt_neox\.layers\.1\.att"
    with pytest.raises(ValueError, match=message):
        save_retrofit(model, params, base_dir, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_model_with_other_layers_than_its_parameters_say_is_refused(tmp_path):
    base_dir = tiny_base_folder(tmp_path / "base")
    model, _ = save_trained(base_dir, tmp_path / "out", layers=[0])
    with pytest.raises(
        ValueError, match=r"got one without model\.layers\.1\.self_attn\.gate_logit"
    ):
        save_retrofit(model, infini_params(layers=[0, 1]), base_dir, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_folders_of_another_kind_are_refused_with_those_that_will_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base, out = tiny_base_folder(Path("models/base")), Path("models/finetuned")
    save_trained(base, out)
    ways_out = {
        (base, base): f"models/base holds no {CONFIG}: it is no retrofitted model; run `dvc repro` "
        "to make a retrofitted model; found beside it: models/finetuned",
        (base, Path("models/fintuned")): "models/fintuned is missing: run `dvc repro` to make a "
        "retrofitted model; found beside it: models/finetuned",
        (out, out): "models/finetuned holds no config.json: it is no base model; run `dvc repro "
        "prepare_base` to make a base model; found beside it: models/base",
        (
            Path("base"),
            out,
        ): "base is missing: run `dvc repro prepare_base` to make a base model in "
        f"the project's folder (this one is {tmp_path})",
    }
    for (base_dir, folder), message in ways_out.items():
        with pytest.raises(FileNotFoundError, match=f"^{re.escape(message)}$"):
            load_retrofit(base_dir, folder, torch.float32)
    with pytest.raises(FileNotFoundError, match=r"^models/finetuned holds no config"):
        load_base(out, torch.float32)


@pytest.mark.parametrize("found", [None, FORMAT - 1, FORMAT + 1])
def test_another_format_is_refused_by_its_number(found, tmp_path):
    base_dir, out = tiny_base_folder(tmp_path / "base"), tmp_path / "out"
    save_trained(base_dir, out)
    rewrite_config(out, format=found)
    message = rf"^the format of .*{CONFIG} must be {FORMAT}, .*, got {found}: run `dvc repro`"
    with pytest.raises(ValueError, match=message):
        load_retrofit(base_dir, out, torch.float32)


def test_what_the_other_layers_see_is_kept(tmp_path):
    base_dir = tiny_base_folder(tmp_path / "base")
    model, params = save_trained(base_dir, tmp_path / "out")
    assert load_retrofit(base_dir, tmp_path / "out", torch.float32)[0].config.infini == vars(params)
    model.config.other_layers = "full"
    save_retrofit(model, params, base_dir, tmp_path / "again")
    loaded, _ = load_retrofit(base_dir, tmp_path / "again", torch.float32)
    assert loaded.config.other_layers == "full"


def test_a_retrofit_that_is_not_there_says_what_makes_it(tmp_path):
    base_dir = tiny_base_folder(tmp_path / "base")
    with pytest.raises(
        FileNotFoundError, match=r"run `dvc repro distill` to make a retrofitted model"
    ):
        load_retrofit(base_dir, tmp_path / "out", torch.float32, "dvc repro distill")


@both_families
@pytest.mark.parametrize("insertion", ["replace", "parallel"])
def test_what_a_run_froze_and_rounded_comes_back_from_the_base_unrounded(
    family, insertion, tmp_path
):
    base_dir = tiny_base_folder(tmp_path / "base", family)
    model, params = load_base(base_dir, torch.float32), infini_params(insertion=insertion)
    insert_infini(model, params)
    exact = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    (gate,) = set_trainable(model, "memory", frozen_dtype=torch.bfloat16)["gate"][:1]
    gate.data += 1
    save_retrofit(model, params, base_dir, tmp_path / "out")
    loaded, _ = load_retrofit(base_dir, tmp_path / "out", torch.float32)
    moved = {n for n, x in loaded.state_dict().items() if not torch.equal(x, exact[n])}
    assert [name.rpartition(".")[2] for name in moved] == ["gate_logit"]
    assert len(load_file(tmp_path / "out" / WEIGHTS)) == 1
