"""No token reads a later one, no document another, and keys learn what to store.

Each property is a number that must be 0, and is not for a broken layer.
"""

import pytest
import torch
from torch import Tensor

from infini_retrofit.layer import compressive_memory, local_attention
from infini_retrofit.layer.compressive_memory import CompressiveMemory
from infini_retrofit.layer.cut import Layout
from infini_retrofit.layer.memory import MemoryState
from infini_retrofit.layer.state import LayerState, State
from infini_retrofit.model.running import run_folded, run_in_layer
from tests.reference import (
    LAYER,
    PUBLISHED,
    SEGMENT,
    both_families,
    draw_hidden,
    every_form,
    largest,
    make_layer,
    retrofitted,
    run_layer,
)
from tests.tiny import ids_for, tiny_model

DOCUMENT = 3 * SEGMENT
WRITES = ({}, {"update_rule": "delta"}, {"update_rule": "delta_gamma"}, {"decay": "feature"})
every_write = pytest.mark.parametrize("write", WRITES, ids=str)
STATES = CompressiveMemory.states


def draw_input(num_rows: int = 2, num_tokens: int = DOCUMENT) -> Tensor:
    return draw_hidden(num_rows, num_tokens, torch.float32)


@torch.no_grad()
def early_change(form: dict, num_tokens: int = DOCUMENT) -> tuple[float, float]:
    """Change each token in turn; return how far earlier outputs move, and how far its own."""
    layer, x = make_layer(form, torch.float32), draw_input(num_tokens=num_tokens)
    want, early, own = run_layer(layer, x), 0.0, float("inf")
    for t in range(1, num_tokens):
        other = x.clone()
        other[:, t] += 1
        moved = run_layer(layer, other) - want
        early, own = max(early, largest(moved[:, :t])), min(own, largest(moved[:, t]))
    return early, own


@every_form
@pytest.mark.parametrize("num_tokens", [DOCUMENT, DOCUMENT - 1])
def test_no_token_reads_a_later_one(form, num_tokens):
    early, own = early_change(form, num_tokens)
    assert early == 0
    assert own > 0.01


@pytest.mark.parametrize(("name", "value"), [("LONGEST_EXPLICIT", 0), ("QUERIES_PER_BLOCK", 2)])
@pytest.mark.parametrize("positions", ["rope", "alibi"])
def test_no_token_reads_a_later_one_by_the_fused_kernel_or_in_blocks(
    positions, name, value, monkeypatch
):
    monkeypatch.setattr(local_attention, name, value)
    assert early_change(PUBLISHED | {"positions": positions, "local_context": 2})[0] == 0


def scrambled_split(layout: Layout, x: Tensor, num_heads: int) -> Tensor:
    """Split heads by a view alone: the right shape, and tokens spread over heads."""
    return x.reshape(*layout.grid[:2], num_heads, layout.grid[2], -1)


def prefix_by_subtraction(written: MemoryState, before: MemoryState, stop_gradient_every):
    """Compute the memory before a segment as `cumsum - own`: the same but for rounding."""
    sums = written.map(lambda x: x.cumsum(1))
    return sums.map(torch.sub, written), sums.map(lambda x: x[:, -1])


def all_keys(num_queries: int, num_keys: int, *_: object) -> Tensor:
    return torch.ones(1, 1, num_queries, num_keys, dtype=torch.bool)


def inclusive_states(*args: object):
    """Let each segment read what it writes itself."""
    memories, after = STATES(*args)
    return memories.map(lambda x, y: torch.cat([x[:, 1:], y[:, None]], dim=1), after), after


@pytest.mark.parametrize("local", ["softmax", "linear"])
@pytest.mark.parametrize(
    ("module", "name", "broken"),
    [(Layout, "split", scrambled_split), (local_attention, "_mask", all_keys)],
)
def test_heads_split_by_a_view_and_open_masks_are_noticed(module, name, broken, local, monkeypatch):
    monkeypatch.setattr(module, name, broken)
    assert early_change(PUBLISHED | {"local": local})[0] > 0.01


def test_a_prefix_by_subtraction_leaks_bits(monkeypatch):
    monkeypatch.setattr(compressive_memory, "prefix_states", prefix_by_subtraction)
    assert 0 < early_change(PUBLISHED)[0] < 1e-3


@every_write
def test_a_memory_of_the_segment_itself_is_noticed(write, monkeypatch):
    monkeypatch.setattr(CompressiveMemory, "states", inclusive_states)
    assert early_change(PUBLISHED | write)[0] > 1e-3


@both_families
@pytest.mark.parametrize("run", [run_in_layer, run_folded])
@torch.no_grad()
def test_no_token_of_a_whole_model_reads_a_later_one(family, run):
    model = retrofitted(family, local_context=2)
    ids = ids_for(model)
    want = run(model, ids, 5)
    for t in (1, 4, 5, 9, 10, 14):
        other = ids.clone()
        other[:, t] = (other[:, t] + 1) % model.config.vocab_size
        moved = run(model, other, 5) - want
        assert moved[:, :t].count_nonzero() == 0
        assert largest(moved[:, t:]) > 0.01


@torch.no_grad()
def influence_of_others(form: dict) -> float:
    """Return how far an output depends on other documents of the batch, or of earlier calls."""
    layer, x = make_layer(form, torch.float32), draw_input(3)
    alone = torch.cat([run_layer(layer, row[None]) for row in x])
    together, again = run_layer(layer, x), run_layer(layer, x)
    turned = run_layer(layer, x.flip(0)).flip(0)
    return max(largest(together - other) for other in (alone, again, turned))


def averaged(state: MemoryState) -> MemoryState:
    return state.map(lambda x: x.mean(0, keepdim=True).expand_as(x))


def states_of_the_batch(*args: object):
    return tuple(averaged(state) for state in STATES(*args))


def living_states(memory: CompressiveMemory, *arguments: object):
    """Keep the memory between calls, as a module attribute or buffer does."""
    *tokens, before = arguments
    if last := getattr(memory, "living", None):
        before = last.map(lambda x: x.mean(0, keepdim=True).expand(len(tokens[0]), *x.shape[1:]))
    memories, memory.living = STATES(memory, *tokens, before)
    return memories, memory.living


@every_form
def test_documents_of_a_batch_equal_documents_alone_in_any_order(form):
    assert influence_of_others(form) < 1e-5


@every_write
@pytest.mark.parametrize("broken", [living_states, states_of_the_batch])
def test_a_memory_that_lives_on_or_is_averaged_mixes_documents(write, broken, monkeypatch):
    monkeypatch.setattr(CompressiveMemory, "states", broken)
    assert influence_of_others(PUBLISHED | write) > 1e-3


@both_families
def test_a_run_leaves_nothing_in_the_model(family):
    model = retrofitted(family, local_context=2)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    attributes = {name: set(vars(m)) for name, m in model.named_modules()}
    run_folded(model, ids_for(model), 5)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert attributes == {name: set(vars(m)) for name, m in model.named_modules()}
    assert not any("matrix" in name or "normalizer" in name for name in after)
    assert len(list(model.buffers())) == len(list(tiny_model(family).buffers()))


@every_form
@pytest.mark.parametrize("bptt_segments", ["all", 1])
@pytest.mark.parametrize("of", ["k_proj", "v_proj"])
def test_the_loss_of_a_segment_teaches_keys_of_long_before_unless_cut(form, of, bptt_segments):
    layer, x = make_layer(form | {"bptt_segments": bptt_segments}), draw_hidden(2, DOCUMENT)
    projected = getattr(layer, of)(x).detach().requires_grad_()
    getattr(layer, of).forward = lambda _: projected
    run_layer(layer, x)[:, -SEGMENT:].sum().backward()
    # The document's first token is carried along as the sink.
    taught = largest(projected.grad[:, 1:SEGMENT])
    assert taught > 1e-3 if bptt_segments == "all" else taught == 0


@every_form
@pytest.mark.parametrize("part", ["memory", "context"])
@pytest.mark.parametrize("bptt_segments", ["all", 2])
def test_the_gradient_crosses_calls_unless_it_is_cut(form, part, bptt_segments):
    layer = make_layer(form | {"bptt_segments": bptt_segments, "local_context": 2})
    x, first = draw_hidden(2, DOCUMENT).requires_grad_(), State()
    run_layer(layer, x[:, :SEGMENT], state=first)
    after = first.after[LAYER]
    sink = after.sink if part == "context" else None
    carried = LayerState(**{part: getattr(after, part)}, sink=sink)
    out = run_layer(layer, x[:, SEGMENT:], SEGMENT, state=State(before={LAYER: carried}))
    (gradient,) = torch.autograd.grad(out.sum(), x)
    crossed = largest(gradient[:, :SEGMENT])
    assert crossed > 1e-4 if bptt_segments == "all" else crossed == 0
