"""What is measured: each case is one computation, built from a base model.

Axes:
    B  document
    T  token
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.operations import count_operations
from benchmarks.reference_loop import score_by_reference_loop
from infini_retrofit.evaluation.protocols import score_sliding
from infini_retrofit.layer.form import InfiniParams
from infini_retrofit.layer.state import State
from infini_retrofit.model.base import load_base
from infini_retrofit.model.retrofit import insert_infini
from infini_retrofit.model.running import run_folded
from infini_retrofit.scoring.losses import token_nlls
from infini_retrofit.scoring.score import next_token_nlls, next_tokens
from infini_retrofit.training.control import make_control
from infini_retrofit.training.distillation import Distillation, DistillParams
from infini_retrofit.training.finetuning import FinetuneParams, Finetuning, LrScale
from infini_retrofit.training.parameters import LoraParams
from infini_retrofit.training.task import TrainingTask

PUBLISHED = InfiniParams(layers=[0])  # on the base's weights
# As in params.yaml.
DEFAULT_LAYER = replace(PUBLISHED, init="random_attention", local="linear", positions="none")
SCHEDULE = {"batch_size": 1, "epochs": 1, "lr": 1e-3, "patience": 1, "seed": 0}


@dataclass(frozen=True)
class Sizes:
    """How many tokens of text a case takes."""

    document: int = 4096  # forward passes, training steps and distilling
    stream: int = 4096  # sliding evaluation
    window: int = 512
    stride: int = 256
    segment: int = 256
    sample: int = 1024  # a row of distilling


@dataclass(frozen=True)
class Setting:
    """The base, device, number type and sizes of a case."""

    base_dir: Path
    device: torch.device
    dtype: torch.dtype
    sizes: Sizes

    def load_base(self, dtype: torch.dtype) -> PreTrainedModel:
        """Load the base to the device."""
        return load_base(self.base_dir, dtype).to(self.device)

    def draw_ids(self, model: PreTrainedModel, *shape: int) -> Tensor:
        """Draw token ids; the time does not depend on which they are."""
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(model.config.vocab_size, shape, generator=generator)
        return ids.to(self.device)


@dataclass(frozen=True)
class Job:
    """One computation that can be repeated.

    Attributes:
        run: computes; returns the loss in nats a token, or 0 if there is none.
        num_tokens: how many tokens it takes.
        head_operations: operations of scoring, where that calls no module of the model.
    """

    run: Callable[[], float]
    num_tokens: int
    head_operations: int = 0

    def count(self) -> tuple[float, int]:
        """Run once; return the loss and the number of operations."""
        with count_operations() as count:
            found = self.run()
        return found, count.total + self.head_operations


def _body(at_once: bool, infini: InfiniParams | None = None) -> Callable[[Setting], Job]:
    """Return a case that runs a document through a model's body, without its head.

    Args:
        at_once: as one segment, as the protocol `full` does; False: folded.
        infini: the form of all layers; None: the base as it is.
    """

    def make(setting: Setting) -> Job:
        model, sizes = setting.load_base(setting.dtype), setting.sizes
        segment_length = sizes.document if at_once else sizes.segment
        if infini is not None:
            insert_infini(model, replace(infini, segment_length=segment_length))
        ids = setting.draw_ids(model, 1, sizes.document)

        @torch.inference_mode()
        def run() -> float:
            run_folded(model, ids, segment_length)
            return 0.0

        return Job(run, sizes.document)

    return make


base_body = _body(at_once=False)


def base_with_head(setting: Setting) -> Job:
    """Run a document through the base and score its tokens."""
    model, sizes = setting.load_base(setting.dtype), setting.sizes
    ids = setting.draw_ids(model, 1, sizes.document)

    @torch.inference_mode()
    def run() -> float:
        hidden_states = run_folded(model, ids, sizes.segment)
        return next_token_nlls(model, ids[0], hidden_states[0]).mean().item()

    return Job(run, sizes.document, _head_operations(model, sizes.document, products=1))


def sliding(setting: Setting) -> Job:
    """Score a stream in overlapping windows."""
    model, sizes = setting.load_base(setting.dtype), setting.sizes
    stream = setting.draw_ids(model, sizes.stream)

    def run() -> float:
        return score_sliding(model, stream, sizes.window, sizes.stride).nll

    return Job(run, sizes.stream, _head_operations(model, sizes.stream, products=1))


def reference_sliding(setting: Setting) -> Job:
    """Score the same windows by the reference loop, with the attention of transformers."""
    model, sizes = setting.load_base(setting.dtype), setting.sizes
    model.set_attn_implementation("sdpa")
    stream = setting.draw_ids(model, sizes.stream)

    def run() -> float:
        return score_by_reference_loop(model, stream, sizes.window, sizes.stride).nll

    return Job(run, sizes.stream)


class LoopedFinetuning(Finetuning):
    """Fine-tuning by a loop over the segments, instead of folding them into the batch."""

    def forward(self, input_ids: Int[Tensor, "B T"]) -> dict[str, Tensor]:
        """Return the mean loss in nats a token; gradients reach through all segments."""
        state, parts = State(), []
        for segment in input_ids.split(self.segment_length, dim=1):
            begin = len(parts) * self.segment_length
            parts.append(
                run_folded(
                    self.model, segment, self.segment_length, state=state, first_position=begin
                )
            )
            state = state.next()
        predicting, targets = next_tokens(input_ids, torch.cat(parts, dim=1))
        head = self.model.get_output_embeddings().weight
        return {"loss": token_nlls(predicting, head, targets).mean()}


def _training(
    layers: list[int] | str, memory: bool, kind: type[Finetuning] = Finetuning
) -> Callable[[Setting], Job]:
    """Return a case that trains the attention of some layers on a document.

    Args:
        layers: which layers; the rest of the base is frozen.
        memory: give these layers a memory; False: leave them the base's own attention.
        kind: folded or looped.
    """

    def make(setting: Setting) -> Job:
        model, sizes = setting.load_base(torch.float32), setting.sizes
        infini = replace(PUBLISHED, layers=layers, segment_length=sizes.segment)
        if memory:
            insert_infini(model, infini)
        else:
            infini = make_control(model, infini)
        params = FinetuneParams(
            trainable="infini",
            train_documents=1,
            memory_documents=0,
            val_documents=1,
            lora=LoraParams(rank=8, alpha=16.0),
            kl_weight=0.0,
            lr_scale=LrScale(memory=1.0, infini=1.0, rest=1.0),
            **SCHEDULE,
        )
        head = _head_operations(model, sizes.document, products=2)
        ids = setting.draw_ids(model, 1, sizes.document)
        return _step(kind(model, infini, params, setting.dtype), ids, head)

    return make


def distilling(setting: Setting) -> Job:
    """Distil layer 0 in the default form."""
    model, sizes = setting.load_base(torch.float32), setting.sizes
    params = DistillParams(
        objective="layer_output",
        trainable="infini",
        samples=1,
        val_samples=1,
        tokens_per_sample=sizes.sample,
        **SCHEDULE,
    )
    infini = replace(DEFAULT_LAYER, segment_length=sizes.segment)
    samples = setting.draw_ids(model, sizes.document // sizes.sample, sizes.sample)
    return _step(Distillation(model, infini, params, setting.dtype), samples)


def _step(task: TrainingTask, input_ids: Int[Tensor, "B T"], head_operations: int = 0) -> Job:
    """Return a training step as the Trainer takes it, without the optimiser's part."""
    task.train()

    def run() -> float:
        task.zero_grad()
        with task.mixed_precision():
            loss = task(input_ids)["loss"]
        loss.backward()
        return loss.item()

    return Job(run, input_ids.numel(), head_operations)


def _head_operations(model: PreTrainedModel, num_tokens: int, products: int) -> int:
    """Count the operations of scoring all tokens but the first."""
    return 2 * (num_tokens - 1) * model.get_output_embeddings().weight.numel() * products


# Cases of a group are measured in turns, and compared with the first.
GROUPS: dict[str, dict[str, Callable[[Setting], Job]]] = {
    "forward": {"base forward, body": base_body, "base forward with head": base_with_head},
    "whole": {
        "document at once, base": _body(at_once=True),
        "document at once, published": _body(at_once=True, infini=replace(PUBLISHED, layers="all")),
    },
    "sliding": {"sliding evaluation": sliding, "reference loop": reference_sliding},
    "layer0": {
        "step, layer 0 plain": _training([0], memory=False),
        "step, layer 0 plain, looped": _training([0], memory=False, kind=LoopedFinetuning),
        "step, layer 0 Infini": _training([0], memory=True),
    },
    "all": {
        "step, all layers plain": _training("all", memory=False),
        "step, all layers Infini": _training("all", memory=True),
    },
    "distill": {"step, distilling layer 0": distilling},
}
