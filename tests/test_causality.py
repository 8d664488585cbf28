"""No token reads a later one, no document another, and keys learn what to store.

Each property is a number that must be 0, and is not for a broken layer.
"""

import pytest
import torch
from torch import Tensor

from infini_retrofit.layer import compressive_memory, local_attention
from infini_retrofit.layer.attention import InfiniAttention
from infini_retrofit.layer.cut import Layout
from infini_retrofit.layer.memory import MemoryState, Write, prefix_states, scan_states
from infini_retrofit.layer.state import LayerState, State
from infini_retrofit.model.retrofit import insert_infini
from infini_retrofit.model.running import run_folded, run_in_layer
from tests.reference import (
    FORMS,
    LAYER,
    SEGMENT,
    draw_hidden,
    infini_params,
    largest,
    make_layer,
    name_of,
    run_layer,
)
from tests.tiny import FAMILIES, random_ids, tiny_model

DOCUMENT = 3 * SEGMENT
PUBLISHED = FORMS[0]
SCANNED = {rule: PUBLISHED | {"update_rule": rule} for rule in ("delta", "delta_gamma")} | {
    "decay": PUBLISHED | {"decay": "feature"}
}
every_form = pytest.mark.parametrize("form", FORMS, ids=name_of)
every_scan = pytest.mark.parametrize("form", SCANNED.values(), ids=SCANNED)


def draw_input(num_rows: int = 2, num_tokens: int = DOCUMENT) -> Tensor:
    return draw_hidden(num_rows, num_tokens, torch.float32)


@torch.no_grad()
def early_change(layer: InfiniAttention, x: Tensor) -> tuple[float, float]:
    """Change each token in turn; return how far earlier outputs move, and how far its own."""
    want, early, own = run_layer(layer, x), 0.0, float("inf")
    for t in range(1, x.shape[1]):
        other = x.clone()
        other[:, t] += 1
        moved = run_layer(layer, other) - want
        early, own = max(early, largest(moved[:, :t])), min(own, largest(moved[:, t]))
    return early, own


@every_form
@pytest.mark.parametrize("num_tokens", [DOCUMENT, DOCUMENT - 1])
def test_no_token_reads_a_later_one(form, num_tokens):
    early, own = early_change(make_layer(form, torch.float32), draw_input(num_tokens=num_tokens))
    assert early == 0
    assert own > 0.01


def scrambled_split(layout: Layout, x: Tensor, num_heads: int) -> Tensor:
    """Split heads by a view alone: the right shape, and tokens spread over heads."""
    return x.reshape(*layout.grid[:2], num_heads, layout.grid[2], -1)


def prefix_by_subtraction(written: MemoryState, before: MemoryState, stop_gradient_every):
    """Compute the memory before a segment as `cumsum - own`: the same but for rounding."""
    matrix, normalizer = written.matrix.cumsum(1), written.normalizer.cumsum(1)
    memories = MemoryState(matrix - written.matrix, normalizer - written.normalizer)
    return memories, MemoryState(matrix[:, -1], normalizer[:, -1])


def test_heads_split_by_a_view_read_later_tokens(monkeypatch):
    monkeypatch.setattr(Layout, "split", scrambled_split)
    assert early_change(make_layer(PUBLISHED, torch.float32), draw_input())[0] > 0.01


def test_a_prefix_by_subtraction_leaks_bits(monkeypatch):
    monkeypatch.setattr(compressive_memory, "prefix_states", prefix_by_subtraction)
    assert 0 < early_change(make_layer(PUBLISHED, torch.float32), draw_input())[0] < 1e-3


def inclusive_scan(write: Write, *args: object):
    """Let each segment read what it writes itself."""
    before, after = scan_states(write, *args)
    matrix = torch.cat([before.matrix[:, 1:], after.matrix[:, None]], dim=1)
    normalizer = torch.cat([before.normalizer[:, 1:], after.normalizer[:, None]], dim=1)
    return MemoryState(matrix, normalizer), after


@every_scan
def test_a_scan_that_includes_the_segment_itself_is_noticed(form, monkeypatch):
    monkeypatch.setattr(compressive_memory, "scan_states", inclusive_scan)
    assert early_change(make_layer(form, torch.float32), draw_input())[0] > 1e-3


def test_linear_sums_over_later_tokens_are_noticed(monkeypatch):
    sums = local_attention.masked_linear_sums

    def open_sums(query: Tensor, key: Tensor, value: Tensor, mask: Tensor):
        return sums(query, key, value, torch.ones_like(mask))

    monkeypatch.setattr(local_attention, "masked_linear_sums", open_sums)
    layer = make_layer(PUBLISHED | {"local": "linear"}, torch.float32)
    assert early_change(layer, draw_input())[0] > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("run", [run_in_layer, run_folded])
@torch.no_grad()
def test_no_token_of_a_whole_model_reads_a_later_one(family, run):
    model = tiny_model(family)
    insert_infini(model, infini_params(local_context=2))
    ids = random_ids(model.config.vocab_size, 2, 15)
    want = run(model, ids, 5)
    for t in (1, 4, 5, 9, 10, 14):
        other = ids.clone()
        other[:, t] = (other[:, t] + 1) % model.config.vocab_size
        moved = run(model, other, 5) - want
        assert moved[:, :t].count_nonzero() == 0
        assert largest(moved[:, t:]) > 0.01


def influence_of_others(form: dict) -> float:
    """Return how far an output depends on other documents of the batch, or of earlier calls."""
    layer, x = make_layer(form, torch.float32), draw_input(3)
    alone = torch.cat([run_layer(layer, row[None]) for row in x])
    together, again = run_layer(layer, x), run_layer(layer, x)
    turned = run_layer(layer, x.flip(0)).flip(0)
    return max(largest(together - other) for other in (alone, again, turned))


class LivingMemory:
    """A memory kept between calls, as a module attribute keeps it."""

    def __init__(self) -> None:
        self.state: MemoryState | None = None

    def __call__(self, written: MemoryState, before: MemoryState, stop_gradient_every):
        """Start with what the call before left, whoever's it was."""
        mean = self.state and MemoryState(
            self.state.matrix.mean(0, keepdim=True).expand_as(written.matrix[:, 0]),
            self.state.normalizer.mean(0, keepdim=True).expand_as(written.normalizer[:, 0]),
        )
        memories, after = prefix_states(written, mean)
        self.state = after.detach()
        return memories, after


def prefix_of_the_batch(written: MemoryState, before: MemoryState, stop_gradient_every):
    """Average the memory over the batch."""
    mean = [x.mean(0, keepdim=True).expand_as(x) for x in (written.matrix, written.normalizer)]
    return prefix_states(MemoryState(*mean), before)


@every_form
def test_documents_of_a_batch_equal_documents_alone_in_any_order(form):
    assert influence_of_others(form) < 1e-5


@pytest.mark.parametrize("make_broken", [LivingMemory, lambda: prefix_of_the_batch])
def test_a_memory_that_lives_on_or_is_averaged_mixes_documents(make_broken, monkeypatch):
    monkeypatch.setattr(compressive_memory, "prefix_states", make_broken())
    assert influence_of_others(PUBLISHED) > 0.01


def scan_of_the_batch(write: Write, *args: object):
    """Write the mean of the batch into every memory."""
    mean = [x.mean(0, keepdim=True).expand_as(x) for x in (write.feature, write.value)]
    return scan_states(Write(*mean, write.weight), *args)


@every_scan
def test_a_scan_over_the_mean_of_the_batch_mixes_documents(form, monkeypatch):
    monkeypatch.setattr(compressive_memory, "scan_states", scan_of_the_batch)
    assert influence_of_others(form) > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_leaves_nothing_in_the_model(family):
    model = tiny_model(family)
    insert_infini(model, infini_params(local_context=2))
    before = {name: x.clone() for name, x in model.state_dict().items()}
    attributes = {name: set(vars(m)) for name, m in model.named_modules()}
    run_folded(model, random_ids(67, 2, 15), 5)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert attributes == {name: set(vars(m)) for name, m in model.named_modules()}
    assert not any("matrix" in name or "normalizer" in name for name in after)
    assert len(list(model.buffers())) == len(list(tiny_model(family).buffers()))


@every_form
@pytest.mark.parametrize("detached", [False, True])
@pytest.mark.parametrize("of", ["k_proj", "v_proj"])
def test_the_loss_of_a_segment_teaches_keys_of_long_before_unless_detached(form, of, detached):
    layer, x = make_layer(form | {"bptt_segments": 1 if detached else "all"}), draw_hidden(2, 9)
    projected = getattr(layer, of)(x).detach().requires_grad_()
    getattr(layer, of).forward = lambda _: projected
    run_layer(layer, x)[:, -SEGMENT:].sum().backward()
    # The document's first token is carried along as the sink.
    taught = largest(projected.grad[:, 1:SEGMENT])
    assert taught == 0 if detached else taught > 1e-3


@every_form
@pytest.mark.parametrize("part", ["memory", "context"])
def test_the_gradient_crosses_calls_unless_it_is_cut(form, part):
    for bptt_segments in ("all", 2):
        layer = make_layer(form | {"bptt_segments": bptt_segments, "local_context": 2})
        x, first = draw_hidden(2, 2 * SEGMENT).requires_grad_(), State()
        run_layer(layer, x[:, :SEGMENT], state=first)
        carried = LayerState(**{part: getattr(first.after[LAYER], part)})
        second = State(before={LAYER: carried})
        out = run_layer(layer, x[:, SEGMENT:], SEGMENT, state=second)
        (gradient,) = torch.autograd.grad(out.sum(), x)
        crossed = largest(gradient[:, :SEGMENT])
        assert crossed > 1e-4 if bptt_segments == "all" else crossed == 0
