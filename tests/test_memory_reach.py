"""The command that scores a memory from ever earlier beginnings of a document, on a tiny base."""

import math
from pathlib import Path

import pytest
import torch

from analysis import memory_reach
from infini_retrofit.model.base import load_base
from infini_retrofit.model.checkpoints import load_retrofit
from infini_retrofit.model.running import run_folded, run_in_layer
from infini_retrofit.pipeline.device import pick_device, pick_dtype
from infini_retrofit.pipeline.tokens import read_documents
from infini_retrofit.scoring.labels import next_token_nlls
from tests.test_carried_context import table
from tests.tiny_project import SEGMENT, TOKENS_PER_DOCUMENT

LAST = TOKENS_PER_DOCUMENT // SEGMENT - 1  # as many segments stand before the last one


@pytest.mark.parametrize("name", ["linear", "published"])
def test_the_longest_reach_of_the_last_segment_is_the_whole_document(
    name, finished, monkeypatch, capsys
):
    monkeypatch.chdir(finished[name])
    words = ["--segments", "0", str(LAST), "--scored", "1", "--documents", "3"]
    memory_reach.main(words)
    found = table(capsys.readouterr().out)
    dtype = pick_dtype(pick_device())
    model = load_retrofit(memory_reach.BASE, Path("models/finetuned"), dtype)[0]
    ids = read_documents(memory_reach.DOCUMENTS, 3)
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


def test_a_reach_of_one_segment_is_a_document_of_two(finished, monkeypatch):
    monkeypatch.chdir(finished["published"])
    model = load_retrofit(memory_reach.BASE, Path("models/finetuned"), torch.float32)[0]
    documents = read_documents(memory_reach.DOCUMENTS, 2)
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


def test_without_a_memory_nothing_is_won_by_reading_more(finished, monkeypatch):
    monkeypatch.chdir(finished["linear"])
    model = load_base(memory_reach.BASE, torch.float32)
    documents = read_documents(memory_reach.DOCUMENTS, 3)
    none, full = memory_reach.score_reach(model, documents, SEGMENT, 0, 2)
    assert torch.allclose(none, full, atol=1e-5)  # a segment alone: there is no border
    far, further = memory_reach.score_reach(model, documents, SEGMENT, 2, 2)
    assert torch.allclose(far, none, atol=1e-5)
    assert (further - full).abs().max() > 1e-3


def test_the_same_tokens_are_scored_at_every_reach(finished, monkeypatch):
    monkeypatch.chdir(finished["linear"])
    documents = read_documents(memory_reach.DOCUMENTS, 2)
    read, model = [], load_base(memory_reach.BASE, torch.float32)
    scorer = memory_reach.next_token_nlls
    monkeypatch.setattr(
        memory_reach,
        "next_token_nlls",
        lambda model, ids, states: read.append(ids.tolist()) or scorer(model, ids, states),
    )
    for reach in (0, 2):
        memory_reach.score_reach(model, documents, SEGMENT, reach, 2)
    expected = [row.tolist() for document in documents for row in document.split(SEGMENT)[-2:]]
    assert read == 4 * expected  # two reaches, each cut and with full attention


def test_more_segments_than_a_document_has_are_refused(finished, monkeypatch):
    monkeypatch.chdir(finished["linear"])
    message = f"at most the {LAST + 1} segments of a document, got {LAST} and 2"
    with pytest.raises(ValueError, match=message):
        memory_reach.main(["--segments", str(LAST), "--scored", "2"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--documents 0", "--documents must be at least 1 document, got 0"),
        ("--scored 0", "--scored must be at least 1 segment, got 0"),
        ("--segments 1 -1", "--segments must be at least 0 segments, got -1"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(words, message, capsys):
    with pytest.raises(SystemExit):
        memory_reach.main(words.split())
    assert message in capsys.readouterr().err
