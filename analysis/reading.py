"""What is read of finished experiments: tables, pictures, comparisons, and files to keep.

Knows where experiments are found and who can show them; not what is in them, nor how they are run.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from analysis import against
from analysis.table import COLUMNS, choices, markdown, with_settings
from infini_retrofit.pipeline.files import render
from recipes.experiments import all_experiments
from recipes.finished import Finished, check_finished, choose, finished, sources_of
from recipes.kept import read_kept
from recipes.overlays import recipe_names


def known(names: Sequence[str]) -> dict[str, Finished]:
    """Return the experiments that have been run here, and what is kept of others.

    Args:
        names: asked for; none are all recipes. Those that were not run here are said.
    """
    own, others = finished(all_experiments()), read_kept()
    if read := [n for n in names or recipe_names() if n in others and n not in own]:
        print(f"note: not run here, read from results/: {', '.join(read)}", file=sys.stderr)
    return others | own


def print_table(names: Sequence[str], which: str) -> None:
    """Print the named experiments, or those of the recipes that have been run.

    Rows that do not compare (`against.comparable`) are in tables of their own.

    Args:
        names: of experiments.
        which: columns, a key of `COLUMNS`.
    """
    experiments = known(names)
    parts = against.comparable(sources_of(experiments), choose("--table", names, experiments))
    tables = [(what, layout(experiments, part, which)) for what, part in parts]
    are_many = len(tables) > 1
    print("\n\n".join(f"{what}:\n\n{table}" if are_many else table for what, table in tables))


def layout(experiments: Mapping[str, Finished], names: Sequence[str], which: str) -> str:
    """Lay out one table; for `choices` with what the experiments were told differently."""
    if which != "choices":
        return markdown(experiments, names, COLUMNS[which])
    from analysis.settings import read_settings  # brings torch, which takes seconds

    run = [name for name in names if name in experiments]
    settings = {name: read_settings(experiments[name].source) for name in run}
    return markdown(with_settings(experiments, settings), names, choices(settings))


def draw_picture(path: Path, names: Sequence[str]) -> None:
    """Draw the named experiments, or those of the recipes that have been run.

    Those that do not compare have an axis of their own.
    """
    from analysis import picture  # brings matplotlib, which takes a second

    experiments = known(names)
    parts = against.comparable(sources_of(experiments), choose("--picture", names, experiments))
    picture.save(picture.draw(experiments, parts), path)
    print(path)


def print_gains(names: Sequence[str]) -> None:
    """Print by how much the first finished experiment is better, document by document.

    Raises:
        ValueError: if none is named, or one has not been run.
    """
    experiments = known(names)
    check_finished("--against", names, experiments)
    gains = against.gains(sources_of(experiments), names)
    print(f"{names[0]}, finetuned, protocol {against.PROTOCOL}, is better:\n")
    print(render(against.COLUMNS, gains))


def print_repeats(names: Sequence[str]) -> None:
    """Print what the memory gains in each finished experiment, and on average.

    Raises:
        ValueError: if none is named, one has not been run, or they differ in more than seeds.
    """
    from analysis import repeats  # brings torch, which takes seconds

    experiments = known(names)
    check_finished("--repeats", names, experiments)
    found = repeats.gains_of_repeats(sources_of(experiments), names)
    print(f"finetuned, protocol {against.PROTOCOL}:\n")
    print(render(repeats.columns(names), found))
