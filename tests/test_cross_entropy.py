"""Chunked losses over the vocabulary against torch's own on all logits at once."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from infini_retrofit.scoring import losses as cross_entropy
from infini_retrofit.scoring.losses import (
    CHUNK_TOKENS,
    Prediction,
    token_kls,
    token_losses,
    token_nlls,
)
from tests.reference import largest

TOKENS, WIDTH, VOCAB = 2 * CHUNK_TOKENS + 7, 13, 29


def draw() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator)
    weight = torch.randn(VOCAB, WIDTH, generator=generator)
    return hidden, weight, torch.randint(VOCAB, (TOKENS,), generator=generator)


def plain_nlls(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(hidden @ weight.T, targets, reduction="none")


@pytest.mark.parametrize("num_tokens", [1, CHUNK_TOKENS, TOKENS])
@pytest.mark.parametrize("reduce", [torch.sum, torch.mean])
@pytest.mark.parametrize("trains", ["hidden", "weight", "both"])
def test_value_and_gradient_equal_those_of_all_logits_at_once(num_tokens, reduce, trains):
    hidden, weight, targets = draw()
    hidden, targets = hidden[:num_tokens], targets[:num_tokens]
    hidden.requires_grad_(trains != "weight")
    weight.requires_grad_(trains != "hidden")
    wanted = [x for x in (hidden, weight) if x.requires_grad]
    results = []
    for score in (token_nlls, plain_nlls):
        nlls = score(hidden, weight, targets)
        results.append((nlls.detach(), *torch.autograd.grad(3 * reduce(nlls), wanted)))
    for got, want in zip(*results, strict=True):
        assert largest(want) > 1e-3
        assert largest(got - want) < 1e-5 * max(1, largest(want))


def test_targets_one_off_are_noticed():
    hidden, weight, targets = draw()
    got = token_nlls(hidden, weight, targets.roll(1))
    assert largest(got - plain_nlls(hidden, weight, targets)) > 1


def test_tokens_may_weigh_unlike_only_while_the_weight_is_frozen():
    hidden, weight, targets = draw()
    hidden.requires_grad_()
    gradients = []
    for score in (token_nlls, plain_nlls):
        loss = (score(hidden, weight, targets) * torch.arange(TOKENS)).sum()
        gradients.append(torch.autograd.grad(loss, hidden)[0])
    assert largest(gradients[0] - gradients[1]) < 1e-5 * largest(gradients[1])
    nlls = token_nlls(hidden, weight.requires_grad_(), targets)
    with pytest.raises(AssertionError):
        (nlls * torch.arange(TOKENS)).sum().backward()


def test_without_gradients_nothing_is_kept():
    hidden, weight, targets = draw()
    assert not token_nlls(hidden, weight, targets).requires_grad


def test_where_no_gradient_is_recorded_none_is_computed(monkeypatch):
    hidden, weight, targets = (x.requires_grad_(x.is_floating_point()) for x in draw())
    products = []
    monkeypatch.setattr(cross_entropy.torch, "mm", lambda *_, **__: products.append(1))
    with torch.no_grad():
        token_nlls(hidden, weight, targets)
    assert products == []
    token_nlls(hidden, weight, targets)
    assert products


def test_no_more_logits_than_a_chunk_exist_at_once(monkeypatch):
    rows, softmax = [], torch.log_softmax

    def spy(logits: Tensor, **kwargs: object) -> Tensor:
        rows.append(len(logits))
        return softmax(logits, **kwargs)

    monkeypatch.setattr(cross_entropy.torch, "log_softmax", spy)
    token_nlls(*draw())
    assert rows == [CHUNK_TOKENS, CHUNK_TOKENS, 7]


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_logits_are_normalised_in_float32(autocast):
    hidden, weight, targets = draw()
    logits = hidden.bfloat16() @ weight.bfloat16().T
    want = F.cross_entropy(logits.float(), targets, reduction="none")
    if not autocast:
        hidden, weight = hidden.bfloat16(), weight.bfloat16()
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        got = token_nlls(hidden, weight, targets)
    got.mean().backward()
    assert hidden.grad.dtype is hidden.dtype
    assert weight.grad.dtype is weight.dtype
    assert largest(got - want) < 1e-5
    in_bfloat16 = F.cross_entropy(logits, targets, reduction="none")
    assert largest(in_bfloat16 - want) > 1e-3


def draw_two() -> tuple[Tensor, Tensor, Tensor, Prediction]:
    """Draw a student of float64 and a teacher of another width."""
    hidden, weight, targets = draw()
    generator = torch.Generator().manual_seed(1)
    teacher = [torch.randn(n, WIDTH + 4, generator=generator).double() for n in (TOKENS, VOCAB)]
    return hidden.double(), weight.double(), targets, Prediction(*teacher)


def plain_kls(hidden: Tensor, weight: Tensor, teacher: Prediction) -> Tensor:
    expected = torch.softmax(teacher.hidden_states @ teacher.weight.T, dim=-1)
    return (expected * (expected.log() - torch.log_softmax(hidden @ weight.T, dim=-1))).sum(-1)


@pytest.mark.parametrize("num_tokens", [1, CHUNK_TOKENS, TOKENS])
def test_divergence_from_a_teacher_equals_the_plain_formula_and_its_gradient(num_tokens):
    hidden, weight, *_ = draw_two()
    student, teacher = hidden[:num_tokens], hidden.roll(1, dims=0)[:num_tokens]
    student.requires_grad_()
    got = token_kls(student, teacher, weight)
    want = plain_kls(student, weight, Prediction(teacher, weight))
    assert got.dtype is torch.float64
    assert largest(want) > 1
    assert largest(got - want) < 1e-9
    # Each token weighs otherwise, so that none may take another's gradient.
    share = torch.arange(1, num_tokens + 1).double()
    gradients = [torch.autograd.grad((share * x).sum(), student)[0] for x in (got, want)]
    assert largest(gradients[0] - gradients[1]) < 1e-9 * largest(gradients[1])
    other_way_round = plain_kls(teacher, weight, Prediction(student.detach(), weight))
    assert largest(got - other_way_round) > 0.1


@pytest.mark.parametrize("kl_weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("trains", ["hidden", "weight", "both"])
def test_a_mixture_of_losses_equals_the_plain_one_and_its_gradient(kl_weight, trains):
    hidden, weight, targets, teacher = draw_two()
    hidden.requires_grad_(trains != "weight")
    weight.requires_grad_(trains != "hidden")
    wanted = [x for x in (hidden, weight) if x.requires_grad]
    got = token_losses(hidden, weight, targets, teacher, kl_weight)
    want = (1 - kl_weight) * plain_nlls(hidden, weight, targets)
    want = want + kl_weight * plain_kls(hidden, weight, teacher)
    assert largest(got - want) < 1e-9
    gradients = [torch.autograd.grad(3 * x.mean(), wanted) for x in (got, want)]
    for one, other in zip(*gradients, strict=True):
        assert largest(other) > 1e-3
        assert largest(one - other) < 1e-9


def test_a_student_like_its_teacher_has_no_divergence_and_no_gradient():
    hidden, weight, *_ = draw_two()
    student = hidden.clone().requires_grad_()
    kls = token_kls(student, hidden, weight)
    kls.sum().backward()
    assert largest(kls) == 0
    assert largest(student.grad) < 1e-12


def test_no_gradient_reaches_the_teacher():
    hidden, weight, targets, teacher = draw_two()
    teacher.hidden_states.requires_grad_()
    teacher.weight.requires_grad_()
    token_losses(hidden.requires_grad_(), weight, targets, teacher, 0.5).mean().backward()
    assert largest(hidden.grad) > 0
    assert teacher.hidden_states.grad is None
    assert teacher.weight.grad is None


def test_of_a_teacher_too_no_more_logits_than_a_chunk_exist_at_once(monkeypatch):
    rows, softmax = [], torch.log_softmax

    def spy(logits: Tensor, **kwargs: object) -> Tensor:
        rows.append(len(logits))
        return softmax(logits, **kwargs)

    monkeypatch.setattr(cross_entropy.torch, "log_softmax", spy)
    token_losses(*draw_two(), kl_weight=0.5)
    assert rows == [CHUNK_TOKENS] * 4 + [7] * 2


@pytest.mark.parametrize("autocast", [False, True])
def test_a_divergence_of_bfloat16_logits_is_computed_in_float32(autocast):
    hidden, weight, _ = draw()
    student = (hidden + 0.05 * torch.randn_like(hidden)).bfloat16()
    hidden, weight = hidden.bfloat16(), weight.bfloat16()
    logits = [(x @ weight.T).float() for x in (student, hidden)]
    log_p, log_q = (torch.log_softmax(x, dim=-1) for x in logits)
    want = (log_q.exp() * (log_q - log_p)).sum(-1)
    if autocast:
        student, hidden, weight = student.float(), hidden.float(), weight.float()
    student.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        got = token_kls(student, hidden, weight)
    got.mean().backward()
    assert got.dtype is torch.float32
    assert student.grad.dtype is student.dtype
    assert largest(got - want) < 1e-5
