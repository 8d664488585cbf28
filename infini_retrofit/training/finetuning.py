"""Fine-tuning: next-token prediction on long documents, memory carried across segments.

Knows nothing of files and stages.

Axes:
    B  document
    T  token of a document
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from infini_retrofit.layer.form import InfiniParams
from infini_retrofit.layer.probe import Probe, Read
from infini_retrofit.model.running import run_folded
from infini_retrofit.pipeline.fields import Count, CountOrZero, Factor, Weight
from infini_retrofit.pipeline.progress import say
from infini_retrofit.scoring.losses import Prediction, mixed_losses, token_nlls
from infini_retrofit.scoring.memory_use import memory_use, run_and_read
from infini_retrofit.scoring.score import (
    Score,
    next_tokens,
    score_runs,
    segment_runs,
    t2_nlls,
    tokens_after_next,
    total,
)
from infini_retrofit.training.parameters import LoraParams, add_lora, set_trainable
from infini_retrofit.training.task import Schedule, TrainingTask
from infini_retrofit.training.whitening import whiten_keys

WHITENING_DOCUMENTS = 8  # at most
Trainable = Literal["memory", "infini", "attention", "all", "lora"]


@dataclass(frozen=True, kw_only=True)
class LrScale:
    """Section `finetune.lr_scale` of params.yaml: factors on `lr`, by the parameters' group."""

    memory: Factor  # of feature maps and the like, gates apart
    infini: Factor  # of the Infini layers' projections
    rest: Factor  # of everything else that trains


@dataclass(frozen=True, kw_only=True)
class FinetuneParams(Schedule):
    """Section `finetune` of params.yaml."""

    trainable: Trainable
    lora: LoraParams  # used where `trainable` is lora
    label_shift: Literal[1, 2] = 1  # 2: the seeds' mistake, learning the token after the next
    # Of the divergence from the base's prediction; the rest is cross-entropy's.
    kl_weight: Weight
    train_documents: Count  # at most
    # Of these, the last: the memory alone trains on them, after all else has without it.
    memory_documents: CountOrZero
    val_documents: Count  # at most
    lr_scale: LrScale

    def __post_init__(self) -> None:
        """Refuse a divergence from the base's prediction of another token, and empty parts."""
        if self.memory_documents and self.trainable == "memory":
            raise ValueError(
                "finetune.memory_documents must be 0 when finetune.trainable is memory: "
                f"nothing else trains before it, got {self.memory_documents}"
            )
        if self.memory_documents >= self.train_documents:
            raise ValueError(
                f"finetune.memory_documents must be less than finetune.train_documents, which is "
                f"{self.train_documents}, got {self.memory_documents}"
            )
        if self.label_shift == 2 and self.kl_weight:
            raise ValueError(
                "finetune.kl_weight must be 0 when finetune.label_shift is 2, where the base's "
                f"prediction is one of another token, got {self.kl_weight}"
            )


class Finetuning(TrainingTask):
    """A retrofitted model that learns to predict documents, one segment in sight at a time."""

    def __init__(
        self,
        model: PreTrainedModel,
        infini: InfiniParams,
        params: FinetuneParams,
        dtype: torch.dtype,
        base: PreTrainedModel | None = None,
        read: Read = "own",
        round_frozen: bool = True,
    ) -> None:
        """Choose what trains of a retrofit of the form `infini`, or of its control, in float32.

        `dtype` is that of the matrix products, and of what does not train, unless
        `round_frozen` is false. The untouched base is there where `params.kl_weight` is not 0; it
        is frozen. `read` says what a segment reads.
        """
        if params.trainable == "lora":
            tuner, groups = add_lora(model, params.lora, params.seed, dtype)
        else:
            tuner = None
            frozen_dtype = dtype if round_frozen else None
            groups = set_trainable(model, params.trainable, infini.whole_layers, frozen_dtype)
        super().__init__(model, groups, dtype, asdict(params.lr_scale))
        self.params, self.read = params, read
        self.segment_length = infini.segment_length
        if tuner is not None:
            self.merge = tuner.merge_and_unload  # nothing that is saved knows of adapters
        # Inside a function, the base is no part of what trains or is saved.
        self.predict = None if base is None else partial(predict, base.eval().requires_grad_(False))

    def forward(self, input_ids: Int[Tensor, "B T"]) -> dict[str, Tensor]:
        """Return the mean loss in nats a token; gradients reach through all segments."""
        probe = Probe(read=self.read)
        hidden_states = run_folded(self.model, input_ids, self.segment_length, probe)
        if self.params.label_shift == 2:
            predicting, labels = tokens_after_next(input_ids, hidden_states, self.segment_length)
        else:
            predicting, labels = next_tokens(input_ids, hidden_states)
        head = self.model.get_output_embeddings()
        if self.predict is None:
            return {"loss": token_nlls(predicting, head.weight, labels, head.bias).mean()}
        expected = self.predict(input_ids, self.segment_length)
        how = (expected, self.params.kl_weight, head.bias)
        losses = mixed_losses(predicting, head.weight, labels, *how)
        return {"loss": losses.mean()}

    def train_ppl(self, loss: float) -> float | str:
        """Return none for a loss with a divergence in it, or of other tokens."""
        is_likelihood = self.predict is None and self.params.label_shift == 1
        return super().train_ppl(loss) if is_likelihood else ""

    def validate(self, val: Int[Tensor, "B T"]) -> dict[str, float]:
        """Score validation documents under the protocol `segment`, or as `read` says.

        With the seeds' labels `val_loss` is that of the protocol `t2`, so that the best epoch is
        the seeds' choice; `val_ppl` stays that of `segment`.
        """
        if self.read == "off":
            runs, readings = segment_runs(self.model, val, self.segment_length, "off"), {}
        else:
            runs, readings = run_and_read(self.model, val, self.segment_length)
        own = total(score_runs(self.model, runs))
        metrics = {"val_loss": own.nll, "val_ppl": own.ppl}
        if self.params.label_shift == 2:
            t2 = total(Score.of(t2_nlls(self.model, *run, self.segment_length)) for run in runs)
            metrics |= {"val_loss": t2.nll, "t2_val_ppl": t2.ppl}
        return metrics | memory_use(self.model, val, self.segment_length, own, readings)


def finetuning_parts(
    model: PreTrainedModel,
    infini: InfiniParams,
    params: FinetuneParams,
    documents: Int[Tensor, "B T"],
    dtype: torch.dtype,
    base: PreTrainedModel | None = None,
) -> Iterator[tuple[Finetuning, Int[Tensor, "_ T"]]]:
    """Yield what trains of a retrofit, and on which documents, one part after another.

    With `memory_documents` the memory trains last and alone: its keys then whiten what the trained
    layers say, and its documents are new to them. The other arguments are those of `Finetuning`.

    Raises:
        ValueError: if no document is left for the first part.
    """
    num_first = len(documents) - params.memory_documents
    if not params.memory_documents:
        task = Finetuning(model, infini, params, dtype, base)
    elif num_first < 1:
        raise ValueError(
            f"finetune.memory_documents must be less than the {len(documents)} documents of the "
            f"train split, got {params.memory_documents}: lower it, or longdocs.tokens_per_document"
        )
    else:
        say(f"first {num_first} documents train without the memory")
        yield Finetuning(model, infini, params, dtype, base, read="off"), documents[:num_first]
        documents = documents[num_first:]
        say(f"then {len(documents)} documents train the memory alone")
        alone = replace(params, trainable="memory", memory_documents=0)
        task = Finetuning(model, infini, alone, dtype, base, round_frozen=False)
    whiten_keys(model, documents[:WHITENING_DOCUMENTS], infini.segment_length, dtype)
    yield task, documents


@torch.no_grad()
def predict(
    base: PreTrainedModel, documents: Int[Tensor, "B T"], segment_length: int
) -> Prediction:
    """Predict every next token of documents by a base that sees one segment at a time."""
    hidden_states = run_folded(base, documents, segment_length)
    predicting, _ = next_tokens(documents, hidden_states)
    head = base.get_output_embeddings()
    return Prediction(predicting, head.weight, head.bias)
