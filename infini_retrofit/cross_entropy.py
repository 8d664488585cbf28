"""Cross-entropy of hidden states, without ever holding the logits of all tokens.

Knows nothing of models or of which tokens are to be scored: the caller aligns targets.

Axes:
    T  scored token
    D  model width
    W  word of the vocabulary
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

# Logits of this many tokens are in memory at once: 256 x 49,152 float32 values are 50 MB. Fewer
# tokens make narrow products, which run slower.
CHUNK_TOKENS = 256


def token_nlls(
    hidden_states: Float[Tensor, "T D"],
    weight: Float[Tensor, "W D"],
    targets: Int[Tensor, "T"],
) -> Float[Tensor, "T"]:
    """Score each target under softmax(weight @ hidden state), in nats, float32.

    The gradient is computed with the value, chunk by chunk, so that backward needs no logits:
    it costs one product with the hidden states' and, if wanted, one with the weight's.
    """
    if torch.is_autocast_enabled(hidden_states.device.type):
        dtype = torch.get_autocast_dtype(hidden_states.device.type)
        hidden_states, weight = hidden_states.to(dtype), weight.to(dtype)
    if not torch.is_grad_enabled():
        # A Function is told that a parameter needs its gradient even where none is recorded.
        hidden_states, weight = hidden_states.detach(), weight.detach()
    with torch.autocast(hidden_states.device.type, enabled=False):
        return _TokenNlls.apply(hidden_states, weight, targets)


class _TokenNlls(torch.autograd.Function):
    """Value of `token_nlls`, its gradients computed on the way."""

    @staticmethod
    def forward(ctx, hidden_states: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        nlls = torch.empty(len(targets), dtype=torch.float32, device=targets.device)
        grad_hidden = torch.empty_like(hidden_states) if wants_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        for begin in range(0, len(targets), CHUNK_TOKENS):
            chunk = slice(begin, begin + CHUNK_TOKENS)
            hidden, target = hidden_states[chunk], targets[chunk, None]
            log_probability = torch.log_softmax(hidden @ weight.T, dim=-1, dtype=torch.float32)
            nlls[chunk] = -log_probability.gather(1, target).squeeze(1)
            if not (wants_hidden or wants_weight):
                continue
            grad = log_probability.exp_()
            grad.scatter_add_(1, target, grad.new_full(target.shape, -1.0))
            grad = grad.to(weight.dtype)
            if wants_hidden:
                torch.mm(grad, weight, out=grad_hidden[chunk])
            if wants_weight:
                grad_weight += (grad.T @ hidden).float()
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return nlls

    @staticmethod
    def backward(ctx, grad_nlls: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad_nlls[:, None].to(grad_hidden.dtype)
        if grad_weight is not None:
            # The tokens' parts of it are summed already, so they must all weigh alike, as
            # `.sum()` and `.mean()` make them.
            scale = grad_nlls[:1].expand_as(grad_nlls)
            assert torch.allclose(grad_nlls, scale, rtol=0, atol=0, equal_nan=True)
            grad_weight = (grad_weight * scale[0]).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None
