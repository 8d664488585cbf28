"""The base arrives whole from a local folder, or is refused in one sentence; and its stage."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from tokenizers import Tokenizer

from infini_retrofit.bases import sources as base_sources
from infini_retrofit.bases.sources import HubBase, LocalBase
from infini_retrofit.model.base import load_base, load_tokenizer
from infini_retrofit.pipeline.guard import ChangedWhileRunningError
from infini_retrofit.texts.corpora import FilesCorpus
from stages import prepare_base
from tests.tiny import FAMILIES, assert_same_model, tiny_base_folder, tiny_llama

ROOT = Path(__file__).parent.parent
UNREAD = FilesCorpus(path="not-there", val_share=0.1, test_share=0.1)
STAGE_PARAMS = """
model: tiny
models:
  tiny:
    source: local
    path: {path}
corpus: mine
corpora:
  mine:
    source: files
    path: not-there
    val_share: 0.2
    test_share: 0.2
"""


def bring_base(params, name, out_dir):
    """Bring a base that needs no corpus."""
    base_sources.bring_base(params, name, out_dir, "unread", UNREAD)


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_local_folder_arrives_unchanged(tmp_path, family):
    source = tiny_base_folder(tmp_path / "source", family)
    bring_base(LocalBase(path=str(source)), "mine", tmp_path / "models/base")
    base = tmp_path / "models/base"
    assert_same_model(base, load_base(source, torch.float32))
    about = json.loads((base / "base.json").read_text())
    assert about["name"] == "mine"
    assert about["note"] == "float32 weights, kept as float32"
    assert about["num_parameters"] == load_base(base, torch.float32).num_parameters()
    text = "In 1984,\n\n12 foxes"
    ids = load_tokenizer(base)(text).input_ids
    assert Tokenizer.from_file(str(base / "tokenizer.json")).encode(text).ids == ids


def test_other_weights_give_other_logits(tmp_path):
    tiny_base_folder(tmp_path / "a", seed=1)
    with pytest.raises(AssertionError):
        assert_same_model(tmp_path / "a", tiny_llama(seed=2, vocab_size=277))


def test_bfloat16_weights_are_kept_as_float32_and_loaded_as_asked(tmp_path):
    source = tiny_base_folder(tmp_path / "source")
    load_base(source, torch.bfloat16).save_pretrained(source)
    bring_base(LocalBase(path=str(source)), "half", tmp_path / "base")
    assert "bfloat16" in json.loads((tmp_path / "base/base.json").read_text())["note"]
    assert load_base(tmp_path / "base", torch.float32).dtype == torch.float32
    assert load_base(tmp_path / "base", torch.bfloat16).dtype == torch.bfloat16


def test_a_flipped_byte_is_refused_on_load(tmp_path):
    weights = tiny_base_folder(tmp_path) / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ValueError, match=r"model\.safetensors differs from its manifest"):
        load_base(tmp_path, torch.float32)


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        bring_base(LocalBase(path=str(tmp_path / "nowhere")), "x", tmp_path / "base")
    with pytest.raises(FileNotFoundError, match="dvc repro prepare_base"):
        load_base(tmp_path / "base", torch.float32)


@pytest.mark.parametrize("lost", ["config.json", "model.safetensors", "tokenizer.json"])
def test_an_incomplete_folder_is_refused(tmp_path, lost):
    source = tiny_base_folder(tmp_path / "source")
    (source / lost).unlink()
    with pytest.raises(FileNotFoundError, match=lost.replace("model.", r"\*.")):
        bring_base(LocalBase(path=str(source)), "x", tmp_path / "base")


def test_an_unsupported_family_is_refused_before_its_weights_are_read(tmp_path):
    source = tiny_base_folder(tmp_path / "source")
    edit_config(source, model_type="gpt2")
    (source / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="must be one of gpt_neox, llama, got 'gpt2'"):
        bring_base(LocalBase(path=str(source)), "x", tmp_path / "base")


def test_missing_weights_are_not_made_up_and_the_old_base_stays(tmp_path):
    old = tiny_base_folder(tmp_path / "base", "gpt_neox")
    source = tiny_base_folder(tmp_path / "source")
    edit_config(source, num_hidden_layers=4)
    with pytest.raises(ValueError, match=r"must hold all weights, got none for model\.layers\.3\."):
        bring_base(LocalBase(path=str(source)), "x", old)
    assert load_base(old, torch.float32).config.model_type == "gpt_neox"
    assert {path.name for path in tmp_path.iterdir()} == {"base", "source"}


def test_a_folder_tells_its_depth_unread_and_an_empty_one_does_not(tmp_path):
    base = LocalBase(path=str(tmp_path / "source"))
    assert base.known_depth() is None
    source = tiny_base_folder(tmp_path / "source", num_hidden_layers=2)
    (source / "model.safetensors").unlink()
    assert base.known_depth() == 2
    edit_config(source, num_hidden_layers=5)
    assert base.known_depth() == 5


def test_a_repository_tells_its_depth_by_the_cache_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    base = HubBase(repo_id="org/name", revision="0" * 40)
    assert base.known_depth() is None
    for commit, num_layers in (("0" * 40, 2), ("1" * 40, 5)):
        snapshot = tmp_path / "models--org--name/snapshots" / commit
        tiny_base_folder(snapshot, num_hidden_layers=num_layers)
        (snapshot / "model.safetensors").unlink()
    assert base.known_depth() == 2


@pytest.fixture
def stage_folder(tmp_path, monkeypatch):
    """A project whose base is a local folder, as the working folder."""
    source = tiny_base_folder(tmp_path / "source")
    (tmp_path / "params.yaml").write_text(STAGE_PARAMS.format(path=source))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_stage_brings_the_chosen_preset(stage_folder):
    prepare_base.main()
    base = stage_folder / "models/base"
    assert json.loads((base / "base.json").read_text())["name"] == "tiny"
    assert_same_model(base, load_base(stage_folder / "source", torch.float32))


@pytest.mark.parametrize(
    ("edit", "changed"),
    [(("path: /", "path: ./"), "models.tiny"), (("_share: 0.2", "_share: 0.3"), "corpora.mine")],
)
def test_a_preset_edited_meanwhile_is_noticed(stage_folder, monkeypatch, edit, changed):
    path = stage_folder / "params.yaml"
    monkeypatch.setattr(
        prepare_base, "bring_base", lambda *_: path.write_text(path.read_text().replace(*edit))
    )
    with pytest.raises(ChangedWhileRunningError, match=rf"params\.yaml: {changed}; run it again"):
        prepare_base.main()


def test_a_source_that_needs_no_training_does_not_wait_for_its_imports():
    slow = ["infini_retrofit.bases.pretraining", "infini_retrofit.texts.articles", "gensim"]
    code = f"import sys, stages.prepare_base; print([m for m in {slow} if m in sys.modules])"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert run.stdout == "[]\n"
