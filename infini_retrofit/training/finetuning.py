"""Fine-tuning: next-token prediction on long documents, memory carried across segments.

Knows nothing of files and stages.

Axes:
    B  document
    P  piece of a document, which is a document of its own in a step
    T  token of a document
    L  token of a piece
    D  model width
"""

from dataclasses import asdict, dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from infini_retrofit.layer.form import InfiniParams
from infini_retrofit.model.running import run_folded
from infini_retrofit.scoring.labels import (
    Labelled,
    next_token_nlls,
    next_tokens,
    t2_nlls,
    tokens_after_next,
)
from infini_retrofit.scoring.losses import Prediction, token_losses, token_nlls
from infini_retrofit.scoring.memory_use import memory_use
from infini_retrofit.scoring.score import Score, segment_runs, total
from infini_retrofit.training.curriculum import NumSegments, choose_length, recut
from infini_retrofit.training.parameters import Adapters, LoraParams, add_lora, set_trainable
from infini_retrofit.training.schedule import FullLrScale, Schedule
from infini_retrofit.training.teacher import DocumentTeacher
from infini_retrofit.training.trainee import Trainee, no_ppl, ppl_of_nll

Trainable = Literal["memory", "infini", "attention", "all", "lora"]


@dataclass(frozen=True, kw_only=True)
class FinetuneParams(Schedule):
    """Section `finetune` of params.yaml."""

    section = "finetune"

    trainable: Trainable
    lora: LoraParams  # used where `trainable` is lora
    label_shift: Literal[1, 2] = 1  # 2: the seeds' mistake, learning the token after the next
    kl_weight: float  # of the divergence from the base's prediction, the rest of cross-entropy
    kl_context: Literal["segment", "document"]  # what the base sees for it
    num_segments: NumSegments  # of a document in a step
    train_documents: int  # at most
    val_documents: int  # at most
    lr_scale: FullLrScale

    def __post_init__(self) -> None:
        """Refuse values that would only fail, or mislead, later."""
        super().__post_init__()
        self.require_at_least(1, "train_documents", "val_documents")
        self.require_scales(self.lr_scale)
        if not 0 <= self.kl_weight <= 1:
            raise ValueError(f"finetune.kl_weight must be in 0..1, got {self.kl_weight}")
        if self.label_shift == 2 and self.kl_weight:
            raise ValueError(
                "finetune.kl_weight must be 0 when finetune.label_shift is 2, where the base's "
                f"prediction is one of another token, got {self.kl_weight}"
            )


class Finetuning(Trainee):
    """A retrofitted model that learns to predict documents it sees one segment at a time."""

    def __init__(
        self,
        model: PreTrainedModel,
        infini: InfiniParams,
        params: FinetuneParams,
        dtype: torch.dtype,
        base: PreTrainedModel | None = None,
    ) -> None:
        """Choose what trains.

        Args:
            model: a retrofitted model, or a control, in float32.
            infini: the form of the retrofit, of which the control is a control.
            params: section `finetune`.
            dtype: of the matrix products, and of what does not train.
            base: the untouched base, if `params.kl_weight` is not 0; it is frozen.

        Raises:
            ValueError: if there is nothing that could train.
        """
        check_trainable(params.trainable, infini)
        assert (base is not None) == (params.kl_weight > 0), "a divergence needs its base"
        groups, adapters = _choose(model, infini, params, dtype)
        super().__init__(model, groups, asdict(params.lr_scale), dtype)
        self.params = params
        self.segment_length = infini.segment_length
        self.adapters = adapters
        teacher_sees = infini.segment_length if params.kl_context == "segment" else None
        self.teacher = None if base is None else DocumentTeacher(base, teacher_sees)

    def forward(self, input_ids: Int[Tensor, "B T"]) -> dict[str, Tensor]:
        """Return the mean loss in nats a token; gradients reach through all segments."""
        pieces = self._pieces(input_ids) if self.training else input_ids
        found = run_folded(self.model, pieces, self.segment_length)
        hidden_states, targets = self._label(pieces, found)
        head = self.model.get_output_embeddings().weight
        if self.teacher is None:
            return {"loss": token_nlls(hidden_states, head, targets).mean()}
        expected = Prediction(self._label(pieces, self.teacher(pieces))[0], self.teacher.weight)
        losses = token_losses(hidden_states, head, targets, expected, self.params.kl_weight)
        return {"loss": losses.mean()}

    def _pieces(self, documents: Int[Tensor, "B T"]) -> Int[Tensor, "BP L"]:
        """Cut documents into the pieces of this step, each of which starts with no memory."""
        num_segments = choose_length(
            self.params.num_segments,
            documents.shape[1] // self.segment_length,
            self.step,
            self.num_steps,
            self.params.seed,
        )
        return recut(documents, num_segments * self.segment_length)

    def _label(self, ids: Int[Tensor, "B T"], hidden_states: Float[Tensor, "B T D"]) -> Labelled:
        """Say what each position learns to predict."""
        if self.params.label_shift == 2:
            return tokens_after_next(ids, hidden_states, self.segment_length)
        return next_tokens(ids, hidden_states)

    def train_ppl(self, loss: float) -> float | str:
        """A training loss with a divergence in it, or of other tokens, is no likelihood."""
        is_likelihood = self.teacher is None and self.params.label_shift == 1
        return ppl_of_nll(loss) if is_likelihood else no_ppl(loss)

    def validate(self, val: Int[Tensor, "B T"]) -> dict[str, float]:
        """Score whole validation documents under the protocol `segment`.

        Trained with the seeds' labels, the best epoch is the one they would have chosen: the
        loss is that of the protocol `t2`, the perplexity beside it stays that of `segment`.
        """
        runs = list(segment_runs(self.model, val, self.segment_length))
        score = total(Score.of(next_token_nlls(self.model, *run)) for run in runs)
        found = {"val_loss": score.nll, "val_ppl": score.ppl}
        if self.params.label_shift == 2:
            t2 = total(Score.of(t2_nlls(self.model, *run, self.segment_length)) for run in runs)
            found |= {"val_loss": t2.nll, "t2_val_ppl": t2.ppl}
        return found | memory_use(self.model, val, self.segment_length)

    def merge(self) -> None:
        """Fold adapters into the weights: nothing that is saved knows of them."""
        if self.adapters is not None:
            self.adapters.merge()


def check_trainable(trainable: str, infini: InfiniParams, section: str = "finetune") -> None:
    """Refuse to train Infini layers where there are none.

    Raises:
        ValueError: if so.
    """
    if infini.layers == [] and trainable in ("memory", "infini"):
        raise ValueError(
            f"{section}.trainable must be one of all, attention, lora when infini.layers is [], "
            f"where no Infini layer could train, got {trainable}"
        )


def _choose(
    model: PreTrainedModel, infini: InfiniParams, params: FinetuneParams, dtype: torch.dtype
) -> tuple[dict[str, list[nn.Parameter]], Adapters | None]:
    """Freeze all but what is to train, and return that by group."""
    if params.trainable == "lora":
        adapters = add_lora(model, params.lora, params.seed, dtype)
        return adapters.groups, adapters
    return set_trainable(model, params.trainable, infini.whole_layers, dtype), None
