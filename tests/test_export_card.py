"""The model card in an exported folder: what it says, and what it does not claim."""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from infini_retrofit.pipeline.files import write_manifest
from tests.test_record import RESULTS, write_record
from tests.tiny_export import export, make_retrofit


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A folder of models, and what is recorded of them."""
    folder = tmp_path_factory.mktemp("project")
    make_retrofit(folder, "llama", layers=[0, -1], local_context=3)
    write_record(folder)
    return folder


def test_the_card_holds_front_matter_numbers_and_training(project, tmp_path):
    text = (export(tmp_path, project / "models", "open") / "README.md").read_text()
    _, front, card = text.split("---\n", 2)
    front = yaml.safe_load(front)
    assert front["base_model"] == "tiny-llama"
    assert front["license"] == "unknown"
    assert front["library_name"] == "transformers"
    assert "infini-attention" in front["tags"]
    shown = re.sub(" +", " ", card)
    assert "| `segment_test_ppl` | 1,234.5000 | 20.2500 |" in shown
    assert "| `state_bytes` | | 49,920 |" in shown
    assert "| `val_loss` | 3.2500 |" in shown
    (known,) = re.findall(r"```yaml\n(.*?)```", card, re.DOTALL)
    known = yaml.safe_load(known)
    assert known["prepare_wikitext"] == {"corpus": "c", "corpora.c": {"path": "b"}}
    assert known["finetune"] == {"finetune": {"lr": 0.0002}}
    assert known["infini"]["local_context"] == 3
    assert "random weights" in card  # the base's note


def test_a_base_folder_of_one_s_own_needs_no_notes_of_the_pipeline(project, tmp_path):
    base = tmp_path / "mine"
    shutil.copytree(project / "models" / "base", base)
    (base / "base.json").unlink()
    write_manifest(base)
    more = ("--base", str(base), "--license", "mit")
    out = export(tmp_path, project / "models", "of-mine", *more)
    text = (out / "README.md").read_text()
    assert yaml.safe_load(text.split("---\n")[1])["base_model"] == "mine"
    assert "**Licence:** mit.\n" in text
    assert str(tmp_path) not in text


def test_options_of_the_command_reach_the_folder(project, tmp_path):
    more = ("--license", "mit", "--base-model", "someone/something", "--other-layers", "full")
    out = export(tmp_path, project / "models", "with-options", *more)
    front = yaml.safe_load((out / "README.md").read_text().split("---\n")[1])
    assert (front["license"], front["base_model"]) == ("mit", "someone/something")
    assert json.loads((out / "config.json").read_text())["other_layers"] == "full"
    assert "They see the whole prompt" in (out / "README.md").read_text()


def test_results_of_another_model_do_not_get_on_the_card(project, tmp_path, capsys):
    models = tmp_path / "models"
    shutil.copytree(project / "models", models)
    write_record(tmp_path)
    config = models / "finetuned" / "infini_config.json"
    config.write_text(config.read_text() + "\n")
    write_manifest(models / "finetuned")
    card = (export(tmp_path, models, "out") / "README.md").read_text()
    assert "## Metrics\n\nNot recorded." in card
    assert "Not recorded, but the form of the layers:" in card
    assert str(RESULTS["finetune"]["val_loss"]) not in card
    said = capsys.readouterr()
    assert re.fullmatch(r"note: .* is not the models/finetuned of .*\n", said.err)
    assert re.fullmatch(r"wrote .*out; open it by AutoModelForCausalLM.*\n", said.out)
