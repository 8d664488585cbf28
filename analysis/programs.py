"""What the programs share that score models: options, opening a model and texts, a growing table.

Knows no form and no protocol.
"""

import argparse
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from infini_retrofit.model.base import load_base, vocab_size
from infini_retrofit.model.checkpoints import load_retrofit
from infini_retrofit.pipeline.device import start_run
from infini_retrofit.pipeline.files import verify_manifest
from infini_retrofit.pipeline.params import load_section
from infini_retrofit.pipeline.tokens import read_documents

BASE, DOCUMENTS = Path("models/base"), Path("data/longdocs/test.parquet")
MIN_WIDTH = 18  # characters of a column: an interval, and most names


def make_parser(command: str, about: str, least_documents: int = 1) -> argparse.ArgumentParser:
    """Make the parser of a program, with the option --documents."""
    parser = argparse.ArgumentParser(
        f"python -m analysis {command}",
        description=about,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    least = at_least(least_documents, "document")
    parser.add_argument("--documents", type=least, default=2, help="test documents to score")
    return parser


def at_least(least: int, unit: str) -> Callable[[str], int]:
    """Return an argument type: a whole number that is not too small."""

    def number(text: str) -> int:
        value = int(text)
        if value < least:
            wanted = f"{least} {unit}{'' if least == 1 else 's'}"
            raise argparse.ArgumentTypeError(f"must be at least {wanted}, got {value}")
        return value

    return number


def open_documents(number: int) -> Int[Tensor, "B T"]:
    """Verify the base and read test documents.

    Raises:
        FileNotFoundError: if a stage has not run, with the command that runs it.
        ValueError: if the base differs from its manifest.
    """
    verify_manifest(BASE, made_by="dvc repro prepare_base")
    return read_documents(DOCUMENTS, vocab_size(BASE), number)


def open_model(folder: Path) -> tuple[PreTrainedModel, int]:
    """Load the base or a retrofit onto the device, and return the length of its segments too.

    The base's length is infini.segment_length of params.yaml.
    """
    device, dtype = start_run()
    if folder == BASE:
        model, length = load_base(BASE, dtype), load_section(int, "infini.segment_length")
    else:
        model, form = load_retrofit(BASE, folder, dtype)
        length = form.segment_length
    return model.to(device), length


def print_growing(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a Markdown table whose rows take minutes, each row as soon as it is there."""
    widths = [max(len(name), MIN_WIDTH) for name in header]
    first, *others = widths

    def show(cells: Sequence[str]) -> None:
        line = " | ".join([cells[0].ljust(first), *map(str.rjust, cells[1:], others)])
        print(f"| {line} |", flush=True)

    show(header)
    show(["-" * first, *("-" * (width - 1) + ":" for width in others)])
    for row in rows:
        show(row)
