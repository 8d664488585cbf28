"""Tables in Markdown: how they line up."""

import pytest

from infini_retrofit.pipeline.files import render


def test_columns_line_up_names_to_the_left_and_numbers_to_the_right():
    assert render(["name", "us", "MiB"], [["a", "1,234.5", "7"], ["longer", "2", "10"]]) == (
        "| name   |      us | MiB |\n"
        "| ------ | ------: | --: |\n"
        "| a      | 1,234.5 |   7 |\n"
        "| longer |       2 |  10 |"
    )


def test_without_rows_there_is_a_header():
    assert render(["a", "b"], []).splitlines() == ["| a   |   b |", "| --- | --: |"]


def test_a_row_that_lacks_a_cell_is_our_own_slip():
    with pytest.raises(ValueError, match="argument 2"):
        render(["a", "b"], [["1"]])
