"""The exported folder: complete, readable, and open to a process without this project."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from infini_retrofit.generation.generation import enable_generation
from infini_retrofit.share import exported_folder
from tests.reference import infini_params
from tests.tiny import FAMILIES, random_ids
from tests.tiny_export import export, make_retrofit

FORMS = {
    "published": {"layers": [0, -1], "local_context": 3},
    "parallel": {"insertion": "parallel", "positions": "alibi", "feature_map": "hedgehog"},
}
# What neither this project's code nor what only its pipeline needs may be found.
BLOCKED = ("infini_retrofit", "jaxtyping", "datasets", "peft", "dvc", "ruamel", "tests")
PROGRAM = """
import sys
for name in {blocked}:
    sys.modules[name] = None
{body}
"""
COMPARE = """
import torch
from transformers import AutoModel, AutoModelForCausalLM
ids = torch.load("ids.pt")
for folder in {folders}:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    body = AutoModel.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        torch.save(model(input_ids=ids, use_cache=False).logits, folder + "-logits.pt")
        same = torch.equal(body(ids)[0], model.base_model(ids)[0])
    assert same and type(body) is type(model.base_model), type(body)
    torch.save(model.generate(ids, max_new_tokens=7, do_sample=False), folder + "-tokens.pt")
model.save_pretrained("again")
again = AutoModelForCausalLM.from_pretrained("again", trust_remote_code=True, dtype="bfloat16")
print(again.dtype, again.config.infini == model.config.infini)
from pathlib import Path
from safetensors.torch import load_file, save_file
weights, config = Path("again/model.safetensors"), Path("again/config.json")
tensors = load_file(weights)
tensors.pop("lm_head.weight")
save_file(tensors, weights, {{"format": "pt"}})
for rule in ("linear", "../x"):
    config.write_text(config.read_text().replace('rule": "linear"', f'rule": "{{rule}}"'))
    try:
        AutoModelForCausalLM.from_pretrained("again", trust_remote_code=True)
    except ValueError as error:
        print(error)
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> tuple[Path, dict[str, PreTrainedModel]]:
    """Folders of both families and insertions, and the models that they were made from."""
    top, models = tmp_path_factory.mktemp("exported"), {}
    for family in FAMILIES:
        for form in FORMS:
            name = f"{family}-{form}"
            models[f"open-{name}"] = make_retrofit(top / name, family, **FORMS[form])
            export(top / name / "models", top / f"open-{name}")
    return top, models


@pytest.fixture(scope="module")
def said_alone(exported) -> str:
    """Open every folder where this project is not, save what it computes, run a card's example."""
    top, models = exported
    torch.save(random_ids(200, 2, 17), top / "ids.pt")
    card = (top / "open-llama-published" / "README.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    return run_alone(top, COMPARE.format(folders=list(models)) + example)


def run_alone(folder: Path, body: str) -> str:
    """Run a program in a process that finds nothing of this project."""
    program = PROGRAM.format(blocked=BLOCKED, body=body)
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    env |= {"HF_HOME": str(folder / "hub"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-I", "-c", program]
    run = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_process_without_this_project_computes_the_same_bit_by_bit(
    family, form, exported, said_alone
):
    top, models = exported
    name = f"open-{family}-{form}"
    model, ids = models[name], torch.load(top / "ids.pt")
    enable_generation(model, infini_params(**FORMS[form]))
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
    assert torch.equal(torch.load(top / f"{name}-logits.pt"), logits)
    tokens = model.generate(ids, max_new_tokens=7, do_sample=False)
    assert torch.equal(torch.load(top / f"{name}-tokens.pt"), tokens)


def test_what_was_opened_there_can_be_saved_and_the_card_s_example_runs(said_alone):
    is_same, *refused = said_alone.splitlines()[:3]
    assert is_same == "torch.bfloat16 True"
    assert re.match(r"lm_head\.weight of the weights of again is missing: download", refused[0])
    assert re.match(r"config\.json: infini\.update_rule must be .* got '\.\./x': d", refused[1])
    assert re.search(
        r"^torch\.Size\(\[1, \d+, 277\]\)\nThe memory of a text is", said_alone, re.MULTILINE
    )


def test_the_folder_is_complete_and_others_can_read_it(exported):
    top, _ = exported
    folder = top / "open-gpt_neox-parallel"
    config = json.loads((folder / "config.json").read_text())
    assert (config["infini"]["insertion"], config["other_layers"]) == ("parallel", "segment")
    names = set(load_file(folder / "model.safetensors"))
    assert "gpt_neox.layers.0.attention.infini.q_proj.weight" in names
    for name in ("tokenizer.json", "modeling.py", "README.md", "manifest.json", "shapes.py"):
        assert (folder / name).is_file()
    (top / "usual").touch()
    usual = (top / "usual").stat().st_mode
    assert {path.stat().st_mode for path in folder.iterdir()} == {usual}


def test_an_existing_folder_is_refused_before_anything_is_loaded(exported, monkeypatch):
    top, _ = exported
    monkeypatch.setattr(exported_folder, "load_retrofit", pytest.fail)
    with pytest.raises(SystemExit, match=r"open-gpt_neox-parallel must be a new folder, got one"):
        export(top / "llama-published" / "models", top / "open-gpt_neox-parallel")


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_of_peft_finds_its_projections_by_default(family, exported):
    folder = exported[0] / f"open-{family}-published"
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    inject_adapter_in_model(LoraConfig(), model)
    names = [name for name, _ in model.named_parameters() if ".lora_" in name]
    # Of three layers the middle one is the base's own, confined when the model was opened.
    assert {name.split(".lora_")[0][-6:] for name in names} == {"q_proj", "v_proj"}
    assert len(names) == 2 * 2 * 3
