"""What carried keys and values win: perplexity by the number of tokens that cross a border.

Perplexity of test documents whose every layer sees its segment and what is carried into it, up
to full attention over the document. It is the price that a memory has to beat at equal bytes, and
shows from how far back there is anything left to win. Prints a table and writes nothing.

Reads: params.yaml (infini.segment_length), models, data/longdocs
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from infini_retrofit.evaluation.protocols import score_full
from infini_retrofit.evaluation.rival import make_rival
from infini_retrofit.model.base import load_base
from infini_retrofit.model.checkpoints import load_retrofit
from infini_retrofit.model.retrofit import border_bytes
from infini_retrofit.pipeline.device import start_run
from infini_retrofit.pipeline.files import render, verify_manifest
from infini_retrofit.pipeline.guard import run_stage
from infini_retrofit.pipeline.params import load_section
from infini_retrofit.pipeline.tokens import read_documents
from infini_retrofit.scoring.score import Score, score_segments, total

BASE, DOCUMENTS = Path("models/base"), Path("data/longdocs/test.parquet")
HEADER = ["tokens carried", "bytes", "PPL", "nats a token won", "share of the gap"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Score one model with ever more context and print the table."""
    options = _options(arguments)
    length = load_section(int, "infini.segment_length")
    if max(options.tokens) > length:
        raise ValueError(
            f"--tokens must be at most infini.segment_length={length}, got {max(options.tokens)}"
        )
    verify_manifest(BASE, made_by="dvc repro prepare_base")
    documents = read_documents(DOCUMENTS, options.documents)
    device, dtype = start_run()
    if options.model == BASE:
        model = load_base(BASE, dtype)
    else:
        model = load_retrofit(BASE, options.model, dtype)[0]
    full = total(score_full(model.to(device), documents))
    scores: list[tuple[int, int, Score]] = []
    for num_tokens in sorted({0, *options.tokens}):
        make_rival(model, num_tokens, length)
        num_bytes = border_bytes(model)
        scores.append((num_tokens, num_bytes, total(score_segments(model, documents, length))))
        print(render(HEADER, rows_of(scores, full)), file=sys.stderr)
    print(render(HEADER, rows_of(scores, full)))


def rows_of(scores: Sequence[tuple[int, int, Score]], full: Score) -> list[list[str]]:
    """Lay out what each number of tokens, of so many bytes, wins over none.

    Args:
        scores: tokens, bytes and the score, none carried first.
        full: the score under full attention.
    """
    none = scores[0][2].nll
    lines = [(f"{tokens}", f"{size:,}", score) for tokens, size, score in scores]
    rows = []
    for tokens, size, score in [*lines, ("full attention", "", full)]:
        won = none - score.nll
        share = won / (none - full.nll)
        rows.append([tokens, size, f"{score.ppl:.2f}", f"{won:.4f}", f"{share:.1%}"])
    return rows


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    about = "Score a model with ever more keys and values carried across segment borders."
    parser = argparse.ArgumentParser(prog="python -m analysis.carried_context", description=about)
    parser.add_argument(
        "model",
        nargs="?",
        type=Path,
        default=BASE,
        help="the base (default: %(default)s) or a retrofit such as models/control, whose memory, "
        "if it has one, is dropped",
    )
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[1, 2, 9, 32, 64, 128, 256], help="to carry"
    )
    parser.add_argument("--documents", type=int, default=2, help="test documents to score")
    options = parser.parse_args(arguments)
    if options.documents < 1:
        parser.error(f"--documents must be at least 1 document, got {options.documents}")
    if min(options.tokens) < 0:
        parser.error(f"--tokens must be at least 0 tokens, got {min(options.tokens)}")
    return options


if __name__ == "__main__":
    run_stage(main)
