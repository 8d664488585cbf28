"""One finished experiment against others, from the scores that stages leave in git."""

import numpy as np
import pytest

from analysis import __main__ as command_line
from analysis import against, reading
from analysis.against import gains
from infini_retrofit.evaluation.gains import paired_bootstrap
from tests.test_recipe_table import commit as shown_commit
from tests.test_recipe_table import experiment
from tests.tiny_checkout import commit, make_checkout, write_scores

ARTICLES = [0, 0, 1, 2, 2, 2, 3, 4, 5, 6, 7, 8, 9]
DRAWN = np.random.default_rng(0).normal(3, 0.2, size=(5, len(ARTICLES)))
NLLS = {
    ("mine", "finetuned"): DRAWN[0] - 1,
    ("mine", "control"): DRAWN[1],
    ("theirs", "finetuned"): DRAWN[2],
    ("theirs", "control"): DRAWN[3],
}


def revision_of(
    name: str,
    articles: list[int] = ARTICLES,
    base: np.ndarray = DRAWN[4],
    confined: float = 0.0,
) -> str:
    """Commit an experiment's scores and return the commit.

    Args:
        name: whose.
        articles: of the documents.
        base: scores of the base under `full`.
        confined: how much worse they are under `segment`.
    """
    models = {"base": base}
    models |= {model: nlls for (owner, model), nlls in NLLS.items() if owner == name}
    worse = {(True, "full"): 1, (True, "segment"): 0}
    worse |= {(False, "full"): 0, (False, "segment"): confined}
    scores = {
        (model, protocol): nlls + worse[model != "base", protocol]
        for protocol in ("full", "segment")
        for model, nlls in models.items()
    }
    write_scores(scores, articles)
    return commit()


@pytest.fixture
def revisions(tmp_path, monkeypatch) -> dict[str, str]:
    make_checkout(tmp_path, monkeypatch)
    return {name: revision_of(name) for name in ("mine", "theirs")}


def show(monkeypatch: pytest.MonkeyPatch, revisions: dict[str, str]) -> None:
    """Let DVC show these as finished experiments, by name."""
    shown = [experiment(name, {}) for name in revisions]
    for entry, revision in zip(shown, revisions.values(), strict=True):
        entry["revs"][0]["rev"] = revision
    monkeypatch.setattr(reading, "all_experiments", lambda: [shown_commit(*shown)])


def test_the_first_is_compared_with_every_other_model_in_pairs(revisions):
    rows = gains(revisions, ["mine", "theirs"])
    assert [row[:2] for row in rows] == list(NLLS)[1:]
    for name, model, mean, interval in rows:
        differences = NLLS[name, model] - NLLS["mine", "finetuned"]
        want = paired_bootstrap(differences, list(map(str, ARTICLES)))
        assert float(mean) == pytest.approx(differences.mean(), abs=1e-4)
        ends = [float(end) for end in interval.strip("[]").split(", ")]
        assert ends == pytest.approx([want.low, want.high], abs=1e-4)
    assert all(float(row[2]) > 0.5 for row in rows)
    assert float(gains(revisions, ["theirs", "mine"])[1][2]) < -0.5


def test_scores_of_other_documents_and_missing_ones_are_refused(revisions):
    others = revisions | {"theirs": revision_of("theirs", [0, *ARTICLES[:-1]])}
    with pytest.raises(ValueError, match=r"have scored the same documents of .* got 13 of mine"):
        gains(others, ["mine", "theirs"])
    with pytest.raises(ValueError, match=r"eval_documents\.tsv of theirs must hold scores of base"):
        gains(revisions | {"theirs": "HEAD~9"}, ["mine", "theirs"])


def test_scores_of_another_base_are_refused(revisions):
    others = revisions | {"theirs": revision_of("theirs", base=DRAWN[4] + 0.1)}
    with pytest.raises(ValueError, match="or of other texts or bases"):
        gains(others, ["mine", "theirs"])


def test_experiments_that_do_not_compare_are_parted(revisions, monkeypatch, capsys):
    fewer = [min(article, 8) for article in ARTICLES]
    revisions |= {"other texts": revision_of("mine", fewer), "old": "HEAD~9"}
    revisions |= {"other base": revision_of("mine", base=DRAWN[4] + 0.1)}
    # As many documents and articles, and the same perplexity, of other numbers.
    revisions |= {"rotated": revision_of("mine", base=np.roll(DRAWN[4], 1))}
    revisions |= {"other segments": revision_of("mine", confined=0.1)}
    names = ["mine", "rotated", "other texts", "theirs", "control", "other base", "old"]
    names += ["other segments", "scratch"]
    parts = against.comparable(revisions, names)
    assert [found for _, found in parts] == [
        *(["mine", "theirs", "control", "scratch"], ["rotated"], ["other texts"]),
        *(["other base"], ["old"], ["other segments"]),
    ]
    ppl, confined = np.exp(DRAWN[4].mean()), np.exp(DRAWN[4].mean() + 0.1)
    has = "on which the base has a perplexity of"
    words = [what for what, _ in parts]
    assert words[0] == words[1]
    assert words[0] == f"13 documents of 10 articles, {has} {ppl:.4g} under full and " + (
        f"{ppl:.4g} under segment"
    )
    assert words[2].startswith("13 documents of 9 articles, ")
    assert words[4] == "no scores by article, so that these rows may not compare"
    assert words[5].endswith(f"{ppl:.4g} under full and {confined:.4g} under segment")
    show(monkeypatch, revisions)
    command_line.main(["--table", *names])
    tables = capsys.readouterr().out.split("\n\n")
    assert tables[::2] == [f"{what}:" for what in words]
    assert [[line.split()[1] for line in t.splitlines()[2:]] for t in tables[1::2]] == [
        [name.split()[0] for name in found] for _, found in parts
    ]


def test_scores_of_the_base_are_read_once_an_experiment(revisions, monkeypatch):
    read, found = against.read_scores, []

    def count(name: str, *args: str) -> against.Scores:
        found.append((name, *args[1:]))
        return read(name, *args)

    monkeypatch.setattr(against, "read_scores", count)
    gains(revisions, ["mine", "theirs"])
    of_base = ("base", "full")
    assert sorted(found) == sorted(
        [("mine", *of_base), ("theirs", *of_base), *((name, model) for name, model in NLLS)]
    )


def test_few_articles_get_no_interval(revisions):
    few = [min(article, 8) for article in ARTICLES]
    for name in revisions:
        revisions[name] = revision_of(name, few)
    assert {row[3] for row in gains(revisions, ["mine", "theirs"])} == {"-"}


def test_the_command_finds_experiments_by_name(revisions, monkeypatch, capsys):
    show(monkeypatch, revisions)
    command_line.main(["--against", "mine", "theirs"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "mine, finetuned, protocol segment, is better:"
    assert [line.split()[1] for line in lines[2:]] == [
        *("than", "------", "mine", "theirs", "theirs")
    ]
    for names, got in (([], "none"), (["mine", "yours"], "some .* not been run: yours")):
        with pytest.raises(
            SystemExit, match=f"--against needs names of finished experiments, got {got}$"
        ):
            command_line.main(["--against", *names])
