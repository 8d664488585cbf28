"""The command that scores recipes before any training, on a tiny base."""

import pytest

from analysis import zero_cost
from infini_retrofit.pipeline.params import read_params
from recipes.overlays import recipe_names


def test_every_recipe_of_this_base_has_its_form():
    forms = zero_cost.forms_of(recipe_names(), read_params())
    assert set(recipe_names()) - set(forms) == {"scratch"}
    assert forms["memory-only"].decay == "feature"
    assert forms["control"].layers == []
    with pytest.raises(ValueError, match="a recipe must be one of"):
        zero_cost.forms_of(["nope"], read_params())


def test_a_memory_that_is_off_costs_nothing_and_one_that_is_on_shows(finished, monkeypatch, capsys):
    monkeypatch.chdir(finished["linear"])
    zero_cost.main(["infini-all", "parallel"])
    said = capsys.readouterr()
    assert said.err.count("computing on") == 1
    rows = [line.split("|")[1:-1] for line in said.out.splitlines()[2:]]
    off, own = ({r[0].strip(): float(r[i]) for r in rows} for i in (3, 5))
    assert off["infini-all"] == off["parallel"] == own["parallel"] == 1
    assert abs(own["infini-all"] - 1) > 1e-4
