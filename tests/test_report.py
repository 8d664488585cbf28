"""Stage `report`: the verdict for each sign, the summary, the page and the continuations."""

import base64
import json
import math
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch

from analysis.report import setting
from analysis.report.continuations import Prefix, continue_retrofit
from analysis.report.page import Report, as_html, as_markdown
from analysis.report.results import Results, read_results
from analysis.report.table import summary_table
from analysis.report.verdict import gains, summarize, verdict
from infini_retrofit.layer.form import InfiniParams
from infini_retrofit.model.retrofit import insert_infini
from tests.tiny import tiny_model
from tests.tiny_project import metrics_of, run_stage

KEYS = {"base", "control", "full", "gain", "kv", "off", "own", "ppl", "sliding"}
PPLS = {
    "base": {"segment": 30.0, "full": 20.0, "sliding": 25.0, "segment_kv": 28.0},
    "control": {"segment": 29.0, "full": 19.0, "sliding": 24.0, "segment_kv": 27.0},
    "finetuned": {"full": 19.5, "sliding": 24.5, "segment_kv": 27.5, "segment_off": 29.5}
    | {"segment_swapped": 31.0},
}
ALL_TRAINED = {
    "infini": {
        **{"segment_length": 16, "init": "base", "local": "softmax", "positions": "rope"},
        "local_context": 0,
    },
    "distill": {"epochs": 0, "trainable": "infini"},
    "finetune": {"trainable": "attention"},
}


def measured(segment: float, articles: int = 12, spread: float = 0.0, **changes: float) -> Results:
    """Return results; of the finetuned every other document is better by `spread`, others worse."""
    ppls = PPLS | {"finetuned": PPLS["finetuned"] | {"segment": segment, **changes}}
    scores = {m: {f"{name}_test_ppl": x for name, x in of.items()} for m, of in ppls.items()}
    rows = [
        {"model": model, "protocol": protocol, "document": i, "article": i, "nll": math.log(ppl)}
        for model, of in ppls.items()
        for protocol, ppl in of.items()
        for i in range(articles)
    ]
    for row in rows:
        if (row["model"], row["protocol"]) == ("finetuned", "segment"):
            row["nll"] += spread * (-1) ** row["document"]
    scores["finetuned"]["num_articles"] = articles
    return Results(scores, {}, pd.DataFrame(rows), pd.DataFrame(), pd.DataFrame(), ALL_TRAINED)


def with_memory_alone_trained(results: Results, **infini: object) -> Results:
    params = {name: dict(section) for name, section in ALL_TRAINED.items()}
    params["finetune"]["trainable"] = "memory"
    params["infini"] |= infini
    return replace(results, params=params)


@pytest.mark.parametrize(
    ("segment", "spread", "articles", "begin"),
    [
        (26.0, 0.0, 12, "The memory helps: perplexity 26.00 in segments of 16 tokens, better than"),
        (32.0, 0.0, 12, "The memory harms: perplexity 32.00 in segments of 16 tokens, worse than"),
        (28.5, 0.5, 12, "Undecided whether the memory helps: "),
        (29.2, 0.0, 12, "The memory helps its own model, which is no better than its control: "),
        (26.0, 0.0, 3, "The memory seems to help: "),
        (32.0, 0.0, 3, "The memory seems to harm: "),
        (29.501, 0.0, 3, "Undecided whether the memory helps: "),
    ],
)
def test_the_verdict_asks_for_a_gain_over_itself_and_over_the_control(
    segment, spread, articles, begin
):
    sentence = verdict(measured(segment, articles, spread))
    assert sentence.startswith(begin)
    assert ("too few for intervals" in sentence) == (articles == 3)
    assert ("Judged by 95% intervals over 12 articles." in sentence) == (articles == 12)


def test_each_rival_is_named_with_its_own_relation():
    sentence = verdict(measured(27.7))
    better, worse = sentence.split("better than ")[1].split("; worse than ")
    assert better == "its trained control (29.00) and itself with the memory off (29.50)"
    assert worse.startswith(
        "equal bytes of keys and values (27.00) and full attention (19.00). Judged"
    )
    assert "not told apart from its trained control (29.00)" in verdict(measured(29.0))


def test_where_only_the_memory_was_trained_the_rivals_are_the_base_s():
    results = with_memory_alone_trained(measured(29.2, segment_off=30.0, segment_kv=28.0))
    sentence = verdict(results)
    assert "The memory helps: perplexity 29.20" in sentence
    assert "its untouched base (30.00)" in sentence
    assert "equal bytes of keys and values (28.00)" in sentence
    assert "full attention (20.00)" in sentence
    plain, trained = measured(27.7, segment_kv=28.0), with_memory_alone_trained
    assert gains(trained(plain))["kv"].nats > 0 > gains(plain)["kv"].nats
    # Beside carried tokens the model without its memory is not the base.
    sentence = verdict(trained(measured(29.2, segment_off=29.5), local_context=8))
    assert "The memory helps: perplexity 29.20" in sentence
    assert "itself with the memory off (29.50)" in sentence
    # But beside a branch that is a memory alone, the base's attention has that window.
    branch = {"init": "random_attention", "local": "none", "local_context": 16}
    sentence = verdict(trained(measured(29.2, segment_off=30.0), **branch))
    assert "29.20 in a window of 16 to 32 tokens, better than its untouched base" in sentence


def test_a_model_without_a_memory_is_told_as_one():
    results = measured(28.0, segment_off=28.0)
    assert verdict(results).startswith("The model has no memory: perplexity 28.00")
    assert summary_table(results)[1][2][3] == "-"


def test_the_summary_is_flat_and_short():
    few, many = summarize(measured(27.7, 3)), summarize(measured(27.7))
    assert few.keys() == KEYS
    assert many.keys() == KEYS | {"low", "high"}
    assert many["low"] <= many["gain"] <= many["high"]
    assert many["gain"] == 0.046
    assert (few["ppl"], few["kv"], few["full"]) == (27.7, 27.0, 19.0)
    # DVC writes the path of the file, then each value after four spaces.
    width = sum(4 + max(len(key), len(f"{value:.2f}")) for key, value in many.items())
    assert len("metrics/summary.json") + width <= 120


def test_the_stage_reports_a_finished_project(project):
    table = metrics_of(project, "eval_sliding")
    summary = metrics_of(project, "summary")
    assert summary.keys() == KEYS
    assert summary["ppl"] == round(table["finetuned"]["segment_test_ppl"], 2)
    text, page = (Path(f"report/{name}").read_text() for name in ("report.md", "index.html"))
    results = read_results(lambda path: Path(path).read_text())
    headings = ("Recall in long texts", "What was trained")
    for shown in (verdict(results), "memory swapped", *headings, "prepare_wikitext"):
        assert shown in text
        assert shown in page
    assert len(re.findall("<img ", page)) == 7
    # It opens without internet.
    assert not re.search(r"""(src|href)\s*=\s*(?!["']?data:)|url\(|@import|https?://""", page)


def test_curves_are_read_from_each_stage_or_from_the_rows_of_all(project):
    def read(path: str) -> str:
        return Path(path).read_text()

    curves = read_results(read).curves
    assert list(curves.columns) == ["model", "text", "epoch", "ppl"]
    epochs = curves.groupby("model").epoch.agg(list).to_dict()
    assert epochs == {
        "distilled": [0, 1, 2, 3],
        "finetuned": [0, 1, 2],
        "control": [0, 1, 2],
        "base": [0, 3],
    }
    assert curves.set_index("model").ppl["base"].nunique() == 1
    for stage in ("distill", "finetune", "finetune_control"):
        Path(f"plots/{stage}.tsv").unlink()
    pd.testing.assert_frame_equal(read_results(read).curves, curves)


def test_seconds_are_those_noted_here_and_the_table_ends_on_the_terminal(project, capsys):
    setting.SECONDS.mkdir(parents=True)
    (setting.SECONDS / "distill").write_text("31.4\n")
    (setting.SECONDS / "eval_longcontext.base").write_text("0.0025\n")
    before = {path: path.read_bytes() for path in Path("metrics").iterdir()}
    run_stage("report")
    shown = capsys.readouterr().out
    assert ("| finetuned " in shown, "## " in shown) == (True, False)
    lines = [line.split() for line in Path("report/report.md").read_text().splitlines()]
    assert ["|", "distill", "|", "31", "|"] in lines
    assert ["|", "finetune", "|", "-", "|"] in lines
    texts = svg_texts(Path("report/index.html").read_text(), "Loss by position in the document")
    assert any(re.fullmatch(r"base: \d+\.\d MB, 2\.5 ms", text) for text in texts)
    assert any(re.fullmatch(r"yarn: \d+\.\d MB", text) for text in texts)
    assert before == {path: path.read_bytes() for path in Path("metrics").iterdir()}


def test_a_map_says_what_each_model_was_asked_and_each_task_has_a_panel():
    columns = ["model", "haystack", "tokens", "depth", "accuracy", "greedy", "num_asked"]
    cells = [("base", "text", 1024, 0.5, 0.7, 0.3, 10), ("control", "text", 8192, 0.5, 0.5, 0.0, 2)]
    tasks = ("capacity", "needles", "compressions")
    recalled = [("base", task, 4, 0.5, 0.0) for task in tasks]
    results = replace(
        measured(27.7),
        grid=pd.DataFrame(cells, columns=columns),
        recalled=pd.DataFrame(recalled, columns=["model", "task", "number", "accuracy", "greedy"]),
    )
    page = as_html(Report("long", results))
    found = Counter(svg_texts(page, "A pass key in a long prompt"))
    assert found["7 of 10 (3)"] == found["1 of 2 (0)"] == 1
    assert found["not asked"] == 2  # the base at 8,192 tokens, the control at 1,024
    found = svg_texts(page, "Recall by what was stored since")
    assert {"numbers stored", "segments since the pass key", "base"} <= set(found)
    assert "segments, equal distance" not in found
    assert found.count("100%") == 2  # beside each line of panels; an empty one is taken away


def svg_texts(page: str, heading: str) -> list[str]:
    """Return the words of a picture."""
    encoded = re.search(f'alt="{heading}" src="data:image/svg\\+xml;base64,([^"]+)"', page)[1]
    return re.findall(r"<text [^>]*>([^<]+)</text>", base64.b64decode(encoded).decode())


def test_a_page_without_curves_and_continuations_leaves_them_out():
    report = Report("<results>", measured(27.7))
    page, text = as_html(report), as_markdown(report)
    assert "&lt;results&gt;" in page
    assert len(re.findall("<img ", page)) == 2
    assert "Continuations" not in page + text
    assert "docs/seeds.md" not in page + text
    seen = replace(report, results=measured(27.7, t2=9000.0))
    seen.results.scores["base"]["t2_test_ppl"] = 8000.0
    assert "base 8,000, finetuned 9,000" in as_html(seen)


def test_continuations_read_the_memory_that_they_are_named_after():
    form = InfiniParams(layers="all", segment_length=16, local_context=0)
    torch.manual_seed(1)
    documents = torch.randint(5, 30, (3, 64))
    documents[2, 48:] = documents[0, 48:]

    def continued(ids: torch.Tensor) -> dict[str, list[int]]:
        model = tiny_model("llama", vocab_size=40)
        insert_infini(model, form)
        for name, parameter in model.named_parameters():
            if "gate_logit" in name:
                parameter.data.fill_(3.0)  # other memories then have other likeliest tokens
        found = continue_retrofit(model.eval(), form, Prefix.of(ids, 2, 16))
        return {name: tokens.tolist() for name, tokens in found.items()}

    first = continued(documents)
    assert {len(tokens) for tokens in first.values()} == {14}
    assert first["on"] != first["off"]
    assert first["on"] != first["swapped"]
    # The memory of the other document alone: the reader's own makes no difference.
    other = documents.clone()
    other[0, :48] = torch.randint(5, 30, (48,))
    second = continued(other)
    assert second["swapped"] == first["swapped"]
    assert second["off"] == first["off"]
    assert second["on"] != first["on"]


def test_the_summary_file_is_what_the_code_makes_of_the_committed_metrics():
    root = Path(__file__).parent.parent
    results = read_results(lambda path: (root / path).read_text())
    assert json.loads((root / "metrics/summary.json").read_text()) == summarize(results)
