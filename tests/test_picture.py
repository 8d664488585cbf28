"""The picture of finished experiments: which mark stands where, and how it is written."""

import pytest

from analysis import __main__ as command_line
from analysis import reading
from analysis.picture import MARKS, draw, save
from recipes.finished import finished
from tests.test_recipe_table import METRICS, commit, experiment

CONTROL = {"segment_test_ppl": 29.8, "segment_kv_test_ppl": 28.1}
SCORED = METRICS | {"eval_sliding": METRICS["eval_sliding"] | {"control": CONTROL}}
OLD = {"eval_sliding": {"finetuned": {"segment_test_ppl": 25.0, "state_bytes": 8}}}
PLAIN = {"eval_sliding": {"finetuned": {"segment_test_ppl": 24.0, "state_bytes": 0}}}
COMMIT = commit(
    experiment("infini-all", SCORED), experiment("parallel", OLD), experiment("control", PLAIN)
)
NAMES = ["parallel", "infini-all", "scratch", "control"]


def test_each_number_is_a_mark_on_the_line_of_its_experiment():
    (axes,) = draw(finished([COMMIT]), [("ten documents", NAMES)]).axes
    assert not axes.get_title(loc="left")
    assert [label.get_text() for label in axes.get_yticklabels()] == NAMES
    drawn = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert drawn == {
        "full attention": [[23.6, 1]],
        "its control, without a memory": [[29.8, 1]],
        "memory off": [[30.2, 1]],
        "another document's memory": [[29.9, 1]],
        "the same bytes of keys and values": [[28.1, 1]],  # the better of the two
        "with its memory": [[25.0, 0], [29.1, 1]],
    }
    assert drawn.keys() == {mark.label for mark in MARKS}
    from_below = sorted(axes.lines, key=lambda line: line.get_zorder())
    sizes = [line.get_markersize() for line in from_below]
    assert sizes == sorted(sizes, reverse=True)  # or the larger would hide the smaller
    top, bottom = axes.get_ylim()[::-1]
    assert top < 0 < len(NAMES) - 1 < bottom


def test_what_does_not_compare_has_an_axis_of_its_own():
    parts = [("ten documents", ["parallel", "infini-all"]), ("two documents", ["control"])]
    above, below = draw(finished([COMMIT]), parts).axes
    for axes, (what, names) in zip((above, below), parts, strict=True):
        assert axes.get_title(loc="left") == what
        assert [label.get_text() for label in axes.get_yticklabels()] == names
    assert below.get_xlabel().startswith("test perplexity")
    assert above.get_xlim() != below.get_xlim()


@pytest.mark.usefixtures("nothing_kept")
@pytest.mark.parametrize(("ending", "begin"), [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_the_command_writes_the_format_of_the_file_s_ending(
    ending, begin, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(reading, "all_experiments", lambda: [COMMIT])
    path = tmp_path / "docs" / f"recipes.{ending}"
    command_line.main(["--picture", str(path)])
    assert path.read_bytes().startswith(begin)
    assert capsys.readouterr().out == f"{path}\n"
    assert list(path.parent.iterdir()) == [path]
    with pytest.raises(SystemExit, match=r"error: --picture needs names of recipes or .*, got x$"):
        command_line.main(["x", "--picture", str(path)])


def test_an_ending_that_is_no_picture_s_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"--picture must end in one of .*png.*, got .*\.txt"):
        save(draw(finished([COMMIT]), [("ten documents", NAMES)]), tmp_path / "recipes.txt")
    assert list(tmp_path.iterdir()) == []
