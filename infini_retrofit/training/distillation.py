"""Distillation: fit Infini layers to what the base does in a full forward pass.

Knows nothing of files and stages.

Axes:
    B  sample
    T  token
    D  model width
"""

from dataclasses import asdict, dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from infini_retrofit.layer.cut import Cut
from infini_retrofit.layer.form import InfiniParams
from infini_retrofit.model.families import decoder_layers
from infini_retrofit.model.retrofit import attention_modules, insert_infini, resolve_layers
from infini_retrofit.model.running import run_folded, run_in_layer
from infini_retrofit.scoring.losses import token_kls
from infini_retrofit.scoring.memory_use import memory_use
from infini_retrofit.scoring.score import score_rows, total
from infini_retrofit.training.parameters import set_trainable
from infini_retrofit.training.schedule import LrScale, Schedule
from infini_retrofit.training.teacher import LayerCall, LayerTeacher, PredictionTeacher
from infini_retrofit.training.trainee import Trainee, no_ppl


@dataclass(frozen=True, kw_only=True)
class DistillParams(Schedule):
    """Section `distill` of params.yaml."""

    section = "distill"
    least_epochs = 0  # insert the layers, fit nothing

    # What is to be like the base's.
    objective: Literal["layer_output", "attention_output", "logit_kl"]
    trainable: Literal["memory", "infini"]
    samples: int  # at most, of the train split
    val_samples: int  # at most, of the val split
    tokens_per_sample: int  # several segments, so that the memory learns too
    lr_scale: LrScale

    def __post_init__(self) -> None:
        """Refuse values that would only fail, or mislead, later."""
        super().__post_init__()
        self.require_at_least(1, "samples", "val_samples")
        self.require_at_least(2, "tokens_per_sample")
        self.require_scales(self.lr_scale)


class Distillation(Trainee):
    """A model whose Infini layers learn from the base that it was.

    To be like a layer of the base, each is given what the base's was given, so that one layer's
    error is not another's input. To predict like the base, they learn together.
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
        teaches = PredictionTeacher if params.objective == "logit_kl" else LayerTeacher
        teacher = teaches(model, layers)
        insert_infini(model, infini, params.seed)
        groups = set_trainable(model, params.trainable, infini.whole_layers, dtype)
        super().__init__(model, groups, asdict(params.lr_scale), dtype)
        self.teacher = teacher
        self.objective = params.objective
        self.segment_length = infini.segment_length
        # A base's attention that stays sees what the teacher sees, and nothing is left to learn:
        # beside it, a layer is asked for the same output from one segment at a time.
        self.is_confined = infini.insertion == "parallel"

    def forward(self, input_ids: Int[Tensor, "B T"]) -> dict[str, Tensor]:
        """Return the loss, averaged over tokens, and over layers if each has one."""
        if self.objective == "logit_kl":
            return {"loss": self._prediction_loss(input_ids)}
        calls = self.teacher(input_ids)
        if not calls:
            return {"loss": torch.zeros((), device=input_ids.device)}
        loss = self._attention_loss if self.objective == "attention_output" else self._layer_loss
        if self.is_confined:
            calls = {index: call.confined(self.segment_length) for index, call in calls.items()}
        losses = [loss(index, call) for index, call in calls.items()]
        return {"loss": sum(losses) / len(losses)}

    def _layer_loss(self, index: int, call: LayerCall) -> Float[Tensor, ""]:
        """Mean squared error of the layer's output, the seeds' loss."""
        layer = decoder_layers(self.model)[index]
        cut = Cut(num_segments=call.num_segments)
        output = layer(*call.args, **call.kwargs, cut=cut)
        return _squared_error(output, call.output)

    def _attention_loss(self, index: int, call: LayerCall) -> Float[Tensor, ""]:
        """Mean squared error of the attention's output as a share of that output's mean square.

        In the layer's output the residual outweighs the attention's part and hides its error.
        """
        attention = attention_modules(self.model)[index]
        cut = Cut(num_segments=call.num_segments)
        output, _ = attention(*call.attention_args, **call.attention_kwargs, cut=cut)
        error = _squared_error(output, call.attention_output)
        return error / self.mean_of_step(call.attention_output.float().square().mean())

    def _prediction_loss(self, input_ids: Int[Tensor, "B T"]) -> Float[Tensor, ""]:
        """KL(base || student) of the next token, in nats, at every position."""
        if self.is_confined:
            student = run_folded(self.model, input_ids, self.segment_length).flatten(0, 1)
        else:
            student = run_in_layer(self.model, input_ids).flatten(0, 1)
        head = self.model.get_output_embeddings().weight
        return token_kls(student, self.teacher(input_ids).flatten(0, 1), head).mean()

    def train_ppl(self, loss: float) -> str:
        """No loss of distillation is a likelihood."""
        return no_ppl(loss)

    def validate(self, val: Int[Tensor, "B T"]) -> dict[str, float]:
        """Return the distillation loss and the whole model's perplexity on samples."""
        losses = [self.forward(rows[None])["loss"].item() for rows in val]
        score = total(score_rows(self.model, val))
        memory = memory_use(self.model, val, self.segment_length)
        return {"val_loss": sum(losses) / len(losses), "val_ppl": score.ppl} | memory


def _squared_error(output: Tensor, target: Tensor) -> Float[Tensor, ""]:
    return F.mse_loss(output.float(), target.float())
