"""Distillation: fit Infini layers to what the base does in a full forward pass.

Knows nothing of files and stages.

Axes:
    B  sample
    T  token
"""

import copy
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from infini_retrofit.layer.attention import Noted
from infini_retrofit.layer.cut import Cut
from infini_retrofit.layer.form import InfiniParams
from infini_retrofit.model.families import decoder_layers
from infini_retrofit.model.retrofit import (
    attention_modules,
    has_memory,
    insert_infini,
    resolve_layers,
)
from infini_retrofit.pipeline.fields import Count, EpochsOrZero
from infini_retrofit.pipeline.progress import progress
from infini_retrofit.scoring.memory_use import memory_use, run_and_read
from infini_retrofit.scoring.score import score_rows, score_runs, total
from infini_retrofit.training.parameters import set_trainable
from infini_retrofit.training.task import Schedule, TrainingTask

Objective = Literal["layer_output", "attention_output"]


@dataclass(frozen=True, kw_only=True)
class DistillParams(Schedule):
    """Section `distill` of params.yaml."""

    epochs: EpochsOrZero  # 0: insert the layers, fit nothing
    objective: Objective  # the output that is to be like the base's
    trainable: Literal["memory", "infini"]
    samples: Count  # at most, of the train split
    val_samples: Count  # at most, of the val split
    tokens_per_sample: Annotated[int, Field(ge=2)]  # several segments: the memory learns too


class Distillation(TrainingTask):
    """A model whose Infini layers learn from the base that it was.

    Each layer is given the input of the base's layer, so that the error of one layer is not the
    input of another.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        infini: InfiniParams,
        params: DistillParams,
        dtype: torch.dtype,
    ) -> None:
        """Insert the Infini layers into a base in float32, whose own layers become the teacher.

        `dtype` is that of the matrix products, and of what does not train.
        """
        layers = resolve_layers(infini.layers, len(decoder_layers(model)))
        teacher = Teacher(model, layers, params.objective)
        insert_infini(model, infini, params.seed)
        groups = set_trainable(model, params.trainable, infini.whole_layers, dtype)
        super().__init__(model, groups, dtype, lr_scales={})
        self.teacher = teacher
        self.objective = params.objective
        self.segment_length = infini.segment_length
        # Beside a branch the base's own stays. Uncut, it would see what the teacher sees,
        # and leave the branch nothing to learn; so it is given one segment at a time.
        self.is_confined = infini.insertion != "replace"

    def forward(self, input_ids: Int[Tensor, "B T"]) -> dict[str, Tensor]:
        """Return the loss, a mean over layers."""
        calls = self.teacher(input_ids)
        if self.is_confined:
            calls = {index: call.confined(self.segment_length) for index, call in calls.items()}
        losses = [self._loss(index, call, len(input_ids)) for index, call in calls.items()]
        return {"loss": sum(losses, torch.zeros((), device=input_ids.device)) / max(len(losses), 1)}

    def _loss(self, index: int, call: "Call", num_samples: int) -> Float[Tensor, ""]:
        """Return the mean squared error of one layer or attention.

        An attention's error counts as a share of the mean square of its sample's target. In a
        layer's output the residual outweighs the attention and hides its error (the seeds' loss).
        """
        module = modules_of(self.model, self.objective)[index]
        cut = Cut(num_segments=call.num_segments)
        output, target = tensor_of(module(*call.args, **call.kwargs, cut=cut)), call.output
        if self.objective == "layer_output":
            return F.mse_loss(output.float(), target.float())
        error, square = (output.float() - target.float()).square(), target.float().square()
        error, square = (x.reshape(num_samples, -1).mean(dim=1) for x in (error, square))
        return (error / square).mean()

    def train_ppl(self, loss: float) -> str:
        """Return no perplexity: the loss is no likelihood."""
        return ""

    def validate(self, val: Int[Tensor, "B T"]) -> dict[str, float]:
        """Return the loss, and the perplexity of the whole model on samples seen in one pass."""
        rows = progress(val, "distillation's loss", "samples")
        losses = [self.forward(row[None])["loss"].item() for row in rows]
        ppl = total(score_rows(self.model, val)).ppl
        metrics = {"val_loss": sum(losses) / len(losses), "val_ppl": ppl}
        if has_memory(self.model):
            runs, readings = run_and_read(self.model, val, self.segment_length)
            own = total(score_runs(self.model, runs))
            metrics |= memory_use(self.model, val, self.segment_length, own, readings)
        return metrics


@dataclass(frozen=True)
class Call:
    """What a layer or attention of the base was given in a full forward pass, and returned."""

    args: tuple
    kwargs: dict
    output: Tensor
    num_segments: int | None = None  # rows that make up one sample; None: a row is a sample

    def confined(self, segment_length: int) -> "Call":
        """Return the call with segments as rows, so that no base attention sees beyond its own."""
        num_rows, num_tokens = self.output.shape[:2]

        def fold(x: object) -> object:
            if isinstance(x, tuple):
                return tuple(fold(item) for item in x)
            if isinstance(x, Noted):  # all calls share it; what is folded stays so
                x.hidden_states = fold(x.hidden_states)
            if not isinstance(x, Tensor) or x.shape[1:2] != (num_tokens,):
                return x
            return x.expand(num_rows, *x.shape[1:]).reshape(-1, segment_length, *x.shape[2:])

        kwargs = {name: fold(value) for name, value in self.kwargs.items()}
        return Call(fold(self.args), kwargs, fold(self.output), num_tokens // segment_length)


class Teacher:
    """The base's layers up to the last one of interest; notes the calls of those of interest."""

    def __init__(self, model: PreTrainedModel, layers: list[int], objective: Objective) -> None:
        """Copy the layers that an insertion would change, so call it before inserting."""
        self.decoder = copy.copy(model.base_model)
        self.decoder._modules = dict(model.base_model._modules)
        kept = list(decoder_layers(model))[: max(layers, default=-1) + 1]
        self.decoder.layers = nn.ModuleList(
            copy.deepcopy(layer) if i in layers else layer for i, layer in enumerate(kept)
        )
        self._calls: dict[int, Call] = {}
        for index in layers:
            module = modules_of(self.decoder, objective)[index]
            module.register_forward_hook(partial(self._note, index), with_kwargs=True)

    def _note(self, index: int, _: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
        self._calls[index] = Call(args, kwargs, tensor_of(output))

    @torch.no_grad()
    def __call__(self, input_ids: Tensor) -> dict[int, Call]:
        """Run the base on a batch and return the calls by layer."""
        self.decoder(input_ids=input_ids, use_cache=False)
        calls, self._calls = self._calls, {}
        for call in calls.values():
            if noted := call.kwargs.get("noted"):
                noted.has_graph = True  # it is given, as every input is
        return calls


def modules_of(model: PreTrainedModel, objective: Objective) -> list[nn.Module]:
    """Return the modules of a model whose outputs an objective compares, by layer."""
    return list(decoder_layers(model)) if objective == "layer_output" else attention_modules(model)


def tensor_of(output: Tensor | tuple) -> Tensor:
    """Return the hidden states of an output; `output[0]` of a tensor would be a batch row."""
    return output if isinstance(output, Tensor) else output[0]
