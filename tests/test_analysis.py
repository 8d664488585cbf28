"""What the tables, comparisons and the picture show of finished experiments."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from ruamel.yaml import YAML

from analysis import leaderboard, loading, reports
from analysis.__main__ import main
from analysis.against import compare
from analysis.comparing import describe_texts, split_comparable
from analysis.fill_tables import ON_CODE
from analysis.leaderboard import EQUAL_BYTES
from analysis.loading import load_metrics, load_scores, load_settings
from analysis.picture import draw, save
from analysis.repeats import RIVALS, check_repeats
from analysis.report.table import markdown as report_table
from analysis.table import BASE as BASE_PPL
from analysis.table import COLUMNS, SEGMENT, STATE_BYTES
from infini_retrofit.evaluation.bootstrap import paired_bootstrap
from infini_retrofit.pipeline.schema import leaves
from recipes.experiments import Experiment
from recipes.kept import REPORT, SCORES, kept_experiments
from tests.tiny_checkout import commit, make_checkout, python, store, write
from tests.tiny_project import ROOT

MODEL = {
    "full_test_ppl": 23.6,
    "segment_test_ppl": 29.1,
    "segment_off_test_ppl": 30.2,
    "segment_swapped_test_ppl": 29.9,
    "segment_kv_test_ppl": 28.8,
    "t2_test_ppl": 20118.6,
    "gap_recovered": 0.0864,
    "gain_over_control": 0.0189,
    "gain_over_kv": -0.1269,
    "state_bytes": 1497600,
}
METRICS = {
    "eval_sliding": {
        "finetuned": MODEL,
        "control": {"segment_test_ppl": 29.8, "segment_kv_test_ppl": 28.2},
    },
    "distill": {"num_trained_tokens": 262144, "val_loss": 0.17833},
    "finetune": {"num_trained_tokens": 327680, "num_trainable_parameters": 26542350},
}
BASE = {"segment_test_ppl": 30.0, "sliding_test_ppl": 25.0}
ARTICLES = [0, 0, 1, 2, 2, 2, 3, 4, 5, 6, 7, 8, 9]
DRAWN = np.random.default_rng(1).normal(3, 0.2, size=(3, 7, len(ARTICLES)))
ALWAYS = ("off", "swapped", "recent", "control", "kv")  # other rivals are scored where asked for
PROTOCOLS = ("segment", *(f"segment_{name}" for name in ALWAYS if name != "control"))


def files_of(
    metrics: Mapping = METRICS, number: int = 0, full: float = 2.5, **params: object
) -> dict[str, str]:
    texts = {f"metrics/{name}.json": json.dumps(found) for name, found in metrics.items()}
    scores = scores_of(number, full=full).drop(columns="experiment").to_csv(sep="\t", index=False)
    return texts | {SCORES: scores, "params.yaml": json.dumps(params)}


def scores_of(
    number: int,
    name: str = "",
    articles: Sequence[int] = ARTICLES,
    full: float | np.ndarray = 2.5,
    segment: float = 2.75,
) -> pd.DataFrame:
    """Make up the scores of an experiment; those of the base are equal in all, unless given."""
    *model, control, control_kv = DRAWN[number]
    nlls = {("finetuned", protocol): own for protocol, own in zip(PROTOCOLS, model, strict=True)}
    nlls |= {("control", "segment"): control, ("control", "segment_kv"): control_kv}
    base = {"full": full, "segment": segment}
    nlls |= {("base", key): np.broadcast_to(nll, len(ARTICLES)) for key, nll in base.items()}
    return pd.DataFrame(
        [
            [name, *key, document, str(article), nll]
            for key, found in nlls.items()
            for document, (article, nll) in enumerate(zip(articles, found, strict=True))
        ],
        columns=loading.COLUMNS,
    )


def joined(**parts: Mapping) -> pd.DataFrame:
    """Join the scores of several experiments, each made by `scores_of` with these arguments."""
    return pd.concat([scores_of(**{"number": 0, "name": name, **p}) for name, p in parts.items()])


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> list[list[list[str]]]:
    main(words)
    tables = re.findall(r"(?:^\|.*\n)+", capsys.readouterr().out, re.MULTILINE)
    return [
        [[cell.strip() for cell in row.split("|")[1:-1]] for row in t.split("\n")[:-1]]
        for t in tables
    ]


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_checkout(tmp_path, monkeypatch)


def keep(name: str, **files: str) -> None:
    write(**{f"results/{name}/{path}": text for path, text in {"commit": "c", **files}.items()})


def test_a_metric_has_its_column_and_what_is_missing_is_a_dash(checkout, capsys):
    rest = {key: value for key, value in METRICS.items() if key != "distill"}
    for name, metrics in (("all", METRICS), ("some", rest), ("none", {})):
        keep(name, **files_of(metrics))
    numbers = ["29.10", "29.80", "30.20", "29.90", "28.80", "8.6%", "1,497,600"]
    (table,) = shown(capsys, "table", "none", "all", "some")
    assert table[0] == ["experiment", *COLUMNS["summary"]]
    assert table[2:] == [["all", *numbers], ["some", *numbers], ["none", *["-"] * len(numbers)]]
    (table,) = shown(capsys, "table", "all", "some", "--columns", "gains")
    more = ["8.6%", "+0.0189", "-", "-", "-", "-0.1269", "1,497,600", "26,542,350"]
    assert table[2:] == [["all", *more, "589,824"], ["some", *more, "327,680"]]
    (table,) = shown(capsys, "table", "all", "--columns", "labels")
    assert table[2][1] == "0.1783"
    assert table[2][6] == "20,119"


def test_an_experiment_that_was_run_here_wins_the_newest_of_its_name(checkout, capsys, monkeypatch):
    def with_ppl(ppl: float) -> dict[str, str]:
        return files_of({"eval_sliding": {"finetuned": {"segment_test_ppl": ppl}}})

    keep("both", **with_ppl(1))
    keep("kept", **with_ppl(2))
    for day, ppl in ((2, 4), (1, 3)):
        monkeypatch.setenv("GIT_COMMITTER_DATE", f"2026-01-0{day}T00:00:00Z")
        commit()
        store("both", **with_ppl(ppl))
    main(["table", "both", "kept"])
    out, err = capsys.readouterr()
    assert re.findall(r"\| (\w+) +\| +([\d.]+) ", out) == [("kept", "2.00"), ("both", "4.00")]
    assert err == "note: 1 of 2 experiments were not run here: read from results/\n"


def test_without_names_the_finished_recipes_are_shown_the_best_first(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    tables = shown(capsys, "table")
    (shared,) = (names for names in ({row[0] for row in t} for t in tables) if "control" in names)
    assert "infini-all" in shared
    assert not {"infini-all-seed1", *ON_CODE} & shared  # no recipe; other texts
    for table in tables:
        ppls = [float(row[1]) for row in table[2:]]
        assert ppls == sorted(ppls)
    main(["table", *kept_experiments()])  # names of up to 34 characters
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert max(map(len, rows)) <= 120


def test_names_that_stand_for_nothing_are_refused(checkout):
    for command in ("table", "against", "repeats"):
        words = [command, "control", "x"]
        with pytest.raises(SystemExit, match=r"error: .* some that have not been run: control, x$"):
            main(words)
    with pytest.raises(SystemExit, match="error: table needs names of finished experiments, got n"):
        main(["table"])


def test_what_shows_finished_experiments_is_there_in_a_second_because_it_needs_no_torch():
    names = ("table", "picture", "compare", "against", "leaderboard", "revisions")
    imports = ", ".join(f"analysis.{name}" for name in names)
    code = f"import sys, recipes.__main__, {imports}; print(*sys.modules)"
    found = python("-c", code).stdout.split()
    assert "analysis.leaderboard" in found
    assert {"torch", "transformers", "dvc"}.isdisjoint(found)


def test_metrics_that_are_no_json_and_scores_without_articles(tmp_path):
    write(**{f"{tmp_path}/metrics/finetune.json": "<<<<", f"{tmp_path}/{SCORES}": "model\tnll\n"})
    experiments = {"old": Experiment(tmp_path, "c")}
    with pytest.raises(ValueError, match=r"metrics/finetune\.json must hold JSON: "):
        load_metrics(experiments)
    assert load_scores(experiments).empty


def test_choices_are_the_parameters_that_differ_each_written_in_one_way(checkout, capsys):
    first = {"infini": {"layers": [0], "window": 64}, "lr": 25.0, "seed": 1}
    second = {"infini": {"layers": [0, -1]}, "lr": 25, "seed": 1, "new": True}
    keep("first", **files_of(**first))
    keep("second", **files_of(**second))
    (table,) = shown(capsys, "table", "first", "second", "--columns", "choices")
    assert table[0][1:4] == ["infini.layers", "new", "segment"]
    assert [row[1:3] for row in table[2:]] == [["[0]", "-"], ["[0,-1]", "true"]]


def test_parameters_that_were_added_or_dropped_have_a_value_in_every_experiment(monkeypatch):
    monkeypatch.chdir(ROOT)
    experiments = kept_experiments() | {"now": Experiment(ROOT, "c")}
    settings = load_settings(experiments)
    sections = ("infini", "distill", "finetune", "finetune_control", "eval")
    lacking = settings.columns[settings.isna().any()]
    assert [key for key in lacking if key.split(".")[0] in sections] == []
    older = YAML(typ="safe").load(Path("results/v1/params.yaml"))
    assert "infini.state_dtype" not in dict(leaves(older))
    assert settings.loc["v1", "infini.state_dtype"] == "float32"


def test_experiments_that_do_not_compare_are_parted():
    full = DRAWN[0, 0]
    parts = {
        "mine": {"full": full},
        "theirs": {"full": full + 0.005, "number": 1},
        "other texts": {"full": full, "articles": [min(a, 8) for a in ARTICLES]},
        "other base": {"full": full + 0.02},
        "rotated": {"full": np.roll(full, 1)},  # the same perplexity of other documents
        "other segments": {"full": full, "segment": 2.8},
    }
    scores, names = joined(**parts), [*parts, "old"]
    groups = split_comparable(scores, names)
    assert groups == [["mine", "theirs"], *([name] for name in names[2:])]
    assert split_comparable(scores, names, ["full"])[0] == ["mine", "theirs", "other segments"]
    ppl = np.exp(full.mean())
    words = f"13 documents of 10 articles, on which the base has a perplexity of {ppl:.4g} under "
    assert describe_texts(scores, "mine") == f"{words}full and 15.64 under segment"
    assert describe_texts(scores, "old").startswith("no scores by article")


def test_those_that_do_not_compare_stand_in_tables_and_axes_of_their_own(checkout, capsys):
    keep("one", **files_of())
    keep("other", **files_of(full=3.0))
    assert [table[2][0] for table in shown(capsys, "table", "one", "other")] == ["one", "other"]
    main(["picture", "docs/a.svg", "one", "other"])
    assert capsys.readouterr().out == "docs/a.svg\n"
    assert [path.name for path in Path("docs").iterdir()] == ["a.svg"]
    assert Path("docs/a.svg").read_text().startswith("<?xml")


def test_the_first_is_compared_with_every_other_model_in_pairs(checkout, capsys):
    for number, name in enumerate(("mine", "theirs")):
        store(name, **files_of(number=number))
    (table,) = shown(capsys, "against", "mine", "theirs")
    own, control = DRAWN[:, 0], DRAWN[:, -2]
    others = {
        ("mine", "control"): control[0],
        ("theirs", "finetuned"): own[1],
        ("theirs", "control"): control[1],
    }
    for row, (names, other) in zip(table[2:], others.items(), strict=True):
        mean_gain, low, high = paired_bootstrap(other - own[0], list(map(str, ARTICLES)))
        assert row == [*names, f"{mean_gain:+.4f}", f"[{low:+.4f}, {high:+.4f}]"]
    few = {"articles": [min(article, 8) for article in ARTICLES]}
    rows = compare(joined(mine=few, theirs={"number": 1, **few}), ["mine", "theirs"])
    assert {row[3] for row in rows} == {"-"}


@pytest.mark.parametrize("other", [{"full": 2.6}, {"articles": [0, *ARTICLES[:-1]]}], ids=str)
def test_a_comparison_with_other_texts_or_bases_is_refused(other):
    scores = joined(mine={}, theirs=other)
    with pytest.raises(ValueError, match=r"the same documents .* base, got mine and theirs, which"):
        compare(scores, ["mine", "theirs"])
    with pytest.raises(ValueError, match=r"by article, got none of old: run it again$"):
        compare(scores, ["mine", "old"])


def test_each_repeat_has_its_gain_and_the_average_is_of_documents(checkout, capsys):
    names = ["one", "two", "three"]
    for seed, name in enumerate(names):
        keep(name, **files_of(number=seed, finetune={"seed": seed}))
    (table,) = shown(capsys, "repeats", *names)
    assert table[0][1:] == [*names, "on average", "95% interval"]
    rows = {row[0]: row[1:] for row in table[2:]}
    assert list(rows) == [RIVALS[f"gain_over_{name}"] for name in ALWAYS]
    own, control = DRAWN[:, 0], DRAWN[:, -2]
    *each, mean, interval = rows[RIVALS["gain_over_control"]]
    assert each == [f"{d.mean():+.4f}" for d in control - own]
    mean_gain, low, high = paired_bootstrap((control - own).mean(axis=0), list(map(str, ARTICLES)))
    assert [mean, interval] == [f"{mean_gain:+.4f}", f"[{low:+.4f}, {high:+.4f}]"]
    of_off = DRAWN[:, PROTOCOLS.index("segment_off")] - own
    means = (*of_off.mean(axis=1), of_off.mean())
    assert rows[RIVALS["gain_over_off"]][:-1] == [f"{mean:+.4f}" for mean in means]
    own_kv, control_kv = DRAWN[:, PROTOCOLS.index("segment_kv")], DRAWN[:, -1]
    assert len({*(own_kv.mean(axis=1) < control_kv.mean(axis=1))}) == 2  # not one rival in all
    better = min(own_kv.mean(), control_kv.mean()) - own.mean()
    assert rows[RIVALS["gain_over_kv"]][-2] == f"{better:+.4f}"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"a.seed": "0", "b": "1"}, {"a.seed": "1", "b": "2"}], r"that differ in b$"),
        ([{"a.seed": "0", "b": "1"}, {"a.seed": "1"}], r"that differ in b$"),
        ([{"a.seed": "0"}], r"two experiments or more, each of other seeds, got x0$"),
        ([{"a.seed": "0"}, {"a.seed": "1"}, {"a.seed": "0"}], r"other seeds, got x0, x1, x2$"),
    ],
)
def test_what_is_no_repeat_is_refused(rows, message):
    with pytest.raises(ValueError, match=message):
        check_repeats(pd.DataFrame(rows), [f"x{i}" for i in range(len(rows))])


def run_of_seeds(ppl: float, epochs: int, distilled: float | None = None, **more: str) -> dict:
    """Make the files of an experiment, trained on doubly shifted labels and stopped at an epoch."""
    own = {"segment_test_ppl": ppl, "sliding_test_ppl": ppl, "full_test_ppl": 20.0}
    scores = {"base": BASE, "finetuned": own | {"t2_test_ppl": 8018.8}}
    scores["distilled"] = {} if distilled is None else {"sliding_test_ppl": distilled}
    metrics = {"eval_sliding": scores}
    ran = {"epochs_run": epochs, "best_epoch": epochs - 2, "num_trained_tokens": 1000 * epochs}
    metrics["distill"] = {**ran, "val_loss": 0.1 * epochs}
    metrics["finetune"] = ran
    training = {"distill": {"epochs": 10}, "finetune": {"epochs": 10, "label_shift": 2}}
    return files_of(metrics, **training) | more


def told(distill: str) -> dict[str, str]:
    rows = [["distill", distill], ["finetune", "30"]]
    return {REPORT: f"# x\n\n{report_table(['stage', 'seconds'], rows)}\n"}


def test_two_runs_are_compared_in_the_rows_of_the_seeds(checkout, capsys):
    keep("v1", **run_of_seeds(40.0, 10, 26.0, **told("60")))
    keep("v2", **run_of_seeds(50.0, 4, 25.4, **told("210")))
    (table,) = shown(capsys, "compare", "v1", "v2")
    assert table[0] == ["metric", "v1", "v2", "change"]
    assert {row[0]: row[1:] for row in table[2:]} == {
        "distillation epochs": ["10", "4 (stopped early)", "-6"],
        "distillation loss": ["1.0000", "0.4000", "-60%"],
        "distilled PPL, sliding": ["26.00", "25.40", "-2%"],
        "its gap to the base's PPL": ["+1.00", "+0.40", "-60%"],
        "fine-tuning epochs": ["10", "4 (stopped early)", "-6"],
        "best epoch": ["8", "2", "-6"],
        "final PPL, in segments": ["40.00", "50.00", "+25%"],
        "the same for the token after next, as the seeds": ["8,019", "8,019", "+0%"],
        "trained on tokens": ["20,000", "8,000", "-60%"],
        "minutes of training": ["1.5", "4.0", "+2.5"],
    }
    undistilled = run_of_seeds(40.0, 0, **told("-"))
    keep("v3", **undistilled)
    (table,) = shown(capsys, "compare", "v3", "v2")
    rows = {row[0]: row[1:] for row in table[2:]}
    assert rows["distillation loss"] == ["-", "0.4000", "-"]
    assert rows["its gap to the base's PPL"] == ["-", "+0.40", "-"]
    assert rows["minutes of training"] == ["-", "4.0", "-"]


def test_runs_of_other_texts_are_compared_with_a_note(checkout, capsys):
    keep("one", **run_of_seeds(40.0, 3))
    keep("other", **run_of_seeds(40.0, 3) | {SCORES: files_of(full=3.0)[SCORES]})
    main(["compare", "one", "other"])
    assert "the two scored other documents or another base" in capsys.readouterr().err
    keep("same", **run_of_seeds(40.0, 3))
    main(["compare", "one", "same"])
    assert "other documents" not in capsys.readouterr().err
    with pytest.raises(SystemExit, match="error: compare needs two experiments, got one twice"):
        main(["compare", "one", "one"])


def test_the_leaderboard_is_one_page_with_numbers_to_sort_by(checkout, capsys):
    sure = {"gain_over_control_low": 0.01, "gain_over_control_high": 0.02}
    model = METRICS["eval_sliding"]["finetuned"] | sure
    scores = METRICS["eval_sliding"] | {"base": BASE, "finetuned": model}
    metrics = METRICS | {"eval_sliding": scores}
    more_than_a_memory = {"infini": {"init": "base"}, "distill": {"epochs": 0}}
    far = scores | {"finetuned": model | {"segment_test_ppl": 99.0}}
    for name, seed, lr in (("seed<0>", 0, 1), ("seed<1>", 1, 1), ("far", 0, 2)):
        found = metrics | {"eval_sliding": far} if name == "far" else metrics
        finetune = {"trainable": "attention", "seed": seed, "lr": lr}
        keep(name, **files_of(found, finetune=finetune, **more_than_a_memory))
    main(["leaderboard"])
    path = Path(capsys.readouterr().out.strip())
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"""(src|href)\s*=\s*(?!["']?(data:|#))""", text)
    names = ["run", *leaderboard.COLUMNS]
    assert re.findall(r"<th><button>(.*?)</button>", text) == names
    found = [re.findall(r"<td.*?>.*?</td>", row) for row in re.findall(r"<tr><td>.*", text)]
    rows = [dict(zip(names, row, strict=True)) for row in found]
    assert rows[0]["run"] == "<td>seed&lt;0&gt;</td>"
    assert rows[0]["memory, bytes"] == '<td data-value="1.4976e+06">1,497,600</td>'
    lead = '<td data-value="0.0189">+0.0189 <small>[+0.0100, +0.0200]</small></td>'
    assert (rows[0]["lead over its control"], rows[0]["minutes"]) == (lead, "<td>-</td>")
    assert [re.sub("<.*?>", "", row["seeds"]) for row in rows] == ["2", "2", "1"]
    assert "; not shown: far (99.0)" in text


def test_the_best_of_at_most_so_many_bytes_is_a_falling_line():
    sizes, ppls = [0, 10, 10, 20, 25, 30], [29.0, 28.0, 27.0, 28.5, 28.2, 26.0]
    values = {STATE_BYTES: sizes, SEGMENT: ppls, BASE_PPL: 30.0, EQUAL_BYTES: 25.0}
    figure = leaderboard.draw(pd.DataFrame(values, index=list("abcdef")))
    best = figure.axes[0].lines[2]
    assert best.get_xydata().tolist() == [[0, 29.0], [10, 27.0], [30, 26.0]]


def test_the_report_of_an_experiment_is_that_of_the_stage(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(reports, "FOLDER", tmp_path)
    main(["reports", "infini-all"])
    out = capsys.readouterr().out
    assert out.startswith("# infini-all: smollm2-135m with a memory\n\nThe memory helps: ")
    assert "| base " in out
    page = (tmp_path / "infini-all.html").read_text(encoding="utf-8")
    assert "<td>infini.feature_map</td>" in page
    assert f"<td>{kept_experiments()['infini-all'].code[:7]}</td>" in page


def test_each_number_is_a_mark_on_the_line_of_its_experiment(tmp_path):
    rows = {
        "old": {"base": BASE, "finetuned": {"segment_test_ppl": 25.0, "state_bytes": 8}},
        "new": METRICS["eval_sliding"],
        "plain": {"finetuned": {"segment_test_ppl": 24.0, "state_bytes": 0}},
        "far": {"finetuned": {"segment_test_ppl": 45.0, "state_bytes": 8}},
    }
    rows["far"]["finetuned"] |= {"full_test_ppl": 23.0, "segment_off_test_ppl": 41.26}
    flat = [dict(leaves({"eval_sliding": row})) for row in rows.values()]
    figure = draw(pd.DataFrame(flat, index=list(rows)), [("ten documents", list(rows))])
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == list(rows)
    *marks, base = axes.lines
    assert (base.get_label(), list(base.get_xdata())) == ("the base as it was", [30.0, 30.0])
    assert {line.get_label(): line.get_xydata().tolist() for line in marks} == {
        "full attention": [[23.6, 1], [23.0, 3]],
        "its control, without a memory": [[29.8, 1]],
        "memory off": [[30.2, 1]],
        "another document's memory": [[29.9, 1]],
        "the same bytes of keys and values": [[28.2, 1]],  # the better of the two
        "with its memory": [[25.0, 0], [29.1, 1]],
    }
    (far,) = axes.texts  # or two marks would squeeze all others
    assert (far.get_text(), far.get_position()[1]) == ("2 marks: 41.3 to 45.0 \u2192", 3)
    assert axes.get_xlim()[1] < 41
    from_below = sorted(marks, key=lambda line: line.get_zorder())
    sizes = [line.get_markersize() for line in from_below]
    assert sizes == sorted(sizes, reverse=True)  # or the larger would hide the smaller
    with pytest.raises(ValueError, match=r"FILE must end in one of .*png.*, got .*\.txt"):
        save(figure, tmp_path / "recipes.txt")
    assert list(tmp_path.iterdir()) == []
