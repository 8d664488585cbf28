"""Pretraining by next-token prediction, on `transformers.Trainer`.

Slow to import. Knows neither texts nor sizes nor paths.

Axes:
    B  row of tokens
    T  token of a row
"""

import tempfile
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainingArguments

from infini_retrofit.cross_entropy import token_nlls
from infini_retrofit.runtime import start_run
from infini_retrofit.schedule import rate_factor

# As Pythia was trained; the Trainer spares biases and norms the decay.
WEIGHT_DECAY, BETAS = 0.1, (0.9, 0.95)


class _NextToken(nn.Module):
    """A language model with its loss, whose logits never leave it."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Int[Tensor, "B T"]) -> dict[str, Tensor]:
        """Score every token but the first of each row; the mean, in nats."""
        hidden_states = self.model.base_model(input_ids, use_cache=False).last_hidden_state
        weight = self.model.get_output_embeddings().weight
        nlls = token_nlls(hidden_states[:, :-1].flatten(0, 1), weight, input_ids[:, 1:].flatten())
        return {"loss": nlls.mean()}


class _Pretrainer(Trainer):
    """The Trainer with the library's course of the learning rate, and no patience with NaN."""

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LambdaLR:
        """Ramp up from the first step on: the Trainer's own warm-up wastes that one at rate 0."""
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer or self.optimizer, lambda step: rate_factor(step, num_training_steps)
        )
        return self.lr_scheduler

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Stop at a loss that is not finite."""
        loss = super().training_step(*args, **kwargs)
        place = f"in epoch {int(self.state.epoch) + 1}, step {self.state.global_step + 1}"
        _require_finite(loss, place)
        return loss


def _require_finite(loss: Tensor, place: str) -> None:
    """Refuse a loss that says that the weights are worth nothing."""
    if not torch.isfinite(loss):
        raise FloatingPointError(
            f"pretraining diverged {place}: the training loss is {loss.item()}; "
            "nothing was written, try a smaller models.*.lr"
        )


def pretrain(
    model: PreTrainedModel,
    rows: Int[Tensor, "B T"],
    *,
    epochs: int,
    batch_size: int,
    lr: float,
    seed: int,
) -> None:
    """Train all weights in place; equal arguments give equal weights on one machine's processor.

    Args:
        model: float32, and left so, in evaluation mode.
        rows: the tokens, each row predicted on its own.
        epochs: how often each row is seen.
        batch_size: rows a step.
        lr: at its peak.
        seed: of the order of the rows.

    Raises:
        FloatingPointError: if a loss is not finite.
    """
    trainee = _NextToken(model)
    with tempfile.TemporaryDirectory() as unused:
        arguments = _arguments(epochs, batch_size, lr, seed, unused)
        dataset = [{"input_ids": row} for row in rows]
        _Pretrainer(model=trainee, args=arguments, train_dataset=dataset).train()
    model.cpu().eval()
    with torch.no_grad():
        _require_finite(trainee(rows[:batch_size])["loss"], "in the last step")


def _arguments(
    epochs: int, batch_size: int, lr: float, seed: int, output_dir: str
) -> TrainingArguments:
    device, dtype = start_run()
    on_gpu = device.type != "cpu"
    arguments = TrainingArguments(
        output_dir=output_dir,
        per_device_train_batch_size=batch_size,
        num_train_epochs=epochs,
        learning_rate=lr,
        weight_decay=WEIGHT_DECAY,
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        max_grad_norm=1.0,
        bf16=dtype is torch.bfloat16,
        use_cpu=not on_gpu,
        seed=seed,
        save_strategy="no",
        logging_strategy="epoch",
        logging_nan_inf_filter=False,
        dataloader_pin_memory=on_gpu,
        report_to="none",
    )
    if arguments.n_gpu > 1:
        # The stage is one process, and replicas would change what a batch is.
        arguments._n_gpu = 1
    return arguments
