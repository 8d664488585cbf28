"""Write the tables of results into docs/, and draw their picture.

They are made from metrics/ and results/.

Run `python -m analysis.fill_tables` in the top folder after either has changed.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure

from analysis.against import comparable, gain, read_scores
from analysis.picture import draw, save
from analysis.reading import layout
from analysis.table import GAINS, LABELS, PROTOCOLS, find, markdown
from analysis.table_rows import BEST, CHOICES, DROPPED, SEED_RECIPES, WITHOUT, WON, Shown
from infini_retrofit.pipeline.files import render
from recipes.finished import Finished, sources_of
from recipes.kept import read_kept
from recipes.overlays import recipe_names

BASE = "(the base as it was)"
BASE_PROTOCOLS = ("sliding", "full", "segment", "t2")  # those that need no form
MODELS = ("base", "control", "distilled", "finetuned")
KEYS = (
    "sliding_test_ppl",
    "full_test_ppl",
    "segment_test_ppl",
    "segment_off_test_ppl",
    "segment_swapped_test_ppl",
    "segment_kv_test_ppl",
    "t2_test_ppl",
)
OTHERS = (
    *("unigram_test_ppl", "gap_test_nats", "gap_recovered", "state_bytes"),
    *("num_documents", "num_articles"),
)


def table(metrics: dict[str, dict[str, float]]) -> str:
    """Lay out the numbers of eval_sliding.json: a column a model, a row a metric."""
    keys = KEYS + OTHERS
    rows = [[f"`{key}`", *(shown(metrics[m].get(key)) for m in MODELS)] for key in keys]
    return render(["metric", *MODELS], rows)


def shown(value: float | None) -> str:
    """Write a number with the digits that two machines agree on."""
    if value is None:
        return ""
    if isinstance(value, int):
        return f"{value:,}"
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4f}" if abs(value) < 1 else f"{value:.2f}"


def recipes_by_ppl(experiments: Mapping[str, Finished]) -> list[str]:
    """Name the recipes that share a budget and those dropped, the best under `segment` first."""

    def ppl(name: str) -> float:
        return find(experiments[name].metrics, "eval_sliding", "finetuned", "segment_test_ppl")

    shared = [name for name in (*recipe_names(), *DROPPED) if name not in SEED_RECIPES]
    return sorted((name for name in shared if name in experiments), key=ppl)


def base_of(experiment: Finished) -> Finished:
    """Show the base that an experiment scored as its model."""
    keys = [f"{name}_test_ppl" for name in BASE_PROTOCOLS]
    scores = {key: find(experiment.metrics, "eval_sliding", "base", key) for key in keys}
    return experiment._replace(
        metrics={"metrics/eval_sliding.json": {"data": {"finetuned": scores}}}
    )


def tables() -> dict[tuple[str, str], str]:
    """Lay out every table, by its file and its marker there."""
    experiments = read_kept()
    protocols = experiments | {BASE: base_of(experiments["infini-all"])}
    recipes = recipes_by_ppl(experiments)
    default = json.loads(Path("metrics/eval_sliding.json").read_text())
    return {
        ("docs/results.md", "results"): table(default),
        ("docs/results.md", "protocols"): markdown(protocols, [BASE, *recipes], PROTOCOLS),
        ("docs/results.md", "gains"): markdown(experiments, recipes, GAINS),
        ("docs/results.md", "won"): won(experiments),
        ("docs/results.md", "choices"): layout(experiments, CHOICES, "choices"),
        ("docs/results.md", "earned"): earned(experiments),
        ("docs/seeds.md", "labels"): markdown(experiments, SEED_RECIPES, LABELS),
    }


def won(experiments: Mapping[str, Finished]) -> str:
    """Lay out `WON`, in perplexities."""

    def cell(wanted: Shown) -> str:
        if wanted is None:
            return "not run"
        name, model, protocol = wanted
        key = f"{protocol}_test_ppl"
        return f"{find(experiments[name].metrics, 'eval_sliding', model, key):.3f}"

    header = ["test PPL", "base left as it is", "attention of all layers trained"]
    return render(header, [[label, cell(base), cell(trained)] for label, base, trained in WON])


def earned(experiments: Mapping[str, Finished]) -> str:
    """Lay out what `BEST` wins over what lacks one of its choices, and what trained in that."""
    rows = []
    for choice, instead, name in WITHOUT:
        own, other = (read_scores(n, experiments[n].source, MODELS[-1]) for n in (BEST, name))
        trained = find(experiments[name].metrics, "finetune", "num_trainable_parameters")
        rows.append([choice, instead, *gain(own, other), f"{trained:,}"])
    header = ["choice", "in its place", "what it earns", "95% interval", "trained parameters"]
    return render(header, rows)


def fill(text: str, marker: str, content: str) -> str:
    """Replace what stands between the two comments of a marker in a page.

    Raises:
        ValueError: if they are not there.
    """
    begin, end = f"<!-- {marker} -->", f"<!-- /{marker} -->"
    before, _, rest = text.partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"the page must keep {begin} and, below it, {end}")
    return f"{before}{begin}\n{content}\n{end}{after}"


def draw_recipes() -> Figure:
    """Draw the recipes that compare with the best; others have another base."""
    experiments = read_kept()
    best, *_ = comparable(sources_of(experiments), recipes_by_ppl(experiments))
    return draw(experiments, [best])


def main() -> None:
    """Rewrite the pages in place, and the picture."""
    for (page, marker), content in tables().items():
        path = Path(page)
        text = fill(path.read_text(encoding="utf-8"), marker, content)
        path.write_text(text, encoding="utf-8")
    save(draw_recipes(), Path("docs/recipes.png"))


if __name__ == "__main__":
    main()
