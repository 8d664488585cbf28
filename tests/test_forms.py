"""Every form of the Infini layer against the loop over tokens, in value and gradient."""

from dataclasses import fields, replace
from typing import get_args

import pytest
import torch
from torch import Tensor

from infini_retrofit.layer import local_attention
from infini_retrofit.layer.attention import InfiniAttention, Noted
from infini_retrofit.layer.cut import Cut
from infini_retrofit.layer.form import InfiniParams
from infini_retrofit.layer.naive import NaiveLayer
from infini_retrofit.layer.probe import Probe
from infini_retrofit.layer.state import LayerState, State
from tests.reference import (
    CHOICES,
    FORMS,
    LAYER,
    MEMORY_BRANCH,
    PUBLISHED,
    SEGMENT,
    SHAPE,
    WIDTH,
    draw_hidden,
    every_form,
    infini_params,
    largest,
    make_layer,
    name_of,
    rope_tables,
    run_layer,
    run_naive,
)

DOCUMENT = 4 * SEGMENT  # beyond the longest context
# What the loop does not know: it has no state, and no gradients that stop.
EXACT = {"state_dtype": "float32", "bptt_segments": "all"}


def run_in_layer(layer: InfiniAttention, x: Tensor) -> tuple[Tensor, LayerState]:
    state = State()
    return run_layer(layer, x, state=state), state.after[LAYER]


def run_folded(layer: InfiniAttention, x: Tensor) -> tuple[Tensor, LayerState]:
    state, num_segments = State(), x.shape[1] // SEGMENT
    rows = x.reshape(-1, SEGMENT, WIDTH)
    tables = [t.expand(len(x), -1, -1).reshape(-1, SEGMENT, 4) for t in rope_tables(x.shape[1])]
    out = layer(rows, tuple(tables), Cut(num_segments=num_segments), state)[0]
    return out.view_as(x), state.after[LAYER]


def run_in_calls(
    layer: InfiniAttention, x: Tensor, lengths: list[int], is_open: bool = False
) -> tuple[Tensor, LayerState]:
    outputs, state, cut = [], State(), Cut(is_open=is_open)
    for part in x.split(lengths, dim=1):
        first = sum(out.shape[1] for out in outputs)
        outputs.append(run_layer(layer, part, first, cut=cut, state=state))
        after, state = state.after[LAYER], state.next()
    return torch.cat(outputs, dim=1), after


def run_loop(layer: InfiniAttention, x: Tensor) -> tuple[Tensor, LayerState]:
    return run_in_calls(layer, x, [SEGMENT] * (x.shape[1] // SEGMENT))


def run_streamed(layer: InfiniAttention, x: Tensor) -> tuple[Tensor, LayerState]:
    return run_in_calls(layer, x, [2, 1, 1, x.shape[1] - 5, 1], is_open=True)


def tensors_of(after: LayerState) -> list[Tensor]:
    parts = [part for part in (after.memory, after.context) if part is not None]
    return [getattr(part, field.name).double() for part in parts for field in fields(part)]


def gradients_of(out: Tensor, layer: InfiniAttention, x: Tensor) -> dict[str, Tensor]:
    named = {"x": x} | dict(layer.named_parameters())
    probe = torch.arange(out.numel()).view_as(out).double().sin()
    about = {"retain_graph": True, "materialize_grads": True}
    found = torch.autograd.grad((out * probe).sum(), named.values(), **about)
    return dict(zip(named, found, strict=True))


def assert_same(got: Tensor, want: Tensor, layer: InfiniAttention, x: Tensor) -> None:
    """Compare values, and gradients of the input and all parameters."""
    assert largest(got - want) < 1e-9
    want_gradients = gradients_of(want, layer, x)
    for name, gradient in gradients_of(got, layer, x).items():
        assert largest(gradient - want_gradients[name]) < 1e-9, name


@every_form
def test_all_runs_equal_one_token_at_a_time(form):
    layer, x = make_layer(form | EXACT), draw_hidden(2, DOCUMENT).requires_grad_()
    want, (_, want_after) = run_naive(layer, form, x), run_in_layer(layer, x)
    assert all(largest(y) > 1e-6 for y in (want, *gradients_of(want, layer, x).values()))
    for run in (run_in_layer, run_folded, run_loop, run_streamed):
        got, after = run(layer, x)
        assert_same(got, want, layer, x)
        pairs = zip(tensors_of(after), tensors_of(want_after), strict=True)
        assert all(largest(a - b) < 1e-9 for a, b in pairs)
    for n in (1, SEGMENT + 1, DOCUMENT - 1):
        assert_same(run_layer(layer, x[:, :n]), want[:, :n], layer, x)


@pytest.mark.parametrize(("name", "value"), [("LONGEST_EXPLICIT", 0), ("QUERIES_PER_BLOCK", 2)])
@pytest.mark.parametrize("form", [f for f in FORMS if f["local"] == "softmax"], ids=name_of)
def test_the_fused_kernel_and_blocks_of_queries_equal_one_token_at_a_time(
    form, name, value, monkeypatch
):
    monkeypatch.setattr(local_attention, name, value)
    layer, x = make_layer(form | EXACT), draw_hidden(2, DOCUMENT).requires_grad_()
    want = run_naive(layer, form, x)
    for run in (run_in_layer, run_streamed):
        assert_same(run(layer, x)[0], want, layer, x)


@every_form
def test_a_loop_that_hands_over_nothing_is_noticed(form):
    layer, x = make_layer(form), draw_hidden(2, DOCUMENT)
    forgetful = run_layer(layer, x[:, SEGMENT:], SEGMENT)
    assert largest(forgetful - run_layer(layer, x)[:, SEGMENT:]) > 0.01


@every_form
def test_a_state_of_16_bits_and_stopped_gradients_are_the_same_in_all_runs(form):
    layer, x = make_layer(form), draw_hidden(2, 4 * SEGMENT).requires_grad_()
    exact, free = (make_layer(form | {name: EXACT[name]}) for name in EXACT)
    exact.load_state_dict(layer.state_dict())
    free.load_state_dict(layer.state_dict())
    want, unrounded, uncut = (run_folded(module, x)[0] for module in (layer, exact, free))
    assert_same(run_in_layer(layer, x)[0], want, layer, x)
    assert largest(run_loop(layer, x)[0] - want) < 1e-9  # its gradient crosses calls in 16 bits
    error = largest(want - unrounded) / largest(want)
    assert 1e-6 < error < 0.05 if form["state_dtype"] == "bfloat16" else error == 0
    gradients, close = gradients_of(want, layer, x), gradients_of(unrounded, exact, x)
    for name, gradient in gradients.items():
        assert largest(close[name] - gradient) < 0.2 * largest(gradient) + 1e-9, name
    assert torch.equal(uncut, want)
    is_same = torch.equal(gradients_of(uncut, free, x)["x"], gradients["x"])
    assert is_same is (form["bptt_segments"] == "all")


def changes() -> list[dict]:
    """Return what one choice alone changes in the published form."""
    known = {name: values for name, values in CHOICES.items() if name not in ("heads", *EXACT)}
    needed = {"num_features": {"feature_map": "hedgehog"}, "gated_delta": {"feature_map": "unit"}}
    one = [
        needed.get(name, {}) | needed.get(other, {}) | {name: other}
        for name, (_, *rest) in known.items()
        for other in rest
        if other != "unit"  # of gated_delta alone
    ]
    return [*one, {"segment_length": SEGMENT + 1}]


@pytest.mark.parametrize("rule", ["linear", "gated_delta"])
@pytest.mark.parametrize("value", ["hidden", "embedding"])
@pytest.mark.parametrize("key", ["own", "before"])
def test_a_branch_that_is_a_memory_equals_the_loop(rule, value, key):
    form = MEMORY_BRANCH | {"memory_key": key, "memory_value": value}
    form |= {"update_rule": rule, "feature_map": "unit" if rule == "gated_delta" else "elu1"}
    form |= {"segment_length": SEGMENT, "local_context": 2 * SEGMENT}  # of the base beside it
    layer, x = make_layer(form), draw_hidden(2, DOCUMENT).requires_grad_()
    got = layer(x[:1], embeddings=x[1:])[0][0]
    want = NaiveLayer(layer, infini_params(**form))(x[0], None, embeddings=x[1])
    assert largest(got - want) < 1e-9
    gradients = [torch.autograd.grad(out.sin().sum(), x)[0] for out in (got, want)]
    assert largest(gradients[0] - gradients[1]) < 1e-9
    assert (largest(gradients[0][1]) > 1e-4) == (value == "embedding")
    assert got[:SEGMENT].count_nonzero() == 0


@pytest.mark.parametrize("num_slots", [1, SEGMENT + 1, 100])
@pytest.mark.parametrize(("key", "key_layer"), [("own", "own"), ("before", "own"), ("before", 0.0)])
def test_a_neural_cache_equals_the_loop(key, key_layer, num_slots):
    form = MEMORY_BRANCH | {"memory_key": key, "segment_length": SEGMENT, "gate": "query"}
    form |= {"key_layer": key_layer}
    form |= {"update_rule": "neural_cache", "num_slots": num_slots}
    layer, x = make_layer(form), draw_hidden(3, DOCUMENT).requires_grad_()
    seen = None if key_layer == "own" else x[2]
    layer.memory.sharpness.data.fill_(3.0)
    layer.memory.floor.data.fill_(1.0)
    ids = torch.randperm(DOCUMENT)
    given = {"token_ids": ids[None], "embed": lambda tokens: x[1][tokens]}
    given |= {"noted": Noted(x[2:])}
    probe, state = Probe(memories={}), State()
    got = layer(x[:1], probe=probe, state=state, **given)[0][0]
    # No more slots than the document can fill; all of them cross to the next call.
    assert probe.memories[layer.layer_index].normalizer.shape[-1] == min(num_slots, DOCUMENT)
    assert state.after[layer.layer_index].memory.normalizer.shape[-1] == num_slots
    want = NaiveLayer(layer, infini_params(**form))(x[0], None, embeddings=x[1][ids], seen=seen)
    assert largest(got - want) < 1e-9
    inputs = (x, layer.memory.sharpness, layer.memory.floor)
    both = [torch.autograd.grad(out.sin().sum(), inputs) for out in (got, want)]
    for one, other in zip(*both, strict=True):
        assert largest(one - other) < 1e-9
        assert largest(one) > 1e-4
    # A query is made of what the form says, and of nothing else.
    assert [bool(both[0][0][i].any()) for i in (0, 2)] == [key_layer == "own", key_layer != "own"]
    assert got[:SEGMENT].count_nonzero() == 0


@pytest.mark.parametrize("change", changes(), ids=str)
@torch.no_grad()
def test_the_loop_tells_forms_apart(change):
    layer, other, x = make_layer(PUBLISHED | change), make_layer(PUBLISHED), draw_hidden(2, 8)
    other.load_state_dict(layer.state_dict(), strict=False)
    got = run_layer(layer, x)
    assert largest(got - run_naive(layer, PUBLISHED | change, x)) < 1e-9
    assert largest(got - run_naive(other, PUBLISHED, x)) > 1e-4


@pytest.mark.parametrize(
    "change", [{"norms": "head"}, {"norms": "all"}, {"clip": 0.3}, {"scaling": 0.9}, {"window": 3}],
    ids=str,
)
@torch.no_grad()
def test_what_some_bases_do_is_in_the_loop_too(change):
    form, x = PUBLISHED | {"local_context": 3}, draw_hidden(2, 3 * SEGMENT + 1)
    plain = make_layer(form)
    layer = InfiniAttention(replace(SHAPE, **change), infini_params(**form), LAYER).double()
    layer.load_state_dict(plain.state_dict())
    if "norms" in change:
        for name, heads in (("q_norm", SHAPE.num_heads), ("k_norm", SHAPE.num_kv_heads)):
            size = SHAPE.head_dim * (heads if change["norms"] == "all" else 1)
            norm = torch.nn.RMSNorm(size, dtype=torch.float64)
            torch.nn.init.uniform_(norm.weight, 0.5, 2.0)
            setattr(layer, name, norm)
    got = run_layer(layer, x)
    assert largest(got - run_naive(layer, form, x)) < 1e-9
    assert largest(got - run_layer(plain, x)) > 1e-4


def test_every_choice_is_in_a_form():
    kinds = {field.name: field.type for field in fields(InfiniParams)}
    of_branches = {"memory_key", "key_layer", "memory_value", "insertion", "num_slots"}
    for name in kinds.keys() - {"layers", "memory", "memory_layers", "init"} - of_branches:
        choices = {c for c in get_args(kinds[name]) if isinstance(c, str)}
        choices -= {"none"} if name == "local" else {"neural_cache"}  # of branches too
        assert choices <= {form[name] for form in FORMS}, name
