"""The programs that score models, on tiny ones: each number is that of a protocol or a loop."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from analysis import carried_context, fixed_share, memory_reach, zero_cost
from analysis.programs import BASE, DOCUMENTS
from infini_retrofit.layer.form import InfiniParams
from infini_retrofit.model.base import load_base
from infini_retrofit.model.checkpoints import load_retrofit
from infini_retrofit.model.retrofit import infini_modules
from infini_retrofit.model.running import run_folded, run_in_layer
from infini_retrofit.pipeline.device import pick_device, pick_dtype
from infini_retrofit.pipeline.params import load_section, read_params
from infini_retrofit.pipeline.tokens import read_documents
from infini_retrofit.scoring.score import Score, next_token_nlls
from recipes.overlays import recipe_names
from tests.tiny_project import SEGMENT, TOKENS_PER_DOCUMENT

LAST = TOKENS_PER_DOCUMENT // SEGMENT - 1  # as many segments stand before the last one
RETROFIT, CONTROL = Path("models/finetuned"), Path("models/control")


def table(said: str) -> dict[str, list[str]]:
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in said.splitlines()[2:]]
    return {row[0]: row[1:] for row in rows}


@pytest.mark.parametrize(
    ("program", "words", "message"),
    [
        (memory_reach, "--documents 0", "--documents: must be at least 1 document, got 0"),
        (memory_reach, "--segments 1 -1", "--segments: must be at least 0 segments, got -1"),
        (fixed_share, "--documents 1", "--documents: must be at least 2 documents, got 1"),
        (fixed_share, "--shares 0.1 1", "below 1"),
    ],
)
def test_a_number_that_is_too_small_or_too_large_is_refused(program, words, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        program.main(words.split())
    assert message in capsys.readouterr().err


def test_carried_tokens_are_told_by_the_share_of_the_gap_that_they_win():
    scores = [(0, 0, Score(30.0, 10)), (4, 480, Score(26.0, 10))]
    rows = list(carried_context.make_rows(scores, full=Score(20.0, 10)))
    assert rows[0][3:] == ["0.0000", "0.0%"]
    assert rows[1] == ["4", "480", f"{math.exp(2.6):.2f}", "0.4000", "40.0%"]
    assert (rows[2][0], rows[2][3:]) == ("full attention", ["1.0000", "100.0%"])


@pytest.mark.parametrize("model", ["base", "control", "finetuned"])
def test_scores_with_carried_tokens_are_those_of_the_protocols(
    model, finished, monkeypatch, capsys
):
    monkeypatch.chdir(finished["linear"])
    rival = json.loads(Path("data/rival.json").read_text())["num_tokens"]
    words = [f"models/{model}", "--tokens", str(SEGMENT), str(rival), "--documents", "3"]
    carried_context.main(words)
    rows = table(capsys.readouterr().out)
    assert list(rows) == ["0", str(rival), str(SEGMENT), "full attention"]
    sizes = [int(rows[name][0].replace(",", "")) for name in list(rows)[:3]]
    assert sizes[0] == 0 < sizes[1] / rival == sizes[2] / SEGMENT
    metrics = json.loads(Path("metrics/eval_sliding.json").read_text())[model]
    names = {"0": "segment_off", str(rival): "segment_kv", "full attention": "full"}
    for row, protocol in names.items():
        assert float(rows[row][1]) == pytest.approx(metrics[f"{protocol}_test_ppl"], abs=6e-3)
    with pytest.raises(ValueError, match=f"the {SEGMENT} tokens of a segment, got {SEGMENT + 1}"):
        carried_context.main(["--tokens", str(SEGMENT + 1)])


def test_a_memory_that_is_off_is_the_control_itself_and_a_share_changes_it(
    finished, monkeypatch, capsys
):
    monkeypatch.chdir(finished["published"])
    fixed_share.main([str(CONTROL), "--shares", "0.000001", "0.3", "--documents", "3"])
    rows = table(capsys.readouterr().out)
    assert list(rows) == ["off", "1e-06", "0.3"]
    metrics = json.loads(Path("metrics/eval_sliding.json").read_text())
    off = float(rows["off"][0])
    assert off == pytest.approx(metrics["control"]["segment_test_ppl"], abs=6e-3)
    assert [float(rows["1e-06"][i]) for i in (0, 2)] == pytest.approx([off, off], abs=1e-2)
    own, own_won, other, other_won = map(float, rows["0.3"])
    assert len({own, other, off}) == 3
    assert (own_won > 0, other_won > 0) == (own < off, other < off)


def test_a_control_gets_a_memory_of_the_share_asked_for_and_keeps_its_weights(
    finished, monkeypatch
):
    monkeypatch.chdir(finished["published"])
    form = load_section(InfiniParams, "infini")
    made = fixed_share.insert_memory(CONTROL, form, torch.float32)
    trained = load_retrofit(BASE, CONTROL, torch.float32)[0].state_dict()
    assert trained.keys() < made.state_dict().keys()
    assert all(torch.equal(made.state_dict()[name], value) for name, value in trained.items())
    for module in infini_modules(made).values():
        shares = torch.sigmoid(module.memory_parameters()["gate"][0])
        assert torch.allclose(shares, torch.tensor(0.3))
    with pytest.raises(ValueError, match=r"models/finetuned must be a model without a memory"):
        fixed_share.main([str(RETROFIT)])
    with pytest.raises(ValueError, match=r"context must be 4, as models/control has it, got 0$"):
        fixed_share.insert_memory(CONTROL, replace(form, local_context=0), torch.float32)
    monkeypatch.chdir(finished["linear"])
    for model in ([], [str(CONTROL)]):
        with pytest.raises(ValueError, match=r"infini\.init must be base, so that the base stays"):
            fixed_share.main(model)


@pytest.mark.parametrize("name", ["linear", "published"])
def test_the_longest_reach_of_the_last_segment_is_the_whole_document(
    name, finished, monkeypatch, capsys
):
    monkeypatch.chdir(finished[name])
    words = ["--segments", "0", str(LAST), "--scored", "1", "--documents", "3"]
    memory_reach.main(words)
    found = table(capsys.readouterr().out)
    model = load_retrofit(BASE, RETROFIT, pick_dtype(pick_device()))[0]
    ids = read_documents(DOCUMENTS, model.config.vocab_size, 3)
    with torch.inference_mode():
        whole = (
            run_folded(model, ids, SEGMENT),
            run_in_layer(model, ids, segment_length=len(ids[0])),
        )
    for states, cell in zip(whole, (0, 3), strict=True):
        pairs = zip(ids, states, strict=True)
        nlls = [next_token_nlls(model, i[-SEGMENT:], h[-SEGMENT:]).mean() for i, h in pairs]
        expected = math.exp(torch.stack(nlls).mean().item())
        assert float(found[str(LAST)][cell]) == pytest.approx(expected, rel=2e-3)
    won = math.log(float(found["0"][0]) / float(found[str(LAST)][0]))
    assert float(found[str(LAST)][1]) == pytest.approx(won, abs=2e-3)
    assert found["0"][1:3] == found["0"][4:] == ["", ""]
    with pytest.raises(ValueError, match=f"the {LAST + 1} segments of a .*, got {LAST} and 2"):
        memory_reach.main(["--segments", str(LAST), "--scored", "2"])


def test_a_reach_of_one_segment_is_a_document_of_two(finished, monkeypatch):
    monkeypatch.chdir(finished["published"])
    model = load_retrofit(BASE, RETROFIT, torch.float32)[0]
    documents = read_documents(DOCUMENTS, model.config.vocab_size, 2)
    found, one, whole = (
        memory_reach.score_reach(model, documents, SEGMENT, reach, 1)[0] for reach in (1, 0, LAST)
    )
    with torch.inference_mode():
        states = run_folded(model, documents[:, -2 * SEGMENT :], SEGMENT)
    for row, hidden, nll in zip(documents, states, found, strict=True):
        expected = next_token_nlls(model, row[-SEGMENT:], hidden[-SEGMENT:]).mean()
        assert nll.item() == pytest.approx(expected.item(), abs=1e-5)
    assert (found - one).abs().min() > 1e-4
    assert (found - whole).abs().min() > 1e-4


def test_every_reach_scores_the_same_tokens_and_without_a_memory_alike(finished, monkeypatch):
    monkeypatch.chdir(finished["linear"])
    read, model = [], load_base(BASE, torch.float32)
    documents = read_documents(DOCUMENTS, model.config.vocab_size, 2)
    monkeypatch.setattr(
        memory_reach,
        "next_token_nlls",
        lambda model, ids, states: read.append(ids.tolist()) or next_token_nlls(model, ids, states),
    )
    (none, full), (far, further) = (
        memory_reach.score_reach(model, documents, SEGMENT, reach, 2) for reach in (0, 2)
    )
    expected = [row.tolist() for document in documents for row in document.split(SEGMENT)[-2:]]
    assert read == 4 * expected  # two reaches, each cut and with full attention
    assert torch.allclose(none, full, atol=1e-5)  # a segment alone: there is no border
    assert torch.allclose(far, none, atol=1e-5)
    assert (further - full).abs().max() > 1e-3


def test_every_recipe_of_this_base_has_its_form():
    forms = zero_cost.forms_of(recipe_names(), read_params())
    assert set(recipe_names()) - set(forms) == {"passkey-mini", "scratch"}
    assert forms["memory-only"].decay == "feature"
    assert forms["control"].layers == []
    with pytest.raises(ValueError, match="a recipe must be one of"):
        zero_cost.forms_of(["nope"], read_params())


def test_a_memory_that_is_off_costs_nothing_and_one_that_is_on_shows(finished, monkeypatch, capsys):
    monkeypatch.chdir(finished["linear"])
    zero_cost.main(["infini-all", "parallel"])
    said = capsys.readouterr()
    assert said.err.count("computing on") == 1
    rows = table(said.out)
    off, own = ({name: float(row[i]) for name, row in rows.items()} for i in (2, 4))
    assert off["infini-all"] == off["parallel"] == own["parallel"] == 1
    assert abs(own["infini-all"] - 1) > 1e-4
