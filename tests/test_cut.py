"""Cutting rows into segments, checked by the number of each token."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from infini_retrofit.layer.cut import Cut, Layout

ROWS, TOKENS, HEADS, SIZE = 2, 11, 3, 5
WIDTH = HEADS * SIZE


def numbered(num_rows: int = ROWS, num_tokens: int = TOKENS) -> Tensor:
    """Return (R T HK) whose every value says its row, token, head and channel."""
    rows, tokens, channels = torch.meshgrid(
        torch.arange(1, num_rows + 1), torch.arange(num_tokens), torch.arange(WIDTH), indexing="ij"
    )
    return (10_000 * rows + 100 * tokens + channels).double()


def number(row: int, token: int, head: int = 0, channel: int = 0) -> int:
    return 10_000 * (row + 1) + 100 * token + head * SIZE + channel


def padded_left_and_right() -> Tensor:
    """Return where rows have tokens: the last 8 of the first, the first 8 of the second."""
    is_token = torch.ones(ROWS, TOKENS, dtype=torch.bool)
    is_token[0, :3] = False
    is_token[1, 8:] = False
    return is_token


def misplaced(split: Callable[[Layout, Tensor], Tensor]) -> int:
    """Cut rows of 11 tokens into segments of 4; count the values in a wrong place."""
    x = split(Layout(numbered(), Cut(), 4), numbered())
    assert x.shape == (ROWS, 3, HEADS, 4, SIZE)
    places = torch.cartesian_prod(*map(torch.arange, (ROWS, TOKENS, HEADS, SIZE))).tolist()
    return sum(int(x[r, t // 4, h, t % 4, c] != number(r, t, h, c)) for r, t, h, c in places)


def scrambled_split(layout: Layout, x: Tensor) -> Tensor:
    """Split heads by a view alone: the right shape, and tokens spread over heads."""
    return layout._grid(x).reshape(*layout.grid[:2], HEADS, layout.grid[2], SIZE)


def test_every_value_lands_in_its_segment_and_head():
    assert misplaced(lambda layout, x: layout.split(x, HEADS)) == 0
    assert misplaced(scrambled_split) > 100


@pytest.mark.parametrize(
    ("cut", "grid"),
    [
        (Cut(segment_length=1), (ROWS, 11, 1)),
        (Cut(), (ROWS, 3, 4)),
        (Cut(segment_length=6), (ROWS, 2, 6)),
        (Cut(segment_length=13), (ROWS, 1, TOKENS)),  # no longer than the row
        (Cut(num_segments=2), (1, 2, TOKENS)),
        (Cut(is_token=padded_left_and_right()), (ROWS, 3, 4)),
    ],
)
def test_join_undoes_split(cut, grid):
    x = numbered()
    layout = Layout(x, cut, 4)
    assert layout.grid == grid
    assert torch.equal(layout.join(layout.split(x, HEADS)), x)


def test_what_fills_the_last_segment_is_no_token():
    layout = Layout(numbered(), Cut(), 4)
    want = torch.tensor([[True] * 4, [True] * 4, [True] * 3 + [False]])
    assert torch.equal(layout.mask(torch.device("cpu")), want.expand(ROWS, -1, -1))
    whole = Layout(numbered(num_tokens=12), Cut(), 4)
    assert whole.is_token is None
    assert whole.mask(torch.device("cpu")).all()


def test_folded_rows_become_the_segments_of_their_document():
    x = numbered(num_rows=6, num_tokens=4)
    y = Layout(x, Cut(num_segments=3), 999).split(x, HEADS)
    assert y.shape == (2, 3, HEADS, 4, SIZE)
    assert y[1, 2, 1, 3, 4] == number(5, 3, 1, 4)
    with pytest.raises(AssertionError, match="whole documents"):
        Layout(numbered(num_rows=5), Cut(num_segments=3), 4)


def test_padding_on_either_side_goes_to_the_end_of_the_document_and_positions_too():
    layout = Layout(numbered(), Cut(is_token=padded_left_and_right()), 4)
    tokens = layout.split(numbered(), HEADS).transpose(2, 3).flatten(1, 2)[:, :, 0, 0]
    assert tokens[0, :8].tolist() == [number(0, t) for t in range(3, 11)]
    assert tokens[1, :8].tolist() == [number(1, t) for t in range(8)]
    assert layout.is_token.flatten(1).tolist() == [[True] * 8 + [False] * 4] * 2
    for positions in (table(1, TOKENS), table(ROWS, TOKENS)):
        split = layout.split_positions(positions)
        assert torch.equal(split[0, 0, 0], positions[0, 3:7])
        assert torch.equal(split[1, 0, 0], positions[-1, :4])


def table(num_rows: int, num_tokens: int) -> Tensor:
    return torch.arange(num_rows * num_tokens * 2).view(num_rows, num_tokens, 2).double()


def test_one_position_table_serves_all_folded_rows():
    layout = Layout(numbered(num_rows=6, num_tokens=4), Cut(num_segments=3), 999)
    one = layout.split_positions(table(1, 4)).expand(2, 3, 1, 4, 2)
    assert torch.equal(one[1, 2, 0], table(1, 4)[0])
    each = layout.split_positions(table(6, 4))
    assert torch.equal(each[1, 2, 0], table(6, 4)[5])


@pytest.mark.parametrize("num_tokens", [12, 11])
def test_one_position_table_serves_all_rows_cut_in_layer(num_tokens):
    layout = Layout(numbered(num_tokens=num_tokens), Cut(), 4)
    split = layout.split_positions(table(1, num_tokens)).expand(ROWS, 3, 1, 4, 2)
    assert torch.equal(split[1, 1, 0], table(1, num_tokens)[0, 4:8])
    assert torch.equal(split[1, 2, 0, :3], table(1, num_tokens)[0, 8:11])
