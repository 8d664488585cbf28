"""Distillation: fit Infini layers to what the base's own layers do in a full forward pass.

Knows nothing of files and stages.

Axes:
    B  sample
    T  token
    D  model width
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from infini_retrofit.attention import InfiniParams
from infini_retrofit.carrier import Carrier
from infini_retrofit.perplexity import score_rows, total
from infini_retrofit.retrofit import (
    attention_modules,
    decoder_layers,
    insert_infini,
    resolve_layers,
    set_trainable,
)
from infini_retrofit.schedule import Schedule
from infini_retrofit.teacher import LayerCall, LayerTeacher
from infini_retrofit.training import Trainee


@dataclass(frozen=True, kw_only=True)
class DistillParams(Schedule):
    """Section `distill` of params.yaml."""

    section = "distill"

    objective: Literal["layer_output", "attention_output"]  # what is to be like the base's
    samples: int  # at most, of the train split
    val_samples: int  # at most, of the val split
    tokens_per_sample: int  # several segments, so that the memory learns too

    def __post_init__(self) -> None:
        """Refuse values that would only fail, or mislead, later."""
        super().__post_init__()
        self.require_at_least(1, "samples", "val_samples")
        self.require_at_least(2, "tokens_per_sample")


class Distillation(Trainee):
    """A model whose Infini layers learn from the layers that they replaced.

    Each layer is given what the base's layer was given, so that one layer's error is not
    another's input.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        infini: InfiniParams,
        params: DistillParams,
        dtype: torch.dtype,
    ) -> None:
        """Insert the Infini layers into a base model, keeping its own layers as teachers.

        Args:
            model: a base model in float32.
            infini: the form of the retrofit.
            params: section `distill`.
            dtype: of the matrix products, and of what does not train.
        """
        layers = resolve_layers(infini.layers, len(decoder_layers(model)))
        teacher = LayerTeacher(model, layers)
        insert_infini(model, infini, params.seed)
        groups = set_trainable(model, "infini", infini.init == "random_layer", dtype)
        super().__init__(model, groups, {"infini": 1.0}, dtype)
        self.teacher = teacher
        self.objective = params.objective

    def forward(self, input_ids: Int[Tensor, "B T"]) -> dict[str, Tensor]:
        """Return the loss, averaged over layers and tokens."""
        calls = self.teacher(input_ids)
        loss = self._attention_loss if self.objective == "attention_output" else self._layer_loss
        losses = [loss(index, call) for index, call in calls.items()]
        return {"loss": sum(losses) / len(losses)}

    def _layer_loss(self, index: int, call: LayerCall) -> Float[Tensor, ""]:
        """Mean squared error of the layer's output, the seeds' loss."""
        layer = decoder_layers(self.model)[index]
        return _squared_error(layer(*call.args, **call.kwargs, carrier=Carrier()), call.output)

    def _attention_loss(self, index: int, call: LayerCall) -> Float[Tensor, ""]:
        """Mean squared error of the attention's output as a share of that output's mean square.

        In the layer's output the residual outweighs the attention's part and hides its error.
        """
        attention = attention_modules(self.model)[index]
        output, _ = attention(*call.attention_args, **call.attention_kwargs, carrier=Carrier())
        error = _squared_error(output, call.attention_output)
        return error / call.attention_output.float().square().mean()

    def validate(self, val: Int[Tensor, "B T"]) -> dict[str, float]:
        """Return the distillation loss and the whole model's perplexity on samples."""
        losses = [self.forward(rows[None])["loss"].item() for rows in val]
        score = total(score_rows(self.model, val))
        return {"val_loss": sum(losses) / len(losses), "val_ppl": score.ppl}


def _squared_error(output: Tensor, target: Tensor) -> Float[Tensor, ""]:
    return F.mse_loss(output.float(), target.float())
