"""Dynamic evaluation: a model that trains on what it has read, a step after each segment.

Adapters of low rank learn, and start anew for each document. Each segment is scored before the
step that learns from it. Knows nothing of protocols and files.

Source: Krause et al. 2018, arXiv:1709.07432.

Differs from the paper: adapters of a part of the layers learn, not every weight, and Adam scales
their steps. Plain SGD wins next to nothing on them before it diverges.

Axes:
    B  document
    T  token of a document
    L  token of a segment
    X  channel of a module's input
    Y  channel of its output
    A  channel of an adapter
"""

import copy
from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from infini_retrofit.layer.state import LayerState, State
from infini_retrofit.model.families import decoder_layers
from infini_retrofit.model.running import run_folded
from infini_retrofit.pipeline.progress import progress
from infini_retrofit.scoring.losses import token_nlls
from infini_retrofit.scoring.score import Run, document_batches, score_runs, total

RANK = 8
ADAPTED_ONE_IN = 4  # the last quarter of the layers, rounded up
LEARNING_RATES = (0.001, 0.003, 0.01)  # of which the validation documents choose


class Adapter(nn.Module):
    """What is added to a module's output, for each document apart.

    Of the two factors of its weight one starts at zero, so that it adds nothing.
    """

    def __init__(self, down: Float[Tensor, "A X"], num_outputs: int, num_documents: int) -> None:
        super().__init__()
        self.down = nn.Parameter(down.repeat(num_documents, 1, 1))
        self.up = nn.Parameter(down.new_zeros(num_documents, num_outputs, len(down)))

    def forward(self, x: Float[Tensor, "B L X"]) -> Float[Tensor, "B L Y"]:
        """Compute in the factors' float32."""
        return x.to(self.down.dtype) @ self.down.mT @ self.up.mT


def adapted_modules(model: PreTrainedModel) -> list[nn.Linear]:
    """Return what an adapter stands beside: the MLPs' last projections."""
    layers = decoder_layers(model)
    num_adapted = -(-len(layers) // ADAPTED_ONE_IN)
    chosen = layers[len(layers) - num_adapted :]
    return [[m for m in layer.mlp.modules() if isinstance(m, nn.Linear)][-1] for layer in chosen]


def without_gradients(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy whose parameters share the model's values and need no gradients."""
    shared = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    return copy.deepcopy(model, shared | {id(x): x for x in model.buffers()})


def dynamic_runs(
    model: PreTrainedModel, documents: Int[Tensor, "B T"], segment_length: int, lr: float
) -> Iterator[Run]:
    """Run documents segment by segment, and learn from each segment after it."""
    model = without_gradients(model)
    modules = adapted_modules(model)
    batches = document_batches(model, documents)
    for ids in progress(batches, f"dynamic evaluation, lr {lr:g}", "batches"):
        adapters = make_adapters(modules, len(ids))
        handles = [
            module.register_forward_hook(lambda _, args, out, a=adapter: out + a(*args).to(out))
            for module, adapter in zip(modules, adapters, strict=True)
        ]
        optimizer = torch.optim.Adam(adapters.parameters(), lr)
        state, found = State(), []
        for begin in range(0, ids.shape[1], segment_length):
            own = ids[:, begin : begin + segment_length]
            with torch.enable_grad():
                hidden = run_folded(model, own, segment_length, state=state, first_position=begin)
                head = model.get_output_embeddings()
                predicting, labels = hidden[:, :-1].flatten(0, 1), own[:, 1:].flatten()
                nlls = token_nlls(predicting, head.weight, labels, head.bias)
            optimizer.zero_grad()
            # The documents' adapters are apart: the sum over documents of their mean losses.
            (nlls.sum() / (segment_length - 1)).backward()
            optimizer.step()
            found.append(hidden.detach())
            state = State(before={i: _detach(after) for i, after in state.after.items()})
        for handle in handles:
            handle.remove()
        yield from zip(ids, torch.cat(found, dim=1), strict=True)


def _detach(state: LayerState) -> LayerState:
    """Stop the gradient at a border; there is no memory."""
    context, sink = (x and x.map(Tensor.detach) for x in (state.context, state.sink))
    return LayerState(context=context, sink=sink)


def make_adapters(modules: list[nn.Linear], num_documents: int) -> nn.ModuleList:
    """Make the adapters of a batch of documents; each starts alike, from one seed."""
    generator, adapters = torch.Generator().manual_seed(0), nn.ModuleList()
    for module in modules:
        down = torch.randn(RANK, module.in_features, generator=generator)
        down = down.to(module.weight.device) / module.in_features**0.5
        adapters.append(Adapter(down, module.out_features, num_documents))
    return adapters


def choose_lr(
    model: PreTrainedModel, documents: Int[Tensor, "B T"], segment_length: int
) -> float:
    """Return the learning rate under which validation documents score best."""

    def nll(lr: float) -> float:
        return total(score_runs(model, dynamic_runs(model, documents, segment_length, lr))).nll

    return min(LEARNING_RATES, key=nll)
