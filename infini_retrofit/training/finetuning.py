"""Fine-tuning: next-token prediction on long documents, memory carried across segments.

Knows nothing of files and stages.

Axes:
    B  document
    T  token of a document
    D  model width
"""

from dataclasses import asdict, dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from infini_retrofit.layer.form import InfiniParams
from infini_retrofit.model.running import run_folded
from infini_retrofit.scoring.labels import Labelled, next_tokens, t2_nlls, tokens_after_next
from infini_retrofit.scoring.losses import Prediction, mixed_losses, token_nlls
from infini_retrofit.scoring.memory_use import memory_use, run_and_read
from infini_retrofit.scoring.score import Score, score_runs, total
from infini_retrofit.training.parameters import LoraParams, add_lora, set_trainable
from infini_retrofit.training.trainee import Schedule, Trainee

Trainable = Literal["memory", "infini", "attention", "all", "lora"]


@dataclass(frozen=True, kw_only=True)
class LrScale:
    """Section `finetune.lr_scale` of params.yaml: factors on `lr`, by the parameters' group."""

    memory: float  # of feature maps and the like, gates apart
    infini: float  # of the Infini layers' projections
    rest: float  # of everything else that trains

    def __post_init__(self) -> None:
        """Refuse a factor below 0, by name."""
        for name, value in asdict(self).items():
            if value < 0:
                raise ValueError(f"finetune.lr_scale.{name} must be at least 0, got {value}")


@dataclass(frozen=True, kw_only=True)
class FinetuneParams(Schedule):
    """Section `finetune` of params.yaml."""

    section = "finetune"

    trainable: Trainable
    lora: LoraParams  # used where `trainable` is lora
    label_shift: Literal[1, 2] = 1  # 2: the seeds' mistake, learning the token after the next
    kl_weight: float  # of the divergence from the base's prediction, the rest of cross-entropy
    train_documents: int  # at most
    val_documents: int  # at most
    lr_scale: LrScale

    def __post_init__(self) -> None:
        """Refuse values that would only fail, or mislead, later."""
        super().__post_init__()
        self.require_at_least(1, "train_documents", "val_documents")
        if not 0 <= self.kl_weight <= 1:
            raise ValueError(f"finetune.kl_weight must be in 0..1, got {self.kl_weight}")
        if self.label_shift == 2 and self.kl_weight:
            raise ValueError(
                "finetune.kl_weight must be 0 when finetune.label_shift is 2, where the base's "
                f"prediction is one of another token, got {self.kl_weight}"
            )


class Finetuning(Trainee):
    """A retrofitted model that learns to predict documents, one segment in sight at a time."""

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
        adapters = None
        if params.trainable == "lora":
            adapters = add_lora(model, params.lora, params.seed, dtype)
            groups = adapters.groups
        else:
            groups = set_trainable(model, params.trainable, infini.whole_layers, dtype)
        super().__init__(model, groups, dtype, asdict(params.lr_scale))
        self.params = params
        self.segment_length = infini.segment_length
        self.adapters = adapters
        self.teacher = None if base is None else Teacher(base, infini.segment_length)

    def forward(self, input_ids: Int[Tensor, "B T"]) -> dict[str, Tensor]:
        """Return the mean loss in nats a token; gradients reach through all segments."""
        hidden_states = run_folded(self.model, input_ids, self.segment_length)
        hidden_states, labels = self._label(input_ids, hidden_states)
        head = self.model.get_output_embeddings().weight
        if self.teacher is None:
            return {"loss": token_nlls(hidden_states, head, labels).mean()}
        expected = self.teacher(input_ids)
        losses = mixed_losses(hidden_states, head, labels, expected, self.params.kl_weight)
        return {"loss": losses.mean()}

    def _label(self, ids: Int[Tensor, "B T"], hidden_states: Float[Tensor, "B T D"]) -> Labelled:
        """Return hidden states and what each learns to predict."""
        if self.params.label_shift == 2:
            return tokens_after_next(ids, hidden_states, self.segment_length)
        return next_tokens(ids, hidden_states)

    def train_ppl(self, loss: float) -> float | str:
        """Return none for a loss with a divergence in it, or of other tokens."""
        is_likelihood = self.teacher is None and self.params.label_shift == 1
        return super().train_ppl(loss) if is_likelihood else ""

    def validate(self, val: Int[Tensor, "B T"]) -> dict[str, float]:
        """Score validation documents under the protocol `segment`.

        With the seeds' labels `val_loss` is that of the protocol `t2`, so that the best epoch is
        the seeds' choice; `val_ppl` stays that of `segment`.
        """
        runs, readings = run_and_read(self.model, val, self.segment_length)
        own = score_runs(self.model, runs)
        metrics = {"val_loss": own.nll, "val_ppl": own.ppl}
        if self.params.label_shift == 2:
            t2 = total(Score.of(t2_nlls(self.model, *run, self.segment_length)) for run in runs)
            metrics |= {"val_loss": t2.nll, "t2_val_ppl": t2.ppl}
        return metrics | memory_use(self.model, val, self.segment_length, own, readings)

    def merge(self) -> None:
        """Merge adapters into the weights: nothing that is saved knows of them."""
        if self.adapters is not None:
            self.adapters.merge()


class Teacher:
    """The frozen base, which sees one segment at a time; no part of what trains or is saved."""

    def __init__(self, base: PreTrainedModel, segment_length: int) -> None:
        self.base = base.eval().requires_grad_(False)
        self.segment_length = segment_length

    @torch.no_grad()
    def __call__(self, documents: Int[Tensor, "B T"]) -> Prediction:
        """Predict every next token of documents."""
        hidden_states = run_folded(self.base, documents, self.segment_length)
        predicting, _ = next_tokens(documents, hidden_states)
        return Prediction(predicting, self.base.get_output_embeddings().weight)


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
