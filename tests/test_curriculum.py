"""Into what pieces the documents of a step are cut."""

import pytest
import torch

from infini_retrofit.training.curriculum import WHOLE_FROM, choose_length, piece_lengths, recut

NUM_STEPS = 90


@pytest.mark.parametrize(
    ("num_segments", "lengths"),
    [
        (1, [1]),
        (2, [2]),
        (3, [3]),
        (7, [7]),
        (8, [2, 4, 8]),
        (12, [2, 4, 12]),
        (16, [2, 4, 8, 16]),
    ],
)
def test_pieces_are_two_four_and_so_on_where_a_document_has_whole_ones(num_segments, lengths):
    assert piece_lengths(num_segments) == lengths


@pytest.mark.parametrize("length", [2, 6])
def test_pieces_hold_every_token_once_and_in_order(length):
    documents = torch.arange(3 * 12).reshape(3, 12)
    pieces = recut(documents, length)
    assert pieces.shape == (36 // length, length)
    assert torch.equal(pieces.flatten(), documents.flatten())
    assert all(len({int(token) // 12 for token in piece}) == 1 for piece in pieces)


def test_a_piece_is_a_whole_part_of_one_document():
    with pytest.raises(AssertionError):
        recut(torch.arange(24).reshape(2, 12), 8)


def test_a_curriculum_goes_through_all_lengths_and_ends_with_whole_documents():
    chosen = [choose_length("curriculum", 16, step, NUM_STEPS, seed=0) for step in range(NUM_STEPS)]
    assert chosen == sorted(chosen)
    assert chosen.index(16) == WHOLE_FROM * NUM_STEPS
    assert [chosen.count(n) for n in (2, 4, 8, 16)] == [20, 20, 20, 30]
    assert [choose_length("curriculum", 16, step, 2, seed=0) for step in range(2)] == [2, 8]


def test_random_lengths_are_of_all_kinds_and_a_function_of_seed_and_step_alone():
    def draw(seed: int) -> list[int]:
        return [choose_length("random", 16, step, NUM_STEPS, seed) for step in range(NUM_STEPS)]

    assert draw(0) == draw(0) != draw(1)
    assert min(draw(0).count(n) for n in (2, 4, 8, 16)) > NUM_STEPS / 8
    assert draw(0)[57] == choose_length("random", 16, 57, 7 * NUM_STEPS, 0)


@pytest.mark.parametrize("how", ["all", "random", "curriculum"])
def test_a_document_that_no_power_of_two_divides_stays_whole(how):
    assert {choose_length(how, 7, step, NUM_STEPS, seed=0) for step in range(NUM_STEPS)} == {7}


def test_without_a_word_documents_stay_whole():
    assert choose_length("all", 16, 0, NUM_STEPS, seed=0) == 16
