"""No token hears a later one, no document another, and what was stored can be learned.

Each property is a number that must be 0 (or must not), measured on our layer and on a broken one.
"""

import pytest
import torch
from torch import Tensor

from infini_retrofit.layer import compressive_memory, local_attention, window_attention
from infini_retrofit.layer.attention import InfiniAttention
from infini_retrofit.layer.cut import SegmentCut
from infini_retrofit.layer.form import AttentionShape
from infini_retrofit.layer.memory import MemoryState, Write, prefix_states, scan_states
from infini_retrofit.layer.state import Carrier
from infini_retrofit.model.retrofit import insert_infini
from infini_retrofit.model.running import run_folded, run_in_layer
from tests.reference import infini_params, largest
from tests.tiny import FAMILIES, random_ids, tiny_model

SEGMENT, DOCUMENT = 5, 15
LAYER = 1


def retrofitted(family: str, **over: object):
    model = tiny_model(family)
    insert_infini(model, infini_params(**over))
    return model


FORMS = {
    "published": {},
    "local context": {"local_context": 3},
    "linear": {"local": "linear"},
    "alibi": {"positions": "alibi", "update_rule": "delta", "feature_map": "hedgehog"},
    "window": {"local": "window_linear", "window": 2},
    "window of one": {"local": "window_linear", "window": 1, "local_context": 2},
    "decay": {"decay": "head", "gate": "query"},
    "fading features": {"decay": "feature", "feature_map": "hedgehog", "num_features": 4},
    "chosen tokens": {"written_tokens": 2, "initial_state": "learnable"},
    "delta": {"update_rule": "delta"},
    "delta_gamma": {"update_rule": "delta_gamma", "feature_map": "dpfp", "recall_norm": "rms"},
    "linear delta_gamma": {"local": "linear", "update_rule": "delta_gamma", "written_tokens": 3},
    "parallel": {"insertion": "parallel", "bptt_segments": 1},
    "16 bits": {"state_dtype": "bfloat16", "initial_state": "learnable"},
}
every_form = pytest.mark.parametrize("form", FORMS)


def infini_layer(form: str = "published") -> InfiniAttention:
    params = infini_params(**{"positions": "none"} | FORMS[form])
    shape = AttentionShape(
        hidden_size=26, num_heads=4, num_kv_heads=2, head_dim=7, qkv_bias=True, o_bias=True
    )
    torch.manual_seed(3)
    layer = InfiniAttention(shape, params, LAYER)
    if layer.alpha is not None:
        layer.alpha.data[:] = 1
    return layer


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


@every_form
@pytest.mark.parametrize("num_tokens", [DOCUMENT, 13])
def test_no_token_hears_a_later_one(form, num_tokens):
    early, own = early_change(infini_layer(form), draw_input(num_tokens=num_tokens))
    assert early == 0
    assert own > 0.01


def scrambled_split(cut: SegmentCut, x: Tensor, num_heads: int) -> Tensor:
    """Split heads by a view alone: the right shape, and tokens spread over heads."""
    return x.reshape(*cut.grid[:2], num_heads, cut.grid[2], -1)


def prefix_by_subtraction(written: MemoryState, initial: MemoryState | None, bptt_segments):
    """Find what each segment finds as `cumsum - own`: the same but for rounding."""
    matrix, normalizer = written.matrix.cumsum(1), written.normalizer.cumsum(1)
    before = MemoryState(matrix - written.matrix, normalizer - written.normalizer)
    return before, MemoryState(matrix[:, -1], normalizer[:, -1])


def test_heads_split_by_a_view_hear_later_tokens(monkeypatch):
    monkeypatch.setattr(SegmentCut, "split", scrambled_split)
    assert early_change(infini_layer(), draw_input())[0] > 0.01


def test_a_prefix_by_subtraction_leaks_bits(monkeypatch):
    monkeypatch.setattr(compressive_memory, "prefix_states", prefix_by_subtraction)
    assert 0 < early_change(infini_layer(), draw_input())[0] < 1e-3


def inclusive_scan(write: Write, *args: object):
    """Let each segment find what it writes itself."""
    before, after = scan_states(write, *args)
    matrix = torch.cat([before.matrix[:, 1:], after.matrix[:, None]], dim=1)
    normalizer = torch.cat([before.normalizer[:, 1:], after.normalizer[:, None]], dim=1)
    return MemoryState(matrix, normalizer), after


@pytest.mark.parametrize("form", ["delta", "delta_gamma", "decay", "linear delta_gamma"])
def test_a_scan_that_includes_the_segment_itself_is_noticed(form, monkeypatch):
    monkeypatch.setattr(compressive_memory, "scan_states", inclusive_scan)
    assert early_change(infini_layer(form), draw_input())[0] > 1e-3


@pytest.mark.parametrize("form", ["window", "linear"])
def test_linear_sums_over_what_is_to_come_are_noticed(form, monkeypatch):
    sums = local_attention.masked_linear_sums

    def open_sums(query: Tensor, key: Tensor, value: Tensor, mask: Tensor):
        return sums(query, key, value, torch.ones_like(mask))

    monkeypatch.setattr(local_attention, "masked_linear_sums", open_sums)
    monkeypatch.setattr(window_attention, "masked_linear_sums", open_sums)
    assert early_change(infini_layer(form), draw_input())[0] > 1e-3


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


def strangers_share(x: Tensor, form: str = "published") -> float:
    """Return how far a document's output depends on what else is in the batch, or was before."""
    layer = infini_layer(form)
    alone = torch.cat([layer(row[None])[0] for row in x])
    together, again, turned = layer(x)[0], layer(x)[0], layer(x.flip(0))[0].flip(0)
    return max(largest(together - other) for other in (alone, again, turned))


class LivingMemory:
    """A memory kept between calls, as a module attribute keeps it."""

    def __init__(self) -> None:
        self.state: MemoryState | None = None

    def __call__(self, written: MemoryState, initial: MemoryState | None, bptt_segments):
        """Start with what the call before left, whoever's it was."""
        mean = self.state and MemoryState(
            self.state.matrix.mean(0, keepdim=True).expand_as(written.matrix[:, 0]),
            self.state.normalizer.mean(0, keepdim=True).expand_as(written.normalizer[:, 0]),
        )
        before, after = prefix_states(written, mean)
        self.state = after.detach()
        return before, after


def prefix_of_the_batch(written: MemoryState, initial: MemoryState | None, bptt_segments):
    """Average the memory over the batch."""
    mean = [x.mean(0, keepdim=True).expand_as(x) for x in (written.matrix, written.normalizer)]
    return prefix_states(MemoryState(*mean), initial)


@every_form
def test_two_documents_in_a_batch_equal_two_apart_in_any_order(form):
    assert strangers_share(draw_input(3), form) < 1e-5


@pytest.mark.parametrize("make_broken", [LivingMemory, lambda: prefix_of_the_batch])
def test_a_memory_that_lives_on_or_is_averaged_mixes_documents(make_broken, monkeypatch):
    monkeypatch.setattr(compressive_memory, "prefix_states", make_broken())
    assert strangers_share(draw_input(3)) > 0.01


def scan_of_the_batch(write: Write, *args: object):
    """Write the mean of the batch into every memory."""
    mean = [x.mean(0, keepdim=True).expand_as(x) for x in (write.feature, write.value)]
    return scan_states(Write(*mean, write.weight), *args)


@pytest.mark.parametrize("form", ["delta", "delta_gamma", "decay"])
def test_a_scan_over_the_mean_of_the_batch_mixes_documents(form, monkeypatch):
    monkeypatch.setattr(compressive_memory, "scan_states", scan_of_the_batch)
    assert strangers_share(draw_input(3), form) > 1e-3


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


@every_form
@pytest.mark.parametrize("detached", [False, True])
@pytest.mark.parametrize("of", ["k_proj", "v_proj"])
def test_the_loss_of_a_segment_teaches_keys_of_long_before_unless_detached(form, of, detached):
    layer, x = infini_layer(form), draw_input()
    layer.memory.bptt_segments = 1 if detached else None
    projected = getattr(layer, of)(x).detach().requires_grad_()
    getattr(layer, of).forward = lambda _: projected
    layer(x)[0][:, -SEGMENT:].square().sum().backward()
    # The document's first token is carried along as the sink.
    taught = largest(projected.grad[:, 1:SEGMENT])
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
