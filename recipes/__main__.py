"""Command line of the recipes: `python -m recipes NAME [NAME ...] [-S key=value ...]`."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from infini_retrofit.pipeline.params import read_params
from infini_retrofit.pipeline.schema import leaves
from recipes.experiments import (
    check_finished,
    check_keeps_copies,
    committed_params,
    diff_commands,
    existing_experiments,
    newest_experiments,
    printable,
    run,
    run_command,
)
from recipes.kept import keep
from recipes.overlays import (
    check_recipe,
    describe,
    left_over,
    overrides,
    read_overlay,
    recipe_names,
)
from recipes.without_dvc import run_without_dvc, with_overrides

# Options that show finished experiments, by the commands of `analysis`. That imports from this
# package, and is imported only when asked for.
SHOWING = {
    "table": "print finished NAMEs side by side, the best first; none: all recipes",
    "compare": "print two finished NAMEs in the rows of the seeds' reports",
    "reports": "write the report of finished NAMEs, a page each",
    "leaderboard": "write everything kept in results/ as one page",
    "revisions": "make kept NAMEs known to DVC, for `dvc metrics diff`; none: all",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what the command line asks for; a user's mistake ends in one sentence."""
    parser = make_parser()
    args = parser.parse_intermixed_args(arguments)
    try:
        showing = [name for name in SHOWING if getattr(args, name)]
        if showing:
            import_module(f"analysis.{showing[0]}").main(args.names)
        elif args.list:
            print_list()
        elif args.keep:
            keep_results(args.names)
        elif args.diff:
            run_and_compare(args)
        elif args.without_dvc:
            run_plainly(args)
        elif args.names:
            run_recipes(args)
        else:
            parser.error("name a recipe, or ask for --list")
    except (ValueError, OSError) as error:
        sys.exit("error: " + " ".join(str(error).split()))


def make_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser("python -m recipes", description="Run recipes with DVC.")
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help="recipes, run one after another")
    one = parser.add_mutually_exclusive_group().add_argument
    one("--list", action="store_true", help="list the recipes, a line each, and run none")
    one("--diff", action="store_true", help="compare two NAMEs, and first run those not run yet")
    one("--keep", action="store_true", help="copy the small files of finished NAMEs to results/")
    for name, about in SHOWING.items():
        option = "--report" if name == "reports" else f"--{name}"
        one(option, dest=name, action="store_true", help=about)
    add("--print", action="store_true", help="print the commands, and run none")
    own = "a parameter of your own; it wins over the recipe's"
    add("-S", "--set-param", action="append", default=[], metavar="key=value", help=own)
    add("--temp", action="store_true", help="run in a copy: the workspace stays as it is")
    about = "run one NAME's stages without DVC, and write their small files to a folder"
    add("--without-dvc", metavar="FOLDER", type=Path, help=about)
    add("--force", action="store_true", help="overwrite the experiment, and run every stage again")
    add("--name", help="name of the experiment, if not the recipe's (one recipe only)")
    return parser


def print_list() -> None:
    """Print each recipe with the line that describes it."""
    width = max(map(len, recipe_names()))
    for name in recipe_names():
        print(f"{name:{width}}  {describe(name)}")


def keep_results(names: Sequence[str]) -> None:
    """Copy the small files of finished experiments to results/.

    Raises:
        ValueError: if no name is given, or an experiment was not run here or cannot be kept.
    """
    experiments = newest_experiments()
    check_finished("--keep", names, experiments)
    for name in names:
        print(keep(name, experiments[name]))


def run_and_compare(args: argparse.Namespace) -> None:
    """Compare two experiments, and first run those that the last commit does not have.

    Raises:
        ValueError: if they are not two, or come with settings that an existing one may not have.
    """
    names = args.names
    if len(names) != 2 or names[0] == names[1]:
        raise ValueError(f"--diff must come with two names, got {', '.join(names) or 'none'}")
    if args.set_param or args.name:
        raise ValueError(
            "--diff must come without -S and --name, because what exists already is not run "
            "again: run yours under its --name first, then compare that name"
        )
    existing = set() if args.force else existing_experiments()
    missing = [name for name in names if name not in existing]
    if missing:
        run_recipes(argparse.Namespace(**vars(args) | {"names": missing}))
    for command in diff_commands(*names):
        print(printable(command), flush=True)
        if not args.print and (code := run(command)):
            sys.exit(code)


def run_plainly(args: argparse.Namespace) -> None:
    """Run one recipe's stages one after another, as on a machine without DVC.

    Raises:
        ValueError: if there is not one recipe, a key does not exist, or a stage fails.
    """
    if len(args.names) != 1:
        raise ValueError(f"--without-dvc must come with one recipe, got {args.names}")
    (recipe,) = args.names
    check_recipe(recipe)
    params = read_params()
    settings = overrides(recipe, params, {}, args.set_param)
    run_without_dvc(with_overrides(params, settings), args.without_dvc)


def run_recipes(args: argparse.Namespace) -> None:
    """Print and run the command of each recipe, and stop at the first failure."""
    params, committed = read_params(), committed_params()
    commands = make_commands(args, params, committed)
    note_changes(left_over(params, committed))
    if args.print:
        print("\n".join(map(printable, commands.values())))
        return
    if not args.force:
        refuse_existing(list(commands))
    if args.temp:
        check_keeps_copies()
    for number, (name, command) in enumerate(commands.items(), 1):
        print(printable(command), flush=True)
        if code := run(command):
            rest = ", ".join(list(commands)[number:]) or "nothing"
            print(f"error: {name} failed; left to run: {rest}", file=sys.stderr)
            sys.exit(code)
        check_stored(name)


def make_commands(
    args: argparse.Namespace, params: Mapping[str, Any], committed: Mapping[str, Any]
) -> dict[str, list[str]]:
    """Return the command of every recipe by its experiment's name.

    Raises:
        ValueError: if a recipe or key does not exist, or options exclude each other.
    """
    if args.name and len(args.names) > 1:
        raise ValueError(f"--name must come with one recipe, got {', '.join(args.names)}")
    if len(set(args.names)) < len(args.names):
        raise ValueError(f"NAMEs must differ, got {', '.join(args.names)}")
    flags = [flag for flag in ("--temp", "--force") if getattr(args, flag.removeprefix("--"))]
    values, put_back = dict(leaves(committed)), left_over(params, committed)
    commands = {}
    for recipe in args.names:
        check_recipe(recipe)
        name = args.name or recipe
        settings = overrides(recipe, params, put_back, args.set_param)
        commands[name] = run_command(name, settings, flags)
        if not args.temp:
            put_back |= {k: values[k] for k in read_overlay(recipe) if k in values}
    return commands


def note_changes(values: Mapping[str, Any]) -> None:
    """Name the edits of params.yaml that recipes ignore."""
    if values:
        print(
            "note: recipes start from the params.yaml of the last commit; changed since, and not "
            f"used unless given by -S: {', '.join(sorted(values))}",
            file=sys.stderr,
        )


def check_stored(name: str) -> None:
    """Refuse that DVC ended well without an experiment of this name.

    Raises:
        ValueError: if so.
    """
    if name not in existing_experiments():
        raise ValueError(
            f"DVC ended well, but has stored no experiment {name}: `dvc exp list` shows what it has"
        )


def refuse_existing(names: Sequence[str]) -> None:
    """Refuse names that DVC would refuse after the run.

    Raises:
        ValueError: with the ways out.
    """
    if taken := sorted(existing_experiments().intersection(names)):
        raise ValueError(
            f"experiments that exist already: {', '.join(taken)}. Give another --name; or forget "
            f"the old with `dvc exp remove {' '.join(taken)}` (what did not change is not run "
            "again); or overwrite it with --force (every stage runs again)"
        )


if __name__ == "__main__":
    main()
