"""The command that scores untrained memories of fixed shares, on a tiny base."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from analysis import fixed_share
from infini_retrofit.layer.form import InfiniParams
from infini_retrofit.model.checkpoints import load_retrofit
from infini_retrofit.model.retrofit import infini_modules
from infini_retrofit.pipeline.params import load_section
from tests.test_carried_context import table


def test_off_is_the_control_itself_and_a_share_changes_it(finished, monkeypatch, capsys):
    monkeypatch.chdir(finished["published"])
    fixed_share.main(["models/control", "--shares", "0.000001", "0.3", "--documents", "3"])
    rows = table(capsys.readouterr().out)
    assert list(rows) == ["off", "1e-06", "0.3"]
    metrics = json.loads(Path("metrics/eval_sliding.json").read_text())
    off = float(rows["off"][0])
    assert off == pytest.approx(metrics["control"]["segment_test_ppl"], abs=6e-3)
    assert [float(rows["1e-06"][i]) for i in (0, 2)] == pytest.approx([off, off], abs=1e-2)
    own, own_won, other, other_won = map(float, rows["0.3"])
    assert len({own, other, off}) == 3
    assert (own_won > 0, other_won > 0) == (own < off, other < off)


def test_the_control_s_weights_get_a_memory_of_the_share_asked_for(finished, monkeypatch):
    monkeypatch.chdir(finished["published"])
    form = replace(load_section(InfiniParams, "infini"), initial_memory_share=0.3)
    control = Path("models/control")
    made = fixed_share.put_memory(control, form, torch.float32)
    trained = load_retrofit(fixed_share.BASE, control, torch.float32)[0].state_dict()
    assert trained.keys() < made.state_dict().keys()
    assert all(torch.equal(made.state_dict()[name], value) for name, value in trained.items())
    for module in infini_modules(made).values():
        shares = torch.sigmoid(module.memory_parameters()["gate"][0])
        assert torch.allclose(shares, torch.tensor(0.3))


def test_a_form_that_is_no_memory_beside_the_control_is_refused(finished, monkeypatch):
    monkeypatch.chdir(finished["linear"])
    for model in ([], ["models/control"]):
        with pytest.raises(ValueError, match=r"infini\.init must be that of the base, base, got"):
            fixed_share.main(model)


def test_a_model_with_a_memory_is_refused(finished, monkeypatch):
    monkeypatch.chdir(finished["published"])
    with pytest.raises(ValueError, match=r"models/finetuned must be a model without a memory"):
        fixed_share.main(["models/finetuned"])
    form = replace(load_section(InfiniParams, "infini"), local_context=0)
    with pytest.raises(ValueError, match=r"local_context must be that of models/control, 4, got 0"):
        fixed_share.put_memory(Path("models/control"), form, torch.float32)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--documents 1", "--documents must be at least 2 documents, got 1"),
        ("--shares 0.1 1", "--shares must be above 0 and below 1, got 0.1 1.0"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(words, message, capsys):
    with pytest.raises(SystemExit):
        fixed_share.main(words.split())
    assert message in capsys.readouterr().err
