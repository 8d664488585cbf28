"""What carried keys and values win: perplexity by the number of tokens that cross a border.

Every layer sees its segment and the keys and values carried into it, up to full attention over
the document. This is the price that a memory has to beat at equal bytes. It also shows from how
far back there is anything left to win. Prints a table and writes nothing.

Reads: params.yaml (infini.segment_length, for the base), models, data/longdocs
"""

import argparse
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from analysis.programs import (
    BASE,
    at_least,
    make_parser,
    open_documents,
    open_model,
    print_growing,
)
from infini_retrofit.evaluation.protocols import score_full
from infini_retrofit.evaluation.rival import Rival, make_rival
from infini_retrofit.model.retrofit import state_bytes
from infini_retrofit.scoring.score import Score, score_segments, total

HEADER = ["tokens carried", "bytes", "PPL", "nats a token won", "share of the gap"]
Carried = tuple[int, int, Score]  # tokens, their bytes, and the score with them


def main(arguments: Sequence[str] | None = None) -> None:
    """Score one model with ever more context and print the table."""
    options = _options(arguments)
    documents = open_documents(options.documents)
    model, length = open_model(options.model)
    if max(options.tokens) > length:
        raise ValueError(
            f"--tokens must be at most the {length} tokens of a segment, got {max(options.tokens)}"
        )
    full = total(score_full(model, documents))

    def scores() -> Iterator[Carried]:
        for num_tokens in sorted({0, *options.tokens}):
            rival = make_rival(model, Rival(segment_length=length, num_tokens=num_tokens))
            score = total(score_segments(rival, documents, length))
            yield num_tokens, state_bytes(rival), score

    print_growing(HEADER, make_rows(scores(), full))


def make_rows(scores: Iterable[Carried], full: Score) -> Iterator[list[str]]:
    """Write what each number of tokens wins over none.

    Args:
        scores: without carried tokens first.
        full: the score under full attention.
    """
    none: float | None = None
    for tokens, size, score in scores:
        none = score.nll if none is None else none
        yield [f"{tokens}", f"{size:,}", *_won(none, score, full)]
    assert none is not None
    yield ["full attention", "", *_won(none, full, full)]


def _won(none: float, score: Score, full: Score) -> list[str]:
    won = none - score.nll
    return [f"{score.ppl:.2f}", f"{won:.4f}", f"{won / (none - full.nll):.1%}"]


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    about = "Score a model with ever more keys and values carried across segment borders."
    parser = make_parser("carried_context", about)
    model = "the base, or a retrofit such as models/control; its memory is dropped"
    parser.add_argument("model", nargs="?", type=Path, default=BASE, help=model)
    tokens = [1, 2, 9, 32, 64, 128, 256]
    number = at_least(0, "token")
    parser.add_argument("--tokens", type=number, nargs="+", default=tokens, help="to carry")
    return parser.parse_args(arguments)
