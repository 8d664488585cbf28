"""Command line of the analyses: `python -m analysis COMMAND ...`.

Each command is a module of this folder. Only the module of the command is imported.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from infini_retrofit.pipeline.guard import run_stage

COMMANDS = {
    "table": "finished experiments side by side",
    "compare": "two experiments in the rows of the seeds' reports",
    "leaderboard": "everything kept in results/ as one sortable page, with a picture",
    "reports": "the report of each, as stage `report` makes it of a run",
    "revisions": "kept results as DVC experiments, for `dvc metrics diff`",
    "picture": "finished experiments as a picture",
    "against": "what one experiment's model gains over others, with intervals",
    "repeats": "what a memory gains under each random seed, and on average",
    "zero_cost": "score the form of each recipe before any training",
    "fixed_share": "score memories of fixed shares, untrained",
    "carried_context": "score ever more carried keys and values",
    "context_worth": "what distance of context is worth to the base, by corpus",
    "layers_worth": "in which layers far sight is worth what to the base",
    "recall": "what an untrained memory recalls, by rule and bytes",
    "sizes": "what a neural cache wins with keys of fewer numbers, beside rivals",
    "memory_reach": "score a model by how many segments it has read",
    "families": "what a retrofit of each model family differs by from transformers",
    "fill_tables": "rewrite the tables in README.md and docs/ from results/",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; a user's mistake ends in one sentence."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    command = make_parser().parse_args(words[:1]).command
    run_stage(lambda: import_module(f"analysis.{command}").main(words[1:]))


def make_parser() -> argparse.ArgumentParser:
    """Describe the commands."""
    lines = "\n".join(f"  {name:16} {what}" for name, what in COMMANDS.items())
    parser = argparse.ArgumentParser(
        "python -m analysis",
        description=f"Show finished experiments, and score models of this project.\n\n{lines}",
        epilog="`python -m analysis COMMAND --help` describes a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of the above")
    return parser


if __name__ == "__main__":
    main()
