"""Cutting rows into segments, checked by the number of each token."""

import pytest
import torch
from torch import Tensor

from infini_retrofit.layer.cut import SegmentCut
from infini_retrofit.layer.state import Carrier

ROWS, TOKENS, HEADS, SIZE = 2, 11, 3, 5
WIDTH = HEADS * SIZE


def numbered(num_rows: int = ROWS, num_tokens: int = TOKENS) -> Tensor:
    """Return (R T HK) whose every value tells its row, token, head and channel."""
    rows, tokens, channels = torch.meshgrid(
        torch.arange(1, num_rows + 1), torch.arange(num_tokens), torch.arange(WIDTH), indexing="ij"
    )
    return (10_000 * rows + 100 * tokens + channels).double()


def number(row: int, token: int, head: int, channel: int) -> int:
    return 10_000 * (row + 1) + 100 * token + head * SIZE + channel


def misplaced(split) -> int:
    """Cut rows of 11 tokens into segments of 4; count the values in a wrong place."""
    cut = SegmentCut(numbered(), Carrier(), 4)
    x = split(cut, numbered())
    assert x.shape == (ROWS, 3, HEADS, 4, SIZE)
    wrong = 0
    for r in range(ROWS):
        for t in range(TOKENS):
            for h in range(HEADS):
                for c in range(SIZE):
                    wrong += int(x[r, t // 4, h, t % 4, c] != number(r, t, h, c))
    return wrong


def scrambled_split(cut: SegmentCut, x: Tensor) -> Tensor:
    """Split heads by a view alone: the right shape, and tokens spread over heads."""
    return cut._grid(x).reshape(*cut.grid[:2], HEADS, cut.grid[2], SIZE)


def test_every_value_lands_in_its_segment_and_head():
    assert misplaced(lambda cut, x: cut.split(x, HEADS)) == 0
    assert misplaced(scrambled_split) > 100


@pytest.mark.parametrize("length", [1, 4, 11, 13])
def test_join_undoes_split(length):
    x = numbered()
    cut = SegmentCut(x, Carrier(), length)
    assert torch.equal(cut.join(cut.split(x, HEADS)), x)


def test_a_segment_is_no_longer_than_its_row():
    assert SegmentCut(numbered(), Carrier(), 13).grid == (ROWS, 1, TOKENS)
    assert SegmentCut(numbered(), Carrier(segment_length=6), 4).grid == (ROWS, 2, 6)


def test_what_fills_the_last_segment_is_no_token():
    cut = SegmentCut(numbered(), Carrier(), 4)
    want = torch.tensor([[True] * 4, [True] * 4, [True] * 3 + [False]])
    assert torch.equal(cut.mask(torch.device("cpu")), want.expand(ROWS, -1, -1))
    whole = SegmentCut(numbered(num_tokens=12), Carrier(), 4)
    assert whole.is_token is None
    assert whole.mask(torch.device("cpu")).all()


def test_folded_rows_become_the_segments_of_their_document():
    x = numbered(num_rows=6, num_tokens=4)
    cut = SegmentCut(x, Carrier(num_segments=3), 999)
    y = cut.split(x, HEADS)
    assert y.shape == (2, 3, HEADS, 4, SIZE)
    assert y[1, 2, 1, 3, 4] == number(5, 3, 1, 4)
    assert torch.equal(cut.join(y), x)


def test_folded_rows_that_fill_no_whole_document_are_our_own_slip():
    with pytest.raises(AssertionError, match="whole documents"):
        SegmentCut(numbered(num_rows=5), Carrier(num_segments=3), 4)


def test_padding_on_either_side_goes_to_the_end_of_the_document():
    is_token = torch.ones(ROWS, TOKENS, dtype=torch.bool)
    is_token[0, :3] = False
    is_token[1, 8:] = False
    x = numbered()
    cut = SegmentCut(x, Carrier(is_token=is_token), 4)
    tokens = cut.split(x, HEADS).transpose(2, 3).flatten(1, 2)[:, :, 0, 0]
    assert tokens[0, :8].tolist() == [number(0, t, 0, 0) for t in range(3, 11)]
    assert tokens[1, :8].tolist() == [number(1, t, 0, 0) for t in range(8)]
    assert cut.is_token.flatten(1).tolist() == [[True] * 8 + [False] * 4] * 2
    assert torch.equal(cut.join(cut.split(x, HEADS)), x)
    unmoved = SegmentCut(x, Carrier(), 4)
    assert unmoved.split(x, HEADS)[0, 0, 0, 0, 0] == number(0, 0, 0, 0)


def table(num_rows: int, num_tokens: int) -> Tensor:
    return torch.arange(num_rows * num_tokens * 2).view(num_rows, num_tokens, 2).double()


def test_one_position_table_serves_all_folded_rows():
    x = numbered(num_rows=6, num_tokens=4)
    cut = SegmentCut(x, Carrier(num_segments=3), 999)
    one = cut.split_positions(table(1, 4)).expand(2, 3, 1, 4, 2)
    assert torch.equal(one[1, 2, 0], table(1, 4)[0])
    each = cut.split_positions(table(6, 4))
    assert torch.equal(each[1, 2, 0], table(6, 4)[5])


@pytest.mark.parametrize("num_tokens", [12, 11])
def test_one_position_table_serves_all_rows_cut_in_layer(num_tokens):
    cut = SegmentCut(numbered(num_tokens=num_tokens), Carrier(), 4)
    split = cut.split_positions(table(1, num_tokens)).expand(ROWS, 3, 1, 4, 2)
    assert torch.equal(split[1, 1, 0], table(1, num_tokens)[0, 4:8])
    assert torch.equal(split[1, 2, 0, :3], table(1, num_tokens)[0, 8:11])


def test_positions_move_with_their_tokens():
    is_token = torch.ones(ROWS, TOKENS, dtype=torch.bool)
    is_token[0, :3] = False
    cut = SegmentCut(numbered(), Carrier(is_token=is_token), 4)
    for positions in (table(1, TOKENS), table(ROWS, TOKENS)):
        split = cut.split_positions(positions)
        assert torch.equal(split[0, 0, 0], positions[0, 3:7])
        assert torch.equal(split[1, 0, 0], positions[-1, :4])
