"""Chunked losses over the vocabulary against torch's own on all logits at once."""


import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from infini_retrofit.scoring import losses
from infini_retrofit.scoring.losses import CHUNK_TOKENS, Prediction, mixed_losses, token_nlls
from tests.reference import largest

TOKENS, WIDTH, VOCAB = 2 * CHUNK_TOKENS + 7, 13, 29
trained_tensors = pytest.mark.parametrize("trains", ["hidden", "weight", "both"])


def draw(trains: str = "", dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator, dtype=dtype)
    weight = torch.randn(VOCAB, WIDTH, generator=generator, dtype=dtype)
    hidden.requires_grad_(trains in ("hidden", "both"))
    weight.requires_grad_(trains in ("weight", "both"))
    return hidden, weight, torch.randint(VOCAB, (TOKENS,), generator=generator)


def draw_teacher() -> Prediction:
    generator = torch.Generator().manual_seed(1)
    sizes = (TOKENS, WIDTH + 4), (VOCAB, WIDTH + 4)
    tensors = (torch.randn(s, generator=generator, dtype=torch.float64) for s in sizes)
    return Prediction(*(x.requires_grad_() for x in tensors))


def plain_nlls(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(hidden @ weight.T, targets, reduction="none")


def plain_kls(hidden: Tensor, weight: Tensor, teacher: Prediction) -> Tensor:
    expected = torch.softmax(teacher.hidden_states @ teacher.weight.T, dim=-1).detach()
    return (expected * (expected.log() - torch.log_softmax(hidden @ weight.T, dim=-1))).sum(-1)


@pytest.mark.parametrize("num_tokens", [1, CHUNK_TOKENS, TOKENS])
@pytest.mark.parametrize("reduce", [torch.sum, torch.mean])
@trained_tensors
def test_value_and_gradient_equal_those_of_all_logits_at_once(num_tokens, reduce, trains):
    hidden, weight, targets = draw(trains)
    wanted = [x for x in (hidden, weight) if x.requires_grad]
    results = []
    for score in (token_nlls, plain_nlls):
        nlls = score(hidden[:num_tokens], weight, targets[:num_tokens])
        results.append((nlls.detach(), *torch.autograd.grad(3 * reduce(nlls), wanted)))
    for got, want in zip(*results, strict=True):
        assert largest(want) > 1e-3
        assert largest(got - want) < 1e-5 * max(1, largest(want))
    with torch.no_grad():
        assert not token_nlls(hidden, weight, targets).requires_grad
    one_off = token_nlls(hidden[:num_tokens], weight, targets.roll(1)[:num_tokens])
    assert largest(one_off - results[1][0]) > 1


def test_no_more_logits_than_a_chunk_exist_at_once(monkeypatch):
    rows, normalize = [], losses._log_softmax

    def spy(logits: Tensor) -> Tensor:
        rows.append(len(logits))
        return normalize(logits)

    monkeypatch.setattr(losses, "_log_softmax", spy)
    value = mixed_losses(*draw("both", torch.float64), draw_teacher(), kl_weight=0.5)
    assert rows == [*[CHUNK_TOKENS] * 4, 7, 7]
    value.mean().backward()
    assert max(rows) == CHUNK_TOKENS


@pytest.mark.parametrize("kl_weight", [0.0, 0.3, 1.0])
@trained_tensors
def test_a_mixture_equals_the_plain_one_and_no_gradient_reaches_the_teacher(kl_weight, trains):
    hidden, weight, targets = draw(trains, torch.float64)
    teacher = draw_teacher()
    wanted = [x for x in (hidden, weight) if x.requires_grad]
    # Tokens weigh unlike, so that none may take another's gradient.
    shares, gradients = torch.arange(1, TOKENS + 1), []
    got = mixed_losses(hidden, weight, targets, teacher, kl_weight)
    want = (1 - kl_weight) * plain_nlls(hidden, weight, targets)
    want = want + kl_weight * plain_kls(hidden, weight, teacher)
    assert got.dtype is torch.float64
    assert largest(got - want) < 1e-9
    gradients = [torch.autograd.grad((shares * x).sum(), wanted) for x in (got, want)]
    for one, other in zip(*gradients, strict=True):
        assert largest(other) > 1e-3
        assert largest(one - other) < 1e-9 * largest(other)
    mixed_losses(hidden, weight, targets, teacher, kl_weight).sum().backward()
    assert teacher.hidden_states.grad is teacher.weight.grad is None


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_logits_are_normalised_in_float32(autocast):
    hidden, weight, targets = draw("both")
    logits = (hidden.bfloat16() @ weight.bfloat16().T).detach()
    if not autocast:
        hidden, weight = (x.detach().bfloat16().requires_grad_() for x in (hidden, weight))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        got = token_nlls(hidden, weight, targets)
        teacher = Prediction(hidden.roll(1, dims=0), weight)
        divergence = mixed_losses(hidden, weight, targets, teacher, 1.0)
    (got + divergence).mean().backward()
    assert got.dtype is divergence.dtype is torch.float32
    assert (hidden.grad.dtype, weight.grad.dtype) == (hidden.dtype, weight.dtype)
    log_p = torch.log_softmax(logits.float(), dim=-1)
    log_q = log_p.roll(1, dims=0)
    want = (log_q.exp() * (log_q - log_p)).sum(-1)
    assert largest(divergence - want) < 1e-5 * largest(want)
    want = F.cross_entropy(logits.float(), targets, reduction="none")
    assert largest(got - want) < 1e-5
    in_bfloat16 = F.cross_entropy(logits, targets, reduction="none")
    assert largest(in_bfloat16 - want) > 1e-3
