"""What a memory gains over several random seeds, from the files that experiments leave in git."""

from pathlib import Path

import numpy as np
import pytest

from analysis import __main__ as command_line
from analysis import reading
from analysis.repeats import OTHERS, gains_of_repeats
from infini_retrofit.evaluation.gains import paired_bootstrap
from tests.test_recipe_table import commit as shown_commit
from tests.test_recipe_table import experiment
from tests.tiny_checkout import commit, make_checkout, write_scores

NUM_ARTICLES, NAMES = 11, ("one", "two", "three")
MODEL = ("segment", *(f"segment_{other}" for other in OTHERS if other != "control"))
DRAWN = np.random.default_rng(1).normal(3, 0.2, size=(len(NAMES), len(MODEL) + 2, NUM_ARTICLES))
BASE = np.full(NUM_ARTICLES, 2.5)


def scores_of(number: int) -> dict[tuple[str, str], np.ndarray]:
    """Make up what the models of an experiment scored."""
    *model, control, control_kv = DRAWN[number]
    scores = {("finetuned", name): nlls for name, nlls in zip(MODEL, model, strict=True)}
    scores |= {("control", "segment"): control, ("control", "segment_kv"): control_kv}
    return scores | {("base", "full"): BASE}


def make_experiment(number: int, seed: int, edit: tuple[str, str] = ("", "")) -> str:
    """Commit what an experiment leaves and return the commit."""
    write_scores(scores_of(number), range(NUM_ARTICLES))
    text = Path("params.yaml").read_text(encoding="utf-8")
    changed = text.replace("  seed: 0\n", f"  seed: {seed}\n").replace(*edit)
    Path("params.yaml").write_text(changed, encoding="utf-8")
    revision = commit()
    Path("params.yaml").write_text(text, encoding="utf-8")
    return revision


@pytest.fixture
def revisions(tmp_path, monkeypatch) -> dict[str, str]:
    make_checkout(tmp_path, monkeypatch)
    return {name: make_experiment(i, seed=i) for i, name in enumerate(NAMES)}


def test_each_repeat_has_its_gain_and_the_average_is_of_documents(revisions):
    rows = {row[0]: row[1:] for row in gains_of_repeats(revisions, NAMES)}
    assert list(rows) == list(OTHERS.values())
    own, control = DRAWN[:, 0], DRAWN[:, -2]
    *each, mean, interval = rows[OTHERS["control"]]
    assert each == [f"{d.mean():+.4f}" for d in control - own]
    want = paired_bootstrap((control - own).mean(axis=0), list(map(str, range(NUM_ARTICLES))))
    assert mean == f"{want.mean:+.4f}"
    assert interval == f"[{want.low:+.4f}, {want.high:+.4f}]"
    of_off = DRAWN[:, MODEL.index("segment_off")] - own
    assert rows[OTHERS["off"]][:-1] == [f"{d:+.4f}" for d in (*of_off.mean(axis=1), of_off.mean())]


def test_the_rival_on_average_is_the_better_of_the_averages(revisions):
    own_kv, control_kv = DRAWN[:, MODEL.index("segment_kv")], DRAWN[:, -1]
    assert (own_kv.mean(axis=1) < control_kv.mean(axis=1)).any()
    assert (own_kv.mean(axis=1) > control_kv.mean(axis=1)).any()  # not the same one in each
    better = min(own_kv.mean(), control_kv.mean()) - DRAWN[:, 0].mean()
    rows = {row[0]: row[1:] for row in gains_of_repeats(revisions, NAMES)}
    assert rows[OTHERS["kv"]][-2] == f"{better:+.4f}"


def test_what_is_no_repeat_is_refused(revisions):
    others = revisions | {"two": make_experiment(1, 1, ("window: 64", "window: 32"))}
    with pytest.raises(ValueError, match=r"one and two, which differ in infini\.window"):
        gains_of_repeats(others, NAMES)
    with pytest.raises(ValueError, match=r"two experiments or more, each of other seeds, got one$"):
        gains_of_repeats(revisions, ["one"])
    with pytest.raises(ValueError, match=r"each of other seeds, got one, two, one$"):
        gains_of_repeats(revisions, ["one", "two", "one"])
    same = revisions | {"two": make_experiment(1, seed=2)}
    with pytest.raises(ValueError, match=r"each of other seeds, got one, two, three"):
        gains_of_repeats(same, NAMES)


def test_the_command_finds_experiments_by_name(revisions, monkeypatch, capsys):
    shown = [experiment(name, {}) for name in revisions]
    for entry, revision in zip(shown, revisions.values(), strict=True):
        entry["revs"][0]["rev"] = revision
    monkeypatch.setattr(reading, "all_experiments", lambda: [shown_commit(*shown)])
    command_line.main(["--repeats", *NAMES])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "finetuned, protocol segment:"
    assert [cell.strip() for cell in lines[2].strip("|").split("|")][1:4] == list(NAMES)
    assert len(lines) == 2 + 2 + len(OTHERS)
    for names, got in (([], "none"), (["one", "four"], "some .* not been run: four")):
        with pytest.raises(SystemExit, match=f"--repeats needs names of .*, got {got}$"):
            command_line.main(["--repeats", *names])
