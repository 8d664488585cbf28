"""The lm-evaluation-harness gives this project's own numbers, on texts longer than a piece."""

import importlib.util
import json
import math
import re
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from infini_retrofit.layer.state import State
from infini_retrofit.model.running import run_folded
from infini_retrofit.pipeline.guard import run_stage
from infini_retrofit.scoring.score import next_token_nlls
from tests.tiny import FAMILIES
from tests.tiny_export import make_retrofit

if importlib.util.find_spec("lm_eval") is None:
    pytest.skip("lm_eval is not installed: pip install lm-eval==0.4.13", allow_module_level=True)

import datasets
from lm_eval.api.instance import Instance

from infini_retrofit.share import lm_eval as harness
from infini_retrofit.share.lm_eval import InfiniLM

TASKS = Path(__file__).parent.parent / "eval_tasks"
SEGMENT = 16
WORDS = "the quick brown fox jumps over the lazy dog and the river sleeps. "
TEXT = "".join(f"{number} {WORDS}" for number in range(5, 12))


@pytest.fixture(params=FAMILIES)
def lm(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> InfiniLM:
    """A tiny retrofit as the harness loads it, with few segments in a piece."""
    monkeypatch.setattr(harness, "SEGMENTS_PER_PIECE", 2)
    form = {"layers": [0, 2], "segment_length": SEGMENT, "local_context": 4}
    make_retrofit(tmp_path, request.param, **form)
    models = tmp_path / "models"
    arguments = f"retrofit={models}/finetuned,base={models}/base,dtype=float32"
    return InfiniLM.create_from_arg_string(arguments, {"batch_size": 1, "device": "cuda:0"})


def rolling(lm: InfiniLM, text: str) -> float:
    (score,) = lm.loglikelihood_rolling(
        [Instance("loglikelihood_rolling", {}, (text,), 0)], disable_tqdm=True
    )
    return score


def whole_nlls(lm: InfiniLM, text: str) -> torch.Tensor:
    """Score a text folded in one call, its last segment filled up."""
    ids = torch.tensor(lm.tok_encode(text))
    full = torch.cat([ids, ids.new_zeros(-len(ids) % SEGMENT)])
    hidden_states = run_folded(lm.model, full[None], SEGMENT)[0, : len(ids)]
    return next_token_nlls(lm.model, ids, hidden_states).double()


@pytest.mark.parametrize("length", [0, 1, 40, len(TEXT)])
def test_a_text_of_any_length_scores_as_in_one_call(lm, length):
    expected = -whole_nlls(lm, TEXT[:length]).sum().item() if length > 1 else 0.0
    assert rolling(lm, TEXT[:length]) == pytest.approx(expected, rel=1e-6)


def test_it_would_show_if_a_piece_forgot_the_one_before(lm, monkeypatch):
    monkeypatch.setattr(State, "next", lambda state: State())
    expected = -whole_nlls(lm, TEXT).sum().item()
    assert rolling(lm, TEXT) != pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("length", [0, 30, 300])
def test_a_continuation_is_scored_after_all_of_its_context(lm, length):
    context = TEXT[:length].rstrip()
    continuation = TEXT[len(context) :][:9]
    request = Instance("loglikelihood", {}, (context, continuation), 0)
    ((score, _),) = lm.loglikelihood([request], disable_tqdm=True)
    prefix = context or lm.tokenizer.eos_token
    ids = lm.tokenizer.encode(prefix, add_special_tokens=False)
    nlls = whole_nlls(lm, prefix + continuation)[len(ids) - 1 :]
    assert score == pytest.approx(-nlls.sum().item(), rel=1e-6)


def test_a_continuation_is_greedy_if_each_of_its_tokens_is_the_likeliest(lm):
    context = lm.tok_encode(TEXT[:100])
    full = torch.tensor(context + [0] * (-len(context) % SEGMENT))
    last = run_folded(lm.model, full[None], SEGMENT)[0, len(context) - 1]
    likeliest = int((lm.model.get_output_embeddings().weight @ last).argmax())
    requests = [(("", ""), context, [word]) for word in (likeliest, likeliest - 1)]
    answers = lm._loglikelihood_tokens(requests, disable_tqdm=True)
    assert [is_greedy for _, is_greedy in answers] == [True, False]
    assert answers[0][0] > answers[1][0]


@pytest.mark.filterwarnings("default")  # of the harness's dependencies
def test_our_tasks_ask_about_the_project_s_articles(lm, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(harness, "SEGMENTS_PER_PIECE", 64)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    texts = [9 * TEXT, TEXT]
    Path("data/wikitext").mkdir(parents=True)
    pq.write_table(pa.table({"text": texts}), "data/wikitext/test.parquet")
    model = "--model infini --model_args retrofit=models/finetuned,base=models/base,dtype=float32"
    tasks = f"--include_path {TASKS} --tasks article_perplexity,article_last_word"
    monkeypatch.setattr(sys, "argv", f"harness {model} {tasks} --output_path out".split())
    run_stage(harness.main)
    (written,) = Path("out").rglob("results*.json")
    results = json.loads(written.read_text())["results"]
    assert "word_perplexity" in capsys.readouterr().out
    nll = sum(whole_nlls(lm, text).sum().item() for text in texts)
    expected = math.exp(nll / sum(len(re.split(r"\s+", text)) for text in texts))
    found = results["article_perplexity"]["word_perplexity,none"]
    assert found == pytest.approx(expected, rel=1e-6)

    last_word = re.compile(" sleeps[.] ").search(texts[0], 4000)
    assert last_word
    before, word = texts[0][: last_word.start()], " sleeps"
    nlls = whole_nlls(lm, before + word)[len(lm.tok_encode(before)) - 1 :]
    found = results["article_last_word"]["perplexity,none"]
    assert math.log(found) == pytest.approx(nlls.sum().item(), rel=1e-6)
