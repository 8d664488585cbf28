"""Cutting rows into segments, checked by the number of each token."""

import pytest
import torch
from torch import Tensor

from infini_retrofit.layer.cut import Cut, Layout

ROWS, TOKENS, HEADS, SIZE, LENGTH = 2, 11, 3, 5, 4
# The last 8 tokens of the first row, and the first 8 of the second.
PADDED = torch.ones(ROWS, TOKENS, dtype=torch.bool)
PADDED[0, :3] = PADDED[1, 8:] = False
EACH_ROW = [[(row, t) for t in range(TOKENS)] for row in range(ROWS)]
# How rows are cut, the grid that comes of it, and the (row, token) of each document in order.
CUTS = [
    (Cut(), (ROWS, 3, LENGTH), EACH_ROW),
    (Cut(segment_length=1), (ROWS, TOKENS, 1), EACH_ROW),
    (Cut(segment_length=6), (ROWS, 2, 6), EACH_ROW),
    (Cut(segment_length=13), (ROWS, 1, TOKENS), EACH_ROW),  # no longer than the row
    (Cut(num_segments=1), (ROWS, 1, TOKENS), EACH_ROW),
    (Cut(num_segments=2), (1, 2, TOKENS), [EACH_ROW[0] + EACH_ROW[1]]),
    (
        Cut(is_token=PADDED),
        (ROWS, 3, LENGTH),
        [[(0, t) for t in range(3, TOKENS)], [(1, t) for t in range(8)]],
    ),
]


def numbered(num_rows: int = ROWS) -> Tensor:
    """Return (R T HK) of which no two values are equal, none of them zero."""
    shape = (num_rows, TOKENS, HEADS * SIZE)
    return torch.arange(1, 1 + torch.Size(shape).numel()).view(shape).double()


def scrambled_split(layout: Layout, x: Tensor, num_heads: int) -> Tensor:
    """Split heads by a view alone: the right shape, and tokens spread over heads."""
    return layout._grid(x).reshape(*layout.grid[:2], num_heads, layout.grid[2], -1)


def num_misplaced(cut: Cut, documents: list[list[tuple[int, int]]], split) -> int:
    """Count the tokens that are not where they belong."""
    x, layout = numbered(), Layout(numbered(), cut, LENGTH)
    by_token = split(layout, x, HEADS).transpose(2, 3).flatten(3).flatten(1, 2)
    expected = torch.zeros_like(by_token)
    for document, tokens in enumerate(documents):
        for place, (row, token) in enumerate(tokens):
            expected[document, place] = x[row, token]
    is_token = layout.mask(x.device).flatten(1, 2)
    return int((is_token * (by_token != expected).any(-1)).sum())


@pytest.mark.parametrize(("cut", "grid", "documents"), CUTS)
def test_every_token_lands_in_its_document_segment_and_head(cut, grid, documents):
    x, layout = numbered(), Layout(numbered(), cut, LENGTH)
    assert layout.grid == grid
    assert num_misplaced(cut, documents, Layout.split) == 0
    assert num_misplaced(cut, documents, scrambled_split) > 0 or grid[2] == 1
    places = grid[1] * grid[2]
    is_token = [[True] * len(d) + [False] * (places - len(d)) for d in documents]
    assert layout.mask(x.device).flatten(1).tolist() == is_token
    assert (layout.is_token is None) == all(map(all, is_token))
    assert torch.equal(layout.join(layout.split(x, HEADS)), x)


@pytest.mark.parametrize(("cut", "grid", "documents"), CUTS)
@pytest.mark.parametrize("num_tables", [1, ROWS])
def test_positions_move_with_their_tokens(cut, grid, documents, num_tables):
    table = torch.arange(num_tables * TOKENS * 2).view(num_tables, TOKENS, 2).double()
    split = Layout(numbered(), cut, LENGTH).split_positions(table)
    split = split.expand(*grid[:2], 1, grid[2], 2)[:, :, 0].flatten(1, 2)
    for document, tokens in enumerate(documents):
        want = [table[row % num_tables, token] for row, token in tokens]
        assert torch.equal(split[document, : len(tokens)], torch.stack(want))


def test_folded_rows_that_fill_no_whole_document_are_our_own_slip():
    with pytest.raises(AssertionError, match="whole documents"):
        Layout(numbered(num_rows=5), Cut(num_segments=3), LENGTH)
