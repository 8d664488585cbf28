"""The control of a retrofit: the base's own attention, fine-tuned alike, without a memory.

Knows nothing of files and stages.
"""

from dataclasses import asdict, dataclass, replace
from typing import Literal

from transformers import PreTrainedModel

from infini_retrofit.layer.form import InfiniParams
from infini_retrofit.model.retrofit import insert_infini, resolve_layers, without_memory
from infini_retrofit.pipeline.fields import LearningRate
from infini_retrofit.training.finetuning import FinetuneParams, Trainable


@dataclass(frozen=True, kw_only=True)
class ControlParams:
    """Section `finetune_control` of params.yaml: where the control trains differently."""

    trainable: Trainable | Literal["same"]  # same: as `finetune` says
    lr: LearningRate | Literal["same"]

    def applied_to(self, params: FinetuneParams) -> FinetuneParams:
        """Return section `finetune` as it holds for the control."""
        return replace(params, **{k: v for k, v in asdict(self).items() if v != "same"})


@dataclass(frozen=True, kw_only=True)
class Control:
    """Form and training of a control; retrofits with equal ones share it."""

    infini: InfiniParams
    finetune: FinetuneParams


def plan_control(
    infini: InfiniParams, params: FinetuneParams, own: ControlParams, num_layers: int
) -> Control:
    """Return a retrofit's control; what makes no difference to it has one value for all.

    Its layers make one however it trains: in a sliding window they see their segment only.
    `params` is section `finetune`, `own` section `finetune_control`.
    """
    params = own.applied_to(params)
    no_memory = replace(params.lr_scale, memory=1.0)
    params = replace(params, lr_scale=no_memory, memory_documents=0)
    layers = resolve_layers(infini.layers, num_layers)
    if params.trainable == "infini" and len(layers) == num_layers and not infini.whole_layers:
        params = replace(params, trainable="attention")
    plain = without_memory(replace(infini, layers=layers), infini.local_context)
    init = infini.init if infini.whole_layers else plain.init
    return Control(infini=replace(plain, init=init), finetune=params)


def make_control(model: PreTrainedModel, infini: InfiniParams) -> InfiniParams:
    """Confine a base to segments in a retrofit's layers, in place, and return the control's form.

    Its attention keeps the base's form and weights.
    """
    control = without_memory(infini, infini.local_context)
    insert_infini(model, control)
    return control
