"""No token hears a later one, no document another, and what was stored can be learned.

Each property is a number that must be 0 (or must not), measured on our layer and on a broken one.
"""

import pytest
import torch
from torch import Tensor

from infini_retrofit import attention
from infini_retrofit.attention import InfiniAttention
from infini_retrofit.carrier import Carrier, SegmentCut
from infini_retrofit.memory import MemoryState, prefix_states
from infini_retrofit.retrofit import insert_infini
from infini_retrofit.segments import run_folded, run_in_layer
from tests.reference import infini_params, largest
from tests.tiny import FAMILIES, random_ids, tiny_model

SEGMENT, DOCUMENT = 5, 15
LAYER = 1


def retrofitted(family: str, **over: object):
    model = tiny_model(family)
    insert_infini(model, infini_params(**over))
    return model


def infini_layer(**over: object) -> InfiniAttention:
    params = infini_params(positions="none", **over)
    shape = attention.AttentionShape(
        hidden_size=26, num_heads=4, num_kv_heads=2, head_dim=7, qkv_bias=True, o_bias=True
    )
    torch.manual_seed(3)
    return InfiniAttention(shape, params, LAYER)


def draw_input(num_rows: int = 2, num_tokens: int = DOCUMENT) -> Tensor:
    return torch.randn(num_rows, num_tokens, 26, generator=torch.Generator().manual_seed(0))


def early_change(layer: InfiniAttention, x: Tensor) -> tuple[float, float]:
    """Change each token in turn; return how far earlier outputs move, and how far its own."""
    want, early, own = layer(x)[0], 0.0, float("inf")
    for t in range(1, x.shape[1]):
        other = x.clone()
        other[:, t] += 1
        moved = layer(other)[0] - want
        early, own = max(early, largest(moved[:, :t])), min(own, largest(moved[:, t]))
    return early, own


@pytest.mark.parametrize("num_tokens", [DOCUMENT, 13])
@pytest.mark.parametrize("over", [{}, {"local": "linear"}, {"local_context": 3}])
def test_no_token_hears_a_later_one(over, num_tokens):
    early, own = early_change(infini_layer(**over), draw_input(num_tokens=num_tokens))
    assert early == 0
    assert own > 0.01


def scrambled_split(cut: SegmentCut, x: Tensor, num_heads: int) -> Tensor:
    """Split heads by a view alone: the right shape, and tokens spread over heads."""
    return x.reshape(*cut.grid[:2], num_heads, cut.grid[2], -1)


def prefix_by_subtraction(written: MemoryState, initial: MemoryState | None):
    """Find what each segment finds as `cumsum - own`: the same but for rounding."""
    matrix, normalizer = written.matrix.cumsum(1), written.normalizer.cumsum(1)
    before = MemoryState(matrix - written.matrix, normalizer - written.normalizer)
    return before, MemoryState(matrix[:, -1], normalizer[:, -1])


def test_heads_split_by_a_view_hear_later_tokens(monkeypatch):
    monkeypatch.setattr(SegmentCut, "split", scrambled_split)
    assert early_change(infini_layer(), draw_input())[0] > 0.01


def test_a_prefix_by_subtraction_leaks_bits(monkeypatch):
    monkeypatch.setattr(attention, "prefix_states", prefix_by_subtraction)
    assert 0 < early_change(infini_layer(), draw_input())[0] < 1e-3


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("run", [run_in_layer, run_folded])
def test_no_token_of_a_whole_model_hears_a_later_one(family, run):
    model = retrofitted(family, local_context=2)
    ids = random_ids(model.config.vocab_size, 2, DOCUMENT)
    with torch.no_grad():
        want = run(model, ids, SEGMENT)
        for t in (1, 4, 5, 9, 10, 14):
            other = ids.clone()
            other[:, t] = (other[:, t] + 1) % model.config.vocab_size
            moved = run(model, other, SEGMENT) - want
            assert moved[:, :t].count_nonzero() == 0
            assert largest(moved[:, t:]) > 0.01


def strangers_share(x: Tensor) -> float:
    """Return how far a document's output depends on what else is in the batch, or was before."""
    layer = infini_layer()
    alone = torch.cat([layer(row[None])[0] for row in x])
    together, again, turned = layer(x)[0], layer(x)[0], layer(x.flip(0))[0].flip(0)
    return max(largest(together - other) for other in (alone, again, turned))


class LivingMemory:
    """A memory kept between calls, as a module attribute keeps it."""

    def __init__(self) -> None:
        self.state: MemoryState | None = None

    def __call__(self, written: MemoryState, initial: MemoryState | None):
        """Start with what the call before left, whoever's it was."""
        mean = self.state and MemoryState(
            self.state.matrix.mean(0, keepdim=True).expand_as(written.matrix[:, 0]),
            self.state.normalizer.mean(0, keepdim=True).expand_as(written.normalizer[:, 0]),
        )
        before, after = prefix_states(written, mean)
        self.state = after.detach()
        return before, after


def prefix_of_the_batch(written: MemoryState, initial: MemoryState | None):
    """Average the memory over the batch."""
    mean = [x.mean(0, keepdim=True).expand_as(x) for x in (written.matrix, written.normalizer)]
    return prefix_states(MemoryState(*mean), initial)


def test_two_documents_in_a_batch_equal_two_apart_in_any_order():
    assert strangers_share(draw_input(3)) < 1e-5


@pytest.mark.parametrize("make_broken", [LivingMemory, lambda: prefix_of_the_batch])
def test_a_memory_that_lives_on_or_is_averaged_mixes_documents(make_broken, monkeypatch):
    monkeypatch.setattr(attention, "prefix_states", make_broken())
    assert strangers_share(draw_input(3)) > 0.01


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_leaves_nothing_in_the_model(family):
    model = retrofitted(family, local_context=2)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    attributes = {name: set(vars(m)) for name, m in model.named_modules()}
    run_folded(model, random_ids(67, 2, DOCUMENT), SEGMENT)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert attributes == {name: set(vars(m)) for name, m in model.named_modules()}
    assert not any("matrix" in name or "normalizer" in name for name in after)
    assert len(list(model.buffers())) == len(list(tiny_model(family).buffers()))


def detached_prefix(written: MemoryState, initial: MemoryState | None):
    before, after = prefix_states(written, initial)
    return before.detach(), after.detach()


@pytest.mark.parametrize("detached", [False, True])
def test_the_loss_of_a_segment_teaches_keys_of_long_before_unless_detached(detached, monkeypatch):
    if detached:
        monkeypatch.setattr(attention, "prefix_states", detached_prefix)
    layer, x = infini_layer(), draw_input()
    key = layer.k_proj(x).detach().requires_grad_()
    layer.k_proj.forward = lambda _: key
    layer(x)[0][:, -SEGMENT:].square().sum().backward()
    taught = largest(key.grad[:, :SEGMENT])
    assert taught == 0 if detached else taught > 1e-3


def test_the_gradient_crosses_calls_unless_it_is_cut():
    for cut in (False, True):
        layer, x, first = infini_layer(), draw_input().requires_grad_(), Carrier()
        layer(x[:, :SEGMENT], carrier=first)
        carried = first.after[LAYER]
        if cut:
            carried = type(carried)(carried.memory.detach(), carried.context)
        out = layer(x[:, SEGMENT:], carrier=Carrier(before={LAYER: carried}))[0]
        (gradient,) = torch.autograd.grad(out.sum(), x)
        assert (largest(gradient[:, :SEGMENT]) > 1e-3) is not cut


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_equals_unpadded_rows_memory_included(side):
    layer, x, num_padding = infini_layer(local_context=3), draw_input(2, 13), 4
    row = x[1, : 13 - num_padding]
    padding = torch.full((num_padding, 26), 7.0)
    padded = torch.cat([padding, row] if side == "left" else [row, padding])
    is_token = torch.ones(2, 13, dtype=torch.bool)
    is_token[1, slice(0, num_padding) if side == "left" else slice(-num_padding, None)] = False
    batch = torch.stack([x[0], padded])
    told, untold, alone = Carrier(is_token=is_token), Carrier(), Carrier()
    out, want = layer(batch, carrier=told)[0][1], layer(row[None], carrier=alone)[0][0]
    layer(batch, carrier=untold)
    assert largest(out[is_token[1]] - want) < 1e-5
    errors = [
        largest(c.after[LAYER].memory.normalizer[1] - alone.after[LAYER].memory.normalizer[0])
        for c in (told, untold)
    ]
    assert errors[0] < 1e-4
    assert errors[1] > 1


def test_a_folded_document_that_ends_in_padding_equals_the_document_alone():
    layer, x, num_tokens = infini_layer(local_context=3), draw_input(2), 8
    is_token = torch.ones(2, DOCUMENT, dtype=torch.bool)
    is_token[1, num_tokens:] = False
    told = Carrier(num_segments=3, is_token=is_token.view(6, SEGMENT))
    untold, alone = Carrier(num_segments=3), Carrier()
    out = layer(x.view(6, SEGMENT, -1), carrier=told)[0].view_as(x)
    layer(x.view(6, SEGMENT, -1), carrier=untold)
    want = layer(x[1:, :num_tokens], carrier=alone)[0]
    assert largest(out[1, :num_tokens] - want[0]) < 1e-5
    states = [c.after[LAYER].memory.matrix[-1] for c in (told, untold, alone)]
    assert largest(states[0] - states[2]) < 1e-4
    assert largest(states[1] - states[2]) > 1
