"""What the untouched base does with a text: the targets of distillation.

Knows nothing of losses.

Axes:
    B  document
    T  token
    D  model width
    W  word of the vocabulary
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from infini_retrofit.model.families import decoder_layers, family_of
from infini_retrofit.model.running import run_folded, run_in_layer


@dataclass(frozen=True)
class LayerCall:
    """What one decoder layer and its attention were given in a full forward pass, and gave.

    Attributes:
        num_segments: rows that make up one document, see `confined`; None: a row is a document.
    """

    args: tuple
    kwargs: dict
    output: Tensor
    attention_args: tuple
    attention_kwargs: dict
    attention_output: Tensor
    num_segments: int | None = None

    def confined(self, segment_length: int) -> "LayerCall":
        """Return the call with segments as rows, so that no base attention sees beyond its own."""
        num_rows, num_tokens = self.output.shape[:2]

        def fold(x: object) -> object:
            if isinstance(x, tuple):
                return tuple(fold(item) for item in x)
            if not isinstance(x, Tensor) or x.shape[1:2] != (num_tokens,):
                return x
            x = x.expand(num_rows, *x.shape[1:])
            return x.reshape(-1, segment_length, *x.shape[2:])

        return LayerCall(
            args=fold(self.args),
            kwargs={name: fold(value) for name, value in self.kwargs.items()},
            output=fold(self.output),
            attention_args=fold(self.attention_args),
            attention_kwargs={name: fold(value) for name, value in self.attention_kwargs.items()},
            attention_output=fold(self.attention_output),
            num_segments=num_tokens // segment_length,
        )


class LayerTeacher:
    """The base's layers up to the last one of interest, recording what each is asked."""

    def __init__(self, model: PreTrainedModel, layers: list[int]) -> None:
        """Copy what an insertion into `layers` would change; call it before inserting."""
        family = family_of(model.config)
        self.decoder = _keep_decoder(model, layers, max(layers, default=-1) + 1)
        self._attention: dict[int, tuple] = {}
        self._calls: dict[int, LayerCall] = {}
        for index in layers:
            layer = self.decoder.layers[index]
            attention = getattr(layer, family.attention)
            attention.register_forward_hook(self._attention_hook(index), with_kwargs=True)
            layer.register_forward_hook(self._layer_hook(index), with_kwargs=True)

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


class PredictionTeacher:
    """The whole base beside the model that it becomes, sharing what no insertion changes.

    Embedding, norm and head must stay frozen: they serve both.
    """

    def __init__(self, model: PreTrainedModel, layers: list[int]) -> None:
        """Copy what an insertion into `layers` would change; call it before inserting."""
        self.decoder = _keep_decoder(model, layers, len(decoder_layers(model)))

    @torch.no_grad()
    def __call__(self, input_ids: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        """Return the last hidden states of rows seen whole."""
        return self.decoder(input_ids=input_ids, use_cache=False).last_hidden_state


class DocumentTeacher:
    """A base of its own that sees documents segment by segment, or whole.

    Whole, it knows what a memory would have to bring: the context is distilled.
    """

    def __init__(self, base: PreTrainedModel, segment_length: int | None) -> None:
        """Freeze the base.

        Args:
            base: untouched.
            segment_length: tokens that it sees at once; None: the whole document.
        """
        self.base = base.eval().requires_grad_(False)
        self.segment_length = segment_length

    @property
    def weight(self) -> Float[Tensor, "W D"]:
        """What turns hidden states into logits."""
        return self.base.get_output_embeddings().weight

    @torch.no_grad()
    def __call__(self, documents: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        """Return the last hidden states."""
        if self.segment_length is None:
            return run_in_layer(self.base, documents)
        return run_folded(self.base, documents, self.segment_length)


def _keep_decoder(model: PreTrainedModel, layers: list[int], num_kept: int) -> nn.Module:
    """Return the decoder with its first layers, those of `layers` copied, all else shared."""
    decoder = copy.copy(model.base_model)
    decoder._modules = dict(model.base_model._modules)
    kept = list(decoder_layers(model))[:num_kept]
    decoder.layers = nn.ModuleList(
        copy.deepcopy(layer) if i in layers else layer for i, layer in enumerate(kept)
    )
    return decoder
