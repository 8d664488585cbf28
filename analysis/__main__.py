"""Command line of the analyses: `python -m analysis --table [NAME ...]` and the like.

Reads finished experiments, those run here and those kept in results/; runs none.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from analysis.reading import draw_picture, print_gains, print_repeats, print_table
from analysis.table import COLUMNS


def main(arguments: Sequence[str] | None = None) -> None:
    """Do what the command line asks for; a user's mistake ends in one sentence."""
    parser = make_parser()
    args = parser.parse_intermixed_args(arguments)
    if args.columns and not args.table:
        parser.error(f"--columns {args.columns} must come with --table: it says which columns")
    try:
        if args.picture:
            draw_picture(args.picture, args.names)
        elif args.against:
            print_gains(args.names)
        elif args.repeats:
            print_repeats(args.names)
        else:
            print_table(args.names, args.columns or "memory")
    except (ValueError, OSError) as error:
        sys.exit("error: " + " ".join(str(error).split()))


def make_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser("python -m analysis", description="Show finished experiments.")
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help="experiments; none: all recipes")
    one = parser.add_mutually_exclusive_group(required=True).add_argument
    one("--table", action="store_true", help="print a table in Markdown")
    one("--picture", type=Path, metavar="FILE", help="draw them: recipes.png, .svg")
    one("--against", action="store_true", help="what the first of NAMEs gains over others")
    repeats = "what the memory gains in NAMEs that differ in seeds, and on average"
    one("--repeats", action="store_true", help=repeats)
    about = (
        "of --table: what a memory wins back (default), its protocols or gains alone, in which "
        "parameters experiments differ, or what labels do"
    )
    add("--columns", choices=COLUMNS, help=about)
    return parser


if __name__ == "__main__":
    main()
