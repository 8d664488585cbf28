"""Low-rank adapters on the projections of every attention, for training only.

Made by the library `peft`. They train beside what the memory has of its own, and are merged into
the weights before anything is saved: no file knows of them.

Source: Hu et al. 2021, arXiv:2106.09685.
"""

from dataclasses import dataclass

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraModel
from torch import nn
from transformers import PreTrainedModel

from infini_retrofit.families import PROJECTIONS
from infini_retrofit.retrofit import attention_modules, infini_modules
from infini_retrofit.trainable import set_trainable

# GPT-NeoX projects to queries, keys and values at once.
ADAPTED = (*PROJECTIONS, "query_key_value", "dense")


@dataclass(frozen=True, kw_only=True)
class LoraParams:
    """Section `finetune.lora` of params.yaml."""

    rank: int
    alpha: float  # the adapters' scale is alpha / rank

    def __post_init__(self) -> None:
        """Refuse adapters that could not change anything."""
        if self.rank < 1:
            raise ValueError(f"finetune.lora.rank must be at least 1, got {self.rank}")
        if self.alpha <= 0:
            raise ValueError(f"finetune.lora.alpha must be greater than 0, got {self.alpha}")


@dataclass(frozen=True)
class Adapters:
    """The adapters in a model, and all that trains with them.

    Attributes:
        groups: the trainable parameters by group, as `set_trainable` returns them: `infini` holds
            the adapters of Infini layers, `rest` those of the base's own attention.
    """

    tuner: LoraModel
    groups: dict[str, list[nn.Parameter]]

    def merge(self) -> None:
        """Add the adapters to the weights that they adapt, and take them out."""
        self.tuner.merge_and_unload()


def add_lora(
    model: PreTrainedModel, params: LoraParams, seed: int, frozen_dtype: torch.dtype | None = None
) -> Adapters:
    """Put adapters that start as nothing on all attention projections, in place.

    Args:
        model: a retrofitted model, a control or a base, in float32.
        params: the adapters' size.
        seed: of the adapters' half that starts at random.
        frozen_dtype: of what neither trains nor is adapted; None: as it is. What is adapted stays
            unrounded, because it is saved with the adapters merged in.
    """
    groups = set_trainable(model, "memory")
    projections = _projections(model)
    config = LoraConfig(r=params.rank, lora_alpha=params.alpha, target_modules=list(projections))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tuner = LoraModel(model, config, "default")
    for parameter in (p for group in groups.values() for p in group):
        parameter.requires_grad_(True)  # peft freezes all that is not its own
    _round_frozen(model, projections, frozen_dtype)
    of_infini = {id(p) for m in infini_modules(model).values() for p in m.parameters()}
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            groups["infini" if id(parameter) in of_infini else "rest"].append(parameter)
    return Adapters(tuner, groups)


def _projections(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """Return the projections of every attention module, by their names in the model."""
    inside = {id(m) for attention in attention_modules(model) for m in attention.modules()}
    return {
        name: module
        for name, module in model.named_modules()
        if id(module) in inside and name.rpartition(".")[2] in ADAPTED
    }


def _round_frozen(
    model: PreTrainedModel, projections: dict[str, nn.Linear], dtype: torch.dtype | None
) -> None:
    """Give what neither trains nor is adapted its dtype for the run."""
    adapted = {id(p) for projection in projections.values() for p in projection.parameters()}
    for parameter in model.parameters():
        if dtype is not None and not parameter.requires_grad and id(parameter) not in adapted:
            parameter.data = parameter.data.to(dtype)
