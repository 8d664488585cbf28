"""Losses of hidden states over the vocabulary, computed chunk by chunk.

The logits of all tokens never exist at once. Knows no model; the caller pairs hidden states with
labels. Why not `torch.nn.functional.linear_cross_entropy`: it returns the loss of bfloat16 products
in bfloat16, and takes twice as long there (LOG.md).

Axes:
    T  scored token
    D  model width
    E  model width of the teacher
    W  word of the vocabulary
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Logits of this many tokens are in memory at once: 256 x 49,152 float32 values are 50 MB. Fewer
# tokens make narrow products, which run slower.
CHUNK_TOKENS = 256


@dataclass(frozen=True)
class Prediction:
    """What a teacher predicts for each token: softmax(weight @ hidden state + bias)."""

    hidden_states: Float[Tensor, "T E"]
    weight: Float[Tensor, "W E"]
    bias: Float[Tensor, "W"] | None = None


def token_nlls(
    hidden_states: Float[Tensor, "T D"],
    weight: Float[Tensor, "W D"],
    targets: Int[Tensor, "T"],
    bias: Float[Tensor, "W"] | None = None,
) -> Float[Tensor, "T"]:
    """Score each target under softmax(weight @ hidden state + bias), in nats.

    The result is float32 or wider. The forward pass computes the gradient too, so that the
    backward pass needs no logits.
    """
    device = hidden_states.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden_states, weight = hidden_states.to(dtype), weight.to(dtype)
    if not torch.is_grad_enabled():
        # A Function is told that a parameter needs a gradient even where none is recorded.
        hidden_states, weight = hidden_states.detach(), weight.detach()
        bias = None if bias is None else bias.detach()
    with torch.autocast(device, enabled=False):
        return _TokenNlls.apply(hidden_states, weight, targets, bias)


class _TokenNlls(torch.autograd.Function):
    """Negative log-likelihoods, and their gradients in the same pass."""

    @staticmethod
    def forward(
        ctx, hidden_states: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None
    ) -> Tensor:
        wants_hidden, wants_weight, _, wants_bias = ctx.needs_input_grad
        wide = torch.promote_types(weight.dtype, torch.float32)
        nlls = torch.empty(len(hidden_states), dtype=wide, device=weight.device)
        grad_hidden = torch.empty_like(hidden_states) if wants_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if wants_weight else None
        grad_bias = torch.zeros_like(bias, dtype=wide) if wants_bias else None
        for begin in range(0, len(hidden_states), CHUNK_TOKENS):
            chunk = slice(begin, begin + CHUNK_TOKENS)
            hidden, target = hidden_states[chunk], targets[chunk, None]
            log_probability = _log_softmax(_logits(hidden, weight, bias))
            nlls[chunk] = -log_probability.gather(1, target).squeeze(1)
            if wants_hidden or wants_weight or wants_bias:
                # The gradient of the logits: softmax, less 1 at the target.
                grad = log_probability.exp_()
                grad.scatter_add_(1, target, grad.new_full(target.shape, -1))
                if wants_bias:
                    grad_bias += grad.sum(dim=0)
                grad = grad.to(weight.dtype)
            if wants_hidden:
                torch.mm(grad, weight, out=grad_hidden[chunk])
            if wants_weight:
                grad_weight += (grad.T @ hidden).to(wide)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.weight_dtype = weight.dtype
        return nlls

    @staticmethod
    def backward(ctx, grad_nlls: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad_nlls[:, None].to(grad_hidden.dtype)
        if grad_weight is not None:
            # It is summed over tokens already, so all must weigh alike, as in a sum or a mean.
            scale = grad_nlls[:1].expand_as(grad_nlls)
            assert torch.allclose(grad_nlls, scale, rtol=0, atol=0, equal_nan=True)
            grad_weight = (grad_weight * scale[0]).to(ctx.weight_dtype)
        if grad_bias is not None:
            grad_bias = grad_bias * grad_nlls[0]
        return grad_hidden, grad_weight, None, grad_bias


def mixed_losses(
    hidden_states: Float[Tensor, "T D"],
    weight: Float[Tensor, "W D"],
    targets: Int[Tensor, "T"],
    teacher: Prediction,
    kl_weight: float,
    bias: Float[Tensor, "W"] | None = None,
) -> Float[Tensor, "T"]:
    """Return (1 - kl_weight) * NLL + kl_weight * KL(teacher || student) of each token, in nats.

    The backward pass computes each chunk's logits again. No gradient reaches the teacher.
    """

    def of_chunk(hidden: Tensor, target: Tensor, teacher_hidden: Tensor) -> Tensor:
        log_student = _log_softmax(_logits(hidden, weight, bias))
        log_teacher = _log_softmax(_logits(teacher_hidden, *fixed))
        kl = F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(-1)
        nll = F.nll_loss(log_student, target, reduction="none")
        return (1 - kl_weight) * nll + kl_weight * kl

    fixed = (teacher.weight.detach(), None if teacher.bias is None else teacher.bias.detach())
    tensors = (hidden_states, targets, teacher.hidden_states.detach())
    chunks = zip(*(x.split(CHUNK_TOKENS) for x in tensors), strict=True)
    return torch.cat([checkpoint(of_chunk, *chunk, use_reentrant=False) for chunk in chunks])


def _logits(
    hidden_states: Float[Tensor, "_ D"], weight: Float[Tensor, "W D"], bias: Tensor | None
) -> Float[Tensor, "_ W"]:
    logits = hidden_states @ weight.T
    return logits if bias is None else logits + bias.to(logits.dtype)


def _log_softmax(logits: Float[Tensor, "_ W"]) -> Float[Tensor, "_ W"]:
    """Normalize in float32 at least."""
    return logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
