"""What the base's layers do in a full forward pass: the targets of distillation.

Knows nothing of losses.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from infini_retrofit.retrofit import FAMILIES, decoder_layers


@dataclass(frozen=True)
class LayerCall:
    """What one decoder layer and its attention were given in a full forward pass, and gave."""

    args: tuple
    kwargs: dict
    output: Tensor
    attention_args: tuple
    attention_kwargs: dict
    attention_output: Tensor


class LayerTeacher:
    """The base's layers up to the last one of interest, recording what each is asked."""

    def __init__(self, model: PreTrainedModel, layers: list[int]) -> None:
        """Copy what an insertion into `layers` would change; call it before inserting."""
        family = FAMILIES[model.config.model_type]
        self.layers = layers
        self.decoder = copy.copy(model.base_model)
        self.decoder._modules = dict(model.base_model._modules)
        kept = list(decoder_layers(model))[: max(layers) + 1]
        kept = [copy.deepcopy(m) if i in layers else m for i, m in enumerate(kept)]
        self.decoder.layers = nn.ModuleList(kept)
        self._attention: dict[int, tuple] = {}
        self._calls: dict[int, LayerCall] = {}
        for index in layers:
            attention = getattr(kept[index], family.attention)
            attention.register_forward_hook(self._attention_hook(index), with_kwargs=True)
            kept[index].register_forward_hook(self._layer_hook(index), with_kwargs=True)

    def _attention_hook(self, index: int) -> Callable:
        def hook(_: nn.Module, args: tuple, kwargs: dict, output: tuple) -> None:
            self._attention[index] = (args, kwargs, output[0])

        return hook

    def _layer_hook(self, index: int) -> Callable:
        def hook(_: nn.Module, args: tuple, kwargs: dict, output: Tensor | tuple) -> None:
            # Layers of transformers 5 return a tensor, of which [0] would be a batch row.
            output = output if isinstance(output, Tensor) else output[0]
            self._calls[index] = LayerCall(args, kwargs, output, *self._attention.pop(index))

        return hook

    @torch.no_grad()
    def __call__(self, input_ids: Tensor) -> dict[int, LayerCall]:
        """Run the base on a batch and return the calls of the layers of interest."""
        self.decoder(input_ids=input_ids, use_cache=False)
        calls, self._calls = self._calls, {}
        return calls
