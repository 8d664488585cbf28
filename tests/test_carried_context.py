"""The command that prices carried keys and values, on a tiny base."""

import json
import math
from pathlib import Path

import pytest

from analysis import carried_context
from infini_retrofit.scoring.score import Score
from tests.tiny_project import SEGMENT


def table(said: str) -> dict[str, list[str]]:
    """Return the rows of the last table by their first cell."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in said.splitlines()[2:]]
    return {row[0]: row[1:] for row in rows}


def test_rows_say_what_is_won_of_the_gap_between_nothing_and_everything():
    scores = [(0, 0, Score(30.0, 10)), (4, 480, Score(26.0, 10))]
    rows = carried_context.rows_of(scores, full=Score(20.0, 10))
    assert rows[1] == ["4", "480", f"{math.exp(2.6):.2f}", "0.4000", "40.0%"]
    assert [row[0] for row in rows] == ["0", "4", "full attention"]
    assert rows[0][3:] == ["0.0000", "0.0%"]
    assert rows[2][3:] == ["1.0000", "100.0%"]


@pytest.mark.parametrize("model", ["base", "control", "finetuned"])
def test_its_numbers_are_those_of_the_protocols(model, finished, monkeypatch, capsys):
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


def test_more_tokens_than_a_segment_are_refused(finished, monkeypatch):
    monkeypatch.chdir(finished["linear"])
    message = rf"--tokens must be at most infini\.segment_length={SEGMENT}, got {SEGMENT + 1}"
    with pytest.raises(ValueError, match=message):
        carried_context.main(["--tokens", str(SEGMENT + 1)])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--documents 0", "--documents must be at least 1 document, got 0"),
        ("--tokens 3 -1", "--tokens must be at least 0 tokens, got -1"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(words, message, capsys):
    with pytest.raises(SystemExit):
        carried_context.main(words.split())
    assert message in capsys.readouterr().err
