"""Losses of hidden states over the vocabulary, without ever holding the logits of all tokens.

Cross-entropy with the words that came, and divergence from what a teacher predicts. Knows
nothing of models or of which tokens are to be scored: the caller aligns targets.

Axes:
    T  scored token
    D  model width
    E  model width of the teacher
    W  word of the vocabulary
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

# Logits of this many tokens are in memory at once: 256 x 49,152 float32 values are 50 MB. Fewer
# tokens make narrow products, which run slower.
CHUNK_TOKENS = 256


@dataclass(frozen=True)
class Prediction:
    """What a teacher predicts for each token: softmax(weight @ hidden state)."""

    hidden_states: Float[Tensor, "T E"]
    weight: Float[Tensor, "W E"]


def token_nlls(
    hidden_states: Float[Tensor, "T D"],
    weight: Float[Tensor, "W D"],
    targets: Int[Tensor, "T"],
) -> Float[Tensor, "T"]:
    """Score each target under softmax(weight @ hidden state), in nats, float32 at least.

    The gradient is computed with the value, chunk by chunk, so that backward needs no logits:
    it costs one product with the hidden states' and, if wanted, one with the weight's.
    """
    return _token_losses(hidden_states, weight, targets, None, 0.0)


def token_kls(
    student_hidden: Float[Tensor, "T D"],
    teacher_hidden: Float[Tensor, "T D"],
    weight: Float[Tensor, "W D"],
) -> Float[Tensor, "T"]:
    """Return KL(teacher || student) for each token, in nats, where both share one weight.

    No gradient reaches the teacher. That of the student is computed as in `token_nlls`.
    """
    return _token_losses(student_hidden, weight, None, Prediction(teacher_hidden, weight), 1.0)


def token_losses(
    hidden_states: Float[Tensor, "T D"],
    weight: Float[Tensor, "W D"],
    targets: Int[Tensor, "T"],
    teacher: Prediction,
    kl_weight: float,
) -> Float[Tensor, "T"]:
    """Return (1 - kl_weight) * `token_nlls` + kl_weight * KL(teacher || student), each token.

    One pass over the student's logits serves both; no gradient reaches the teacher.
    """
    return _token_losses(hidden_states, weight, targets, teacher, kl_weight)


def _token_losses(
    hidden_states: Tensor,
    weight: Tensor,
    targets: Tensor | None,
    teacher: Prediction | None,
    kl_weight: float,
) -> Tensor:
    """Bring everything to the type of products and hand it to the Function."""
    device = hidden_states.device.type
    tensors = [hidden_states, weight]
    if teacher is not None:
        tensors += [teacher.hidden_states.detach(), teacher.weight.detach()]
    if torch.is_autocast_enabled(device):
        tensors = [x.to(torch.get_autocast_dtype(device)) for x in tensors]
    if not torch.is_grad_enabled():
        # A Function is told that a parameter needs its gradient even where none is recorded.
        tensors = [x.detach() for x in tensors]
    hidden_states, weight, *teacher_tensors = tensors
    teacher = Prediction(*teacher_tensors) if teacher_tensors else None
    with torch.autocast(device, enabled=False):
        return _TokenLosses.apply(hidden_states, weight, targets, teacher, kl_weight)


class _TokenLosses(torch.autograd.Function):
    """Values of the losses, their gradients computed on the way."""

    @staticmethod
    def forward(
        ctx,
        hidden_states: Tensor,
        weight: Tensor,
        targets: Tensor | None,
        teacher: Prediction | None,
        kl_weight: float,
    ) -> Tensor:
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        wide = torch.promote_types(weight.dtype, torch.float32)
        losses = torch.empty(len(hidden_states), dtype=wide, device=weight.device)
        grad_hidden = torch.empty_like(hidden_states) if wants_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if wants_weight else None
        for begin in range(0, len(hidden_states), CHUNK_TOKENS):
            chunk = slice(begin, begin + CHUNK_TOKENS)
            hidden = hidden_states[chunk]
            log_probability = torch.log_softmax(hidden @ weight.T, dim=-1, dtype=wide)
            target = None if targets is None else targets[chunk, None]
            expected, kl = _expected(log_probability, teacher, chunk)
            losses[chunk] = _mixed(log_probability, target, kl, kl_weight)
            if not (wants_hidden or wants_weight):
                continue
            grad = _logit_gradient(log_probability, target, expected, kl_weight).to(weight.dtype)
            if wants_hidden:
                torch.mm(grad, weight, out=grad_hidden[chunk])
            if wants_weight:
                grad_weight += (grad.T @ hidden).to(wide)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return losses

    @staticmethod
    def backward(ctx, grad_losses: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad_losses[:, None].to(grad_hidden.dtype)
        if grad_weight is not None:
            # The tokens' parts of it are summed already, so they must all weigh alike, as
            # `.sum()` and `.mean()` make them.
            scale = grad_losses[:1].expand_as(grad_losses)
            assert torch.allclose(grad_losses, scale, rtol=0, atol=0, equal_nan=True)
            grad_weight = (grad_weight * scale[0]).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None


def _expected(
    log_probability: Tensor, teacher: Prediction | None, chunk: slice
) -> tuple[Tensor | None, Tensor | None]:
    """Return the teacher's probabilities of a chunk's words, and its divergence for each token."""
    if teacher is None:
        return None, None
    logits = teacher.hidden_states[chunk] @ teacher.weight.T
    log_expected = torch.log_softmax(logits, dim=-1, dtype=log_probability.dtype)
    expected = log_expected.exp()
    return expected, torch.linalg.vecdot(expected, log_expected.sub_(log_probability))


def _mixed(
    log_probability: Tensor, target: Tensor | None, kl: Tensor | None, kl_weight: float
) -> Tensor:
    """Return the loss of each token."""
    nll = 0 if target is None else -log_probability.gather(1, target).squeeze(1)
    return nll if kl is None else (1 - kl_weight) * nll + kl_weight * kl


def _logit_gradient(
    log_probability: Tensor, target: Tensor | None, expected: Tensor | None, kl_weight: float
) -> Tensor:
    """Turn log-probabilities into the loss's gradient with respect to the logits, in place.

    It is softmax minus what was to be predicted: a word, the teacher's prediction, or a mixture.
    """
    grad = log_probability.exp_()
    if expected is not None:
        grad.sub_(expected, alpha=kl_weight)
    if target is not None:
        grad.scatter_add_(1, target, grad.new_full(target.shape, kl_weight - 1))
    return grad
