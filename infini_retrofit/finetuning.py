"""Fine-tuning: next-token prediction on long documents, memory carried across segments.

Knows nothing of files and stages.

Axes:
    B  document
    T  token
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from infini_retrofit.attention import InfiniParams
from infini_retrofit.cross_entropy import token_nlls
from infini_retrofit.perplexity import score_segments, total
from infini_retrofit.retrofit import insert_infini, set_trainable, without_memory
from infini_retrofit.schedule import Schedule
from infini_retrofit.segments import run_folded
from infini_retrofit.training import Trainee


@dataclass(frozen=True, kw_only=True)
class LrScale:
    """Factors on `finetune.lr`."""

    infini: float  # of the Infini layers, gates apart
    rest: float  # of everything else that trains

    def __post_init__(self) -> None:
        """Refuse a factor below 0."""
        for name in ("infini", "rest"):
            if getattr(self, name) < 0:
                value = getattr(self, name)
                raise ValueError(f"finetune.lr_scale.{name} must be at least 0, got {value}")


@dataclass(frozen=True, kw_only=True)
class FinetuneParams(Schedule):
    """Section `finetune` of params.yaml."""

    section = "finetune"

    trainable: Literal["infini", "attention", "all"]
    train_documents: int  # at most
    val_documents: int  # at most
    lr_scale: LrScale

    def __post_init__(self) -> None:
        """Refuse values that would only fail, or mislead, later."""
        super().__post_init__()
        self.require_at_least(1, "train_documents", "val_documents")


class Finetuning(Trainee):
    """A retrofitted model that learns to predict documents it sees one segment at a time."""

    def __init__(
        self,
        model: PreTrainedModel,
        infini: InfiniParams,
        params: FinetuneParams,
        dtype: torch.dtype,
    ) -> None:
        """Choose what trains.

        Args:
            model: a retrofitted model, or a control, in float32.
            infini: the form of the retrofit, of which the control is a control.
            params: section `finetune`.
            dtype: of the matrix products, and of what does not train.
        """
        whole_layers = infini.init == "random_layer"
        groups = set_trainable(model, params.trainable, whole_layers, dtype)
        scales = {"infini": params.lr_scale.infini, "rest": params.lr_scale.rest}
        super().__init__(model, groups, scales, dtype)
        self.segment_length = infini.segment_length

    def forward(self, input_ids: Int[Tensor, "B T"]) -> dict[str, Tensor]:
        """Return the mean loss in nats a token; gradients reach through all segments."""
        hidden_states = run_folded(self.model, input_ids, self.segment_length)
        nlls = token_nlls(
            hidden_states[:, :-1].flatten(0, 1),
            self.model.get_output_embeddings().weight,
            input_ids[:, 1:].flatten(),
        )
        return {"loss": nlls.mean()}

    def validate(self, val: Int[Tensor, "B T"]) -> dict[str, float]:
        """Score validation documents under the protocol `segment`."""
        score = total(score_segments(self.model, val, self.segment_length)[0])
        return {"val_loss": score.nll, "val_ppl": score.ppl}


def make_control(model: PreTrainedModel, infini: InfiniParams) -> InfiniParams:
    """Confine a base model to segments in the layers of a retrofit, without a memory, in place.

    Its attention keeps the base's form and weights. Fine-tuned alike, it shows what the
    retrofit owes to having seen these texts.

    Returns:
        The control's form.
    """
    control = without_memory(infini, infini.local_context)
    insert_infini(model, control)
    return control
