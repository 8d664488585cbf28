"""Start keys that tell contexts apart: projections that whiten what a memory's layer is given.

Hidden states have much in common. Keys that are random projections of them all point one way, and
a delta rule then overwrites every value with the next (measured: LOG.md). Knows nothing of losses
and files.

Axes:
    B  document
    T  token of a document
    D  model width
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from infini_retrofit.layer.attention import InfiniAttention
from infini_retrofit.model.retrofit import infini_modules
from infini_retrofit.model.running import run_folded
from infini_retrofit.pipeline.progress import progress

# Below this share of the mean variance a direction is noise, and is not blown up.
_SMALLEST_VARIANCE = 1e-3


@torch.no_grad()
def whiten_keys(
    model: PreTrainedModel, documents: Int[Tensor, "B T"], segment_length: int, dtype: torch.dtype
) -> None:
    """Make the queries and keys of branches with `memory_key: before` white, in place.

    Over the tokens of `documents` their channels then have mean 0, variance 1 and no correlation,
    largest principal component first. Values of embeddings get the mean 0.
    """
    modules = [m for m in infini_modules(model).values() if m.params.memory_key == "before"]
    if not modules:
        return
    with _inputs(modules) as inputs:
        for ids in progress(documents.to(model.device), "whitening keys", "documents"):
            with torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32):
                run_folded(model, ids[None], segment_length)
    for module, noted in zip(modules, inputs, strict=True):
        mean, projection = _whitening(torch.cat([states for states, _ in noted]))
        for linear in (module.q_proj, module.k_proj):
            linear.weight.copy_(projection)
            linear.bias.copy_(-(projection @ mean))
        if module.params.memory_value == "embedding":
            mean = torch.cat([embeddings for _, embeddings in noted]).mean(dim=0)
            module.v_proj.bias.copy_(-(module.v_proj.weight.double().cpu() @ mean))


def _whitening(x: Float[Tensor, "T D"]) -> tuple[Float[Tensor, "D"], Float[Tensor, "D D"]]:
    """Return the mean of rows, and the projection that makes their covariance 1."""
    mean = x.mean(dim=0)
    variance, directions = torch.linalg.eigh((x - mean).T.cov())
    scale = (variance + _SMALLEST_VARIANCE * variance.mean()).rsqrt()
    return mean, (directions * scale).flip(1).T


@contextmanager
def _inputs(
    modules: list[InfiniAttention],
) -> Iterator[list[list[tuple[Float[Tensor, "T D"], Float[Tensor, "T D"]]]]]:
    """Note in float64 the hidden states that each module is given, and its tokens' embeddings.

    The embeddings are the states again where the form has none.
    """
    noted = [[] for _ in modules]

    def note(module: InfiniAttention, args: tuple, kwargs: dict) -> None:
        states = args[0] if args else kwargs["hidden_states"]
        embeddings = kwargs.get("embeddings", states)
        states = module.key_states(states, kwargs.get("noted"))
        if "embed" in kwargs:
            embeddings = kwargs["embed"](kwargs["token_ids"])
        pair = (states, embeddings)
        noted[modules.index(module)].append(tuple(x.flatten(0, 1).double().cpu() for x in pair))

    hooks = [m.register_forward_pre_hook(note, with_kwargs=True) for m in modules]
    try:
        yield noted
    finally:
        for hook in hooks:
            hook.remove()
