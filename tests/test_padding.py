"""Padding is neither attended to nor written, and no time passes while it lasts."""

import pytest
import torch
from torch import Tensor

from infini_retrofit.layer.attention import InfiniAttention
from infini_retrofit.layer.compressive_memory import CompressiveMemory
from infini_retrofit.layer.cut import Cut
from infini_retrofit.layer.state import State
from tests.reference import (
    LAYER,
    PUBLISHED,
    SEGMENT,
    WIDTH,
    draw_hidden,
    every_form,
    largest,
    make_layer,
    rope_tables,
    run_layer,
)

TOKENS = 3 * SEGMENT
LENGTHS = (9, 8, 6, 5, 3, 2)  # tokens of the rows of a batch; k * SEGMENT and others


def memory_of(state: State, row: int) -> Tensor:
    memory = state.after[LAYER].memory
    return torch.cat([memory.matrix[row].flatten(), memory.normalizer[row].flatten()]).double()


def writes_at_once(form: dict) -> bool:
    """Return whether no segment waits: a waiting one is written after padding as after tokens."""
    return form["local_context"] < SEGMENT


def real_tokens(side: str) -> list[slice]:
    return [slice(TOKENS - n, None) if side == "left" else slice(0, n) for n in LENGTHS]


def run_padded(layer: InfiniAttention, side: str) -> tuple[float, float, float]:
    """Return how far padded rows are from rows alone, their memories, and memories not told."""
    x, real = draw_hidden(len(LENGTHS), TOKENS), real_tokens(side)
    is_token = torch.zeros(len(LENGTHS), TOKENS, dtype=torch.bool)
    for row, tokens in enumerate(real):
        is_token[row, tokens] = True
    x[~is_token] = 7.0
    told, untold = State(), State()
    out = run_layer(layer, x, cut=Cut(is_token=is_token), state=told)
    run_layer(layer, x, state=untold)
    output, memory, ignored = 0.0, 0.0, float("inf")
    for row, tokens in enumerate(real):
        alone = State()
        want = run_layer(layer, x[row : row + 1, tokens], first=tokens.start, state=alone)
        output = max(output, largest(out[row, tokens] - want[0]))
        memory = max(memory, largest(memory_of(told, row) - memory_of(alone, 0)))
        if LENGTHS[row] < TOKENS:
            ignored = min(ignored, largest(memory_of(untold, row) - memory_of(alone, 0)))
    return output, memory, ignored


@every_form
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a_padded_batch_equals_unpadded_rows_memory_included(form, side):
    output, memory, ignored = run_padded(make_layer(form), side)
    assert output < 1e-9
    if writes_at_once(form):
        assert memory < 1e-9
        assert ignored > 1e-3


@every_form
@torch.no_grad()
def test_a_folded_document_that_ends_in_padding_equals_the_document_alone(form):
    layer, x = make_layer(form), draw_hidden(2, TOKENS)
    tables = [t.expand(2, -1, -1).reshape(6, SEGMENT, -1) for t in rope_tables(TOKENS)]
    for num_tokens in LENGTHS[1:]:
        is_token = torch.ones(2, TOKENS, dtype=torch.bool)
        is_token[1, num_tokens:] = False
        told, untold, alone = State(), State(), State()
        rows, cut = x.view(6, SEGMENT, WIDTH), Cut(3, is_token=is_token.view(6, SEGMENT))
        out = layer(rows, tuple(tables), cut, told)[0].view_as(x)
        layer(rows, tuple(tables), Cut(3), untold)
        want = run_layer(layer, x[1:, :num_tokens], state=alone)
        assert largest(out[1, :num_tokens] - want[0]) < 1e-9
        if writes_at_once(form):
            assert largest(memory_of(told, 1) - memory_of(alone, 0)) < 1e-9
            assert largest(memory_of(untold, 1) - memory_of(alone, 0)) > 1e-3


def test_padding_that_counts_as_time_is_noticed(monkeypatch):
    write = CompressiveMemory._write

    def with_time(memory: CompressiveMemory, *tokens: Tensor):
        return write(memory, *tokens)[0], write(memory, *tokens[:-1], None)[1]

    monkeypatch.setattr(CompressiveMemory, "_write", with_time)
    assert run_padded(make_layer(PUBLISHED | {"decay": "feature"}), "right")[1] > 1e-3


def test_a_memory_that_forgets_at_once_is_not_spoilt_by_long_padding():
    layer, x = make_layer(PUBLISHED | {"decay": "feature"}), draw_hidden(2, TOKENS).requires_grad_()
    layer.memory.decay_logit.data[:] = 7.0
    is_token = torch.ones(2, TOKENS, dtype=torch.bool)
    is_token[:, SEGMENT + 1 :] = False
    out = run_layer(layer, x, cut=Cut(is_token=is_token))
    gradients = torch.autograd.grad(out.sum(), [x, layer.memory.decay_logit])
    assert all(g.isfinite().all() for g in (out, *gradients))
