"""The cells of the long-context evaluation: what is asked, and how each answer is counted.

A cell is one reader, one task and one size; every reader gets the same prompts. Finished cells are
kept as lines of a file, from which a killed run goes on. Knows no paths.

Axes:
    T  token
"""

import json
import os
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from infini_retrofit.longcontext.params import LongcontextParams
from infini_retrofit.longcontext.readers import Reader, cut_after
from infini_retrofit.pipeline.progress import progress
from infini_retrofit.texts.prompts import SEEDS_PER_SPLIT, Haystack, Prompt, PromptMaker

Task = Literal["passkey", "capacity", "needles", "compressions", "distance", "positions"]
FIRST_RANGE = 256  # tokens; each range of positions after it is as long as all before
SHORTEST_SEGMENT = 32  # tokens; a question must fit into one
_PARAMETERS = {"passkey": "lengths", "capacity": "pairs"}  # by task, where they differ


@dataclass(frozen=True, order=True)
class Cell:
    """One reader, task and size."""

    model: str
    task: Task
    haystack: Haystack | Literal["none"]
    tokens: int  # of a prompt or document; of `distance`, between pass key and answer
    depth: float
    number: int  # of pairs, of compressions; of `positions`, which document


@dataclass(frozen=True)
class Result(Cell):
    """What came of a cell.

    Attributes:
        asked: questions.
        chosen: those whose right answer was the likeliest of the candidates.
        greedy: those whose right answer came token by token.
        num_bytes: that the reader keeps at the end.
        nll_sums: in nats, of the ranges of positions that `range_begins` lists.
    """

    asked: int
    chosen: int
    greedy: int
    num_bytes: int
    nll_sums: list[float]

    @property
    def cell(self) -> Cell:
        """Return the cell without its result."""
        return Cell(**{k: v for k, v in asdict(self).items() if k in Cell.__dataclass_fields__})


class Cells:
    """Finished cells in a file of JSON lines; the last may be torn, and is then run again."""

    def __init__(self, path: Path) -> None:
        self.path, self.found = path, {}
        whole = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
        for line in whole:
            result = Result(**json.loads(line))
            self.found[result.cell] = result
        path.write_bytes(b"".join(line + b"\n" for line in whole))

    def add(self, result: Result) -> None:
        """Keep a result, on disk before this returns."""
        self.found[result.cell] = result
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(result)) + "\n")
            file.flush()
            os.fsync(file.fileno())


def plan(params: LongcontextParams, reader: Reader, maker: PromptMaker) -> list[Cell]:
    """List the cells of a reader, without those that are longer than it may read."""
    cells = cells_of(params, reader.name, reader.segment_length, reader.local_context)
    most = reader.most_tokens
    return [cell for cell in cells if not most or num_tokens_of(cell, params, maker) <= most]


def num_tokens_of(cell: Cell, params: LongcontextParams, maker: PromptMaker) -> int:
    """Count the tokens of a cell's longest prompt, question and answer included."""
    if cell.task == "capacity":
        return max(map(_num_tokens, prompts_of(cell, params, maker)))
    return cell.tokens


def longest(params: LongcontextParams, maker: PromptMaker) -> int:
    """Count the tokens of the longest document or prompt that every reader may be asked about."""
    cells = cells_of(params, "", None, 0)
    return max((num_tokens_of(cell, params, maker) for cell in cells), default=1)


def cells_of(
    params: LongcontextParams, name: str, segment_length: int | None, local_context: int
) -> list[Cell]:
    """List the cells of a reader; only one whose memory has segments is asked across them.

    What its attention may still see is not asked of its memory.
    """
    cells = []
    for haystack in params.haystacks:
        cells += [
            Cell(name, "passkey", haystack, tokens, depth, 1)
            for tokens in params.lengths
            for depth in params.depths
        ]
    cells += [Cell(name, "capacity", "none", 0, 0.0, number) for number in params.pairs]
    for haystack in params.haystacks[-1:]:
        if params.lengths:
            shortest = min(params.lengths)
            cells += [Cell(name, "needles", haystack, shortest, 0.0, n) for n in params.needles]
        if segment_length is not None:
            for number in params.compressions:
                least = max(SHORTEST_SEGMENT, segment_length + local_context)
                if (tokens := number * segment_length) >= least:
                    cells.append(Cell(name, "compressions", haystack, tokens, 0.0, number))
                if params.distance // number >= SHORTEST_SEGMENT:
                    cells.append(Cell(name, "distance", haystack, params.distance, 0.0, number))
    for tokens in params.document_tokens:
        cells += [Cell(name, "positions", "none", tokens, 0.0, i) for i in range(params.documents)]
    return cells


def check_prompts(
    params: LongcontextParams, segment_length: int | None, local_context: int, maker: PromptMaker
) -> None:
    """Refuse sizes for a prompt that has no room in them, before any is read."""
    for cell in cells_of(params, "", segment_length, local_context):
        try:
            for _ in prompts_of(cell, params, maker):
                pass
        except ValueError as error:
            name = _PARAMETERS.get(cell.task, cell.task)
            raise ValueError(f"longcontext.{name} must leave room for a prompt: {error}") from error


def run_cells(
    cells: Sequence[Cell],
    params: LongcontextParams,
    reader: Reader,
    maker: PromptMaker,
    documents: Sequence[Int[Tensor, "T"]],
    kept: Cells,
) -> float | None:
    """Run those cells of a reader that are not finished.

    Returns:
        The seconds that a token of the documents took; None: none was scored now.
    """
    left = [cell for cell in cells if cell not in kept.found]
    seconds = num_tokens = 0.0
    for cell in progress(left, f"long context, {reader.name}", "cells"):
        if cell.task == "positions":
            begin = time.perf_counter()
            kept.add(run_document(reader, cell, documents[cell.number][: cell.tokens]))
            seconds, num_tokens = seconds + time.perf_counter() - begin, num_tokens + cell.tokens
        elif cell.task == "distance":
            with cut_after(reader.model, cell.tokens // cell.number):
                kept.add(run_prompts(reader, cell, prompts_of(cell, params, maker)))
        else:
            kept.add(run_prompts(reader, cell, prompts_of(cell, params, maker)))
    return seconds / num_tokens if num_tokens else None


def prompts_of(cell: Cell, params: LongcontextParams, maker: PromptMaker) -> Iterator[Prompt]:
    """Make the prompts of a cell: the same for every reader, and no other cell's."""
    about = (cell.task, cell.haystack, cell.tokens, cell.depth, cell.number)
    for sample in range(params.samples):
        seed = random.Random(f"{about} {sample}").randrange(SEEDS_PER_SPLIT)
        if cell.task == "passkey":
            yield maker.passkey(seed, cell.haystack, cell.tokens, cell.depth)
        elif cell.task == "capacity":
            yield maker.pairs(seed, cell.number, params.questions)
        elif cell.task == "needles":
            questions = params.questions
            yield maker.pairs(seed, cell.number, questions, cell.haystack, cell.tokens)
        elif cell.task != "positions":
            yield maker.passkey_at(seed, cell.haystack, cell.tokens)


def run_prompts(reader: Reader, cell: Cell, prompts: Iterator[Prompt]) -> Result:
    """Read each prompt once, and ask all of its questions."""
    asked = chosen = greedy = num_tokens = 0
    for prompt in prompts:
        num_tokens = max(num_tokens, _num_tokens(prompt))
        cache = reader.read(torch.tensor(prompt.input_ids), _num_tokens(prompt))
        for question in prompt.questions:
            is_chosen, is_greedy = reader.answer(cache, question)
            asked, chosen, greedy = asked + 1, chosen + is_chosen, greedy + is_greedy
    counts = _counts(asked, chosen, greedy)
    return Result(**asdict(cell), **counts, num_bytes=reader.num_bytes(num_tokens), nll_sums=[])


def run_document(reader: Reader, cell: Cell, document: Int[Tensor, "T"]) -> Result:
    """Score a document, and sum the loss in each range of positions."""
    nlls = reader.nlls(document).double()
    begins = [*range_begins(cell.tokens), cell.tokens]
    ranges = zip([1, *begins[1:]], begins[1:], strict=False)
    sums = [float(nlls[begin - 1 : end - 1].sum()) for begin, end in ranges]
    num_bytes = reader.num_bytes(cell.tokens)
    return Result(**asdict(cell), **_counts(0, 0, 0), num_bytes=num_bytes, nll_sums=sums)


def _num_tokens(prompt: Prompt) -> int:
    """Count the tokens of a prompt, its longest question and answer included."""
    asked = max(len(q.input_ids) + len(q.candidates[0]) for q in prompt.questions)
    return len(prompt.input_ids) + asked


def _counts(asked: int, chosen: int, greedy: int) -> dict[str, int]:
    return {"asked": asked, "chosen": chosen, "greedy": greedy}


def range_begins(num_tokens: int) -> list[int]:
    """Return where each range of positions begins: 0, 256, 512, 1,024 and so on."""
    begins = [0]
    while (begin := max(FIRST_RANGE, 2 * begins[-1])) < num_tokens:
        begins.append(begin)
    return begins


def metrics_of(results: Sequence[Result]) -> dict[str, int | float]:
    """Return the numbers of one reader: shares of right answers, and nats a token."""
    found: dict[str, int | float] = {"num_asked": sum(r.asked for r in results)}
    # With segments of another length it is another model.
    own = [r for r in results if r.task != "distance"]
    found["state_bytes"] = max(r.num_bytes for r in own or results)
    for task in ("passkey", "capacity", "needles", "compressions", "distance"):
        own = [r for r in results if r.task == task]
        if own:
            found[f"{task}_accuracy"] = _share(own, "chosen")
            found[f"{task}_greedy"] = _share(own, "greedy")
    if own := [r for r in results if r.task == "passkey"]:
        found["passkey_worst_cell"] = min(r.chosen / r.asked for r in own)
    rows = position_rows(results)
    if rows:
        found["first_range_nll"], found["last_range_nll"] = rows[0]["nll"], rows[-1]["nll"]
    return found


def _share(results: Sequence[Result], count: str) -> float:
    return sum(getattr(r, count) for r in results) / sum(r.asked for r in results)


def grid_rows(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Return the rows of the pass key's plot."""
    return [
        {
            "model": r.model,
            "haystack": r.haystack,
            "tokens": r.tokens,
            "depth": r.depth,
            "accuracy": r.chosen / r.asked,
            "greedy": r.greedy / r.asked,
            "num_asked": r.asked,
        }
        for r in results
        if r.task == "passkey"
    ]


def recall_rows(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Return the rows of the plot of the other questions, by their number."""
    return [
        {
            "model": r.model,
            "task": r.task,
            "number": r.number,
            "tokens": r.tokens,
            "accuracy": r.chosen / r.asked,
            "greedy": r.greedy / r.asked,
            "num_asked": r.asked,
            "num_bytes": r.num_bytes,
        }
        for r in results
        if r.asked and r.task != "passkey"
    ]


def position_rows(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Return the rows of the plot of the loss by position, means over documents."""
    own = [r for r in results if r.task == "positions"]
    rows = []
    for model, tokens in dict.fromkeys((r.model, r.tokens) for r in own):
        alike = [r for r in own if (r.model, r.tokens) == (model, tokens)]
        begins = [*range_begins(tokens), tokens]
        for i, begin in enumerate(begins[:-1]):
            num_scored = (begins[i + 1] - max(begin, 1)) * len(alike)
            nll = sum(r.nll_sums[i] for r in alike) / num_scored
            rows.append(
                {
                    "model": model,
                    "position": begin,
                    "nll": nll,
                    "num_scored": num_scored,
                    "num_bytes": alike[0].num_bytes,
                }
            )
    return rows
