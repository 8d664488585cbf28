"""Every form of the Infini layer against the loop over tokens, in value and gradient.

The product of update rules, feature maps and local attentions is complete; what else a form may
have goes round, so that each extra meets each of them.
"""

from itertools import cycle, product

import pytest
import torch
from torch import Tensor

from infini_retrofit.layer.attention import InfiniAttention
from infini_retrofit.layer.form import AttentionShape
from infini_retrofit.layer.naive import NaiveLayer
from infini_retrofit.layer.state import Carrier
from tests.reference import infini_params, largest, without_conflicts

SEGMENT, WIDTH, LAYER, DOCUMENTS = 3, 11, 2, 2
SHAPE = AttentionShape(
    hidden_size=WIDTH, num_heads=4, num_kv_heads=2, head_dim=5, qkv_bias=True, o_bias=True
)
RULES = ("linear", "delta", "delta_gamma")
FEATURE_MAPS = ("elu1", "hedgehog", "dpfp")
LOCALS = (
    *(("softmax", positions) for positions in ("rope", "alibi", "none")),
    *(("linear", positions) for positions in ("rope", "none")),
    *(("window_linear", positions) for positions in ("rope", "alibi", "none")),
)
EXTRAS = (
    {},
    {"decay": "head", "gate": "query"},
    {"written_tokens": 2, "initial_state": "learnable"},
    {"recall_norm": "rms", "insertion": "parallel"},
    {"gate": "query", "recall_norm": "rms", "decay": "head", "initial_state": "learnable"},
    {"decay": "feature", "initial_state": "learnable"},
    {"seed_scaling": True, "gate": "query"},
    {"local_context": 2, "decay": "feature", "written_tokens": 1, "recall_norm": "rms"},
)
WITH_WINDOW = (
    {},
    {"gate": "query", "window": 1},
    {"written_tokens": 2, "initial_state": "learnable"},
    {"local_context": 2, "insertion": "parallel", "window": 2},
)


def all_forms() -> list[dict]:
    extras, with_window, forms = cycle(EXTRAS), cycle(WITH_WINDOW), []
    for rule, feature_map, (local, positions) in product(RULES, FEATURE_MAPS, LOCALS):
        form = {"update_rule": rule, "feature_map": feature_map, "local": local, "window": 2}
        extra = next(with_window if local == "window_linear" else extras)
        if feature_map == "hedgehog" and len(forms) % 2:
            form["num_features"] = 6
        form |= {"positions": positions, "segment_length": SEGMENT} | extra
        forms.append(without_conflicts(form))
    return forms


FORMS = all_forms()


def name_of(form: dict) -> str:
    return "-".join(str(x) for k, x in form.items() if k not in ("window", "segment_length"))


def make_layer(form: dict) -> InfiniAttention:
    """Make a layer none of whose parameters stands at its usual start."""
    layer = InfiniAttention(SHAPE, infini_params(**form), LAYER).double()
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "proj" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return layer


def draw_input(num_tokens: int) -> Tensor:
    return torch.randn(DOCUMENTS, num_tokens, WIDTH, dtype=torch.float64).requires_grad_()


def tables(num_tokens: int) -> tuple[Tensor, Tensor]:
    angles = torch.arange(num_tokens)[:, None] * torch.tensor([1.0, 0.3]).repeat(2)
    return angles.double().cos()[None], angles.double().sin()[None]


def run_naive(layer: InfiniAttention, form: dict, x: Tensor) -> Tensor:
    """Compute each document token by token."""
    placed = tuple(t[0] for t in tables(x.shape[1])) if form["positions"] == "rope" else None
    naive = NaiveLayer(layer, infini_params(**form))
    return torch.stack([naive(document, placed) for document in x])


def run_in_layer(layer: InfiniAttention, x: Tensor) -> Tensor:
    return layer(x, tables(x.shape[1]))[0]


def run_folded(layer: InfiniAttention, x: Tensor) -> Tensor:
    num_segments = x.shape[1] // SEGMENT
    rows = x.reshape(-1, SEGMENT, WIDTH)
    placed = [t.expand(DOCUMENTS, -1, -1).reshape(-1, SEGMENT, 4) for t in tables(x.shape[1])]
    return layer(rows, tuple(placed), Carrier(num_segments=num_segments))[0].view_as(x)


def run_loop(layer: InfiniAttention, x: Tensor) -> Tensor:
    """Call the layer once a segment, handing over what crosses the border."""
    outputs, carried = [], {}
    for begin in range(0, x.shape[1], SEGMENT):
        part = slice(begin, begin + SEGMENT)
        carrier = Carrier(before=carried)
        placed = tuple(t[:, part] for t in tables(x.shape[1]))
        outputs.append(layer(x[:, part], placed, carrier)[0])
        carried = carrier.after
    return torch.cat(outputs, dim=1)


def gradients_of(out: Tensor, layer: InfiniAttention, x: Tensor) -> dict[str, Tensor]:
    named = {"x": x} | dict(layer.named_parameters())
    probe = torch.arange(out.numel()).view_as(out).double().sin()
    found = torch.autograd.grad((out * probe).sum(), named.values(), allow_unused=True)
    return dict(zip(named, found, strict=True))


@pytest.mark.parametrize("form", FORMS, ids=name_of)
def test_folded_in_layer_and_a_loop_equal_one_token_at_a_time(form):
    layer, x = make_layer(form), draw_input(3 * SEGMENT)
    want = run_naive(layer, form, x)
    want_gradients = gradients_of(want, layer, x)
    assert all(gradient is not None for gradient in want_gradients.values())
    assert largest(want) > 0.01
    for run in (run_folded, run_in_layer, run_loop):
        got = run(layer, x)
        assert largest(got - want) < 1e-9
        for name, gradient in gradients_of(got, layer, x).items():
            assert largest(gradient - want_gradients[name]) < 1e-9, name


@pytest.mark.parametrize("form", FORMS[::7], ids=name_of)
def test_a_last_segment_that_is_partial_equals_one_token_at_a_time(form):
    layer, x = make_layer(form), draw_input(2 * SEGMENT + 1)
    assert largest(run_in_layer(layer, x) - run_naive(layer, form, x)) < 1e-9


@pytest.mark.parametrize("form", FORMS[::5], ids=name_of)
def test_a_memory_kept_in_16_bits_is_the_same_however_it_is_run(form):
    exact, short = make_layer(form), make_layer(form | {"state_dtype": "bfloat16"})
    short.load_state_dict(exact.state_dict())
    x = draw_input(4 * SEGMENT)
    want, plain = run_folded(short, x), run_folded(exact, x)
    want_gradients, plain_gradients = gradients_of(want, short, x), gradients_of(plain, exact, x)
    assert 1e-6 < largest(want - plain) / largest(want) < 0.05
    assert largest(run_loop(short, x) - want) < 1e-9  # its gradient crosses calls in 16 bits
    got = run_in_layer(short, x)
    assert largest(got - want) < 1e-9
    for name, gradient in gradients_of(got, short, x).items():
        assert largest(gradient - want_gradients[name]) < 1e-9, name
    for name, gradient in plain_gradients.items():
        error = largest(gradient - want_gradients[name])
        assert error < 0.2 * largest(gradient) + 1e-9, name


OTHERS = {
    "update_rule": RULES,
    "feature_map": FEATURE_MAPS,
    "positions": ("rope", "alibi", "none"),
    "local": ("softmax", "linear", "window_linear"),
    "written_tokens": ("all", 1, 2),
    "seed_scaling": (False, True),
    "local_context": (0, 2),
}


def other_forms() -> list[tuple[dict, dict]]:
    """Pair forms that differ in one choice alone."""
    plain = {"segment_length": SEGMENT, "window": 1}
    pairs = []
    for name, values in OTHERS.items():
        base = plain | ({"positions": "none"} if name == "local" else {"positions": "rope"})
        first, *rest = values
        pairs += [(base | {name: first}, base | {name: other}) for other in rest]
    return pairs


@pytest.mark.parametrize(("form", "other"), other_forms(), ids=lambda form: name_of(form))
def test_the_loop_tells_forms_apart(form, other):
    layer, x = make_layer(other), draw_input(3 * SEGMENT)
    with torch.no_grad():
        got = run_folded(layer, x)
        assert largest(got - run_naive(layer, other, x)) < 1e-9
        if form.get("feature_map") == "elu1" and other["feature_map"] == "hedgehog":
            layer.feature_maps.query_weight = layer.feature_maps.key_weight = None
        assert largest(got - run_naive(layer, form, x)) > 1e-4
